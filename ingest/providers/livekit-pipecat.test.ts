import { expect, test } from 'vitest'
import { readConfig } from '../../shared/config.js'
import type { JsonObject } from '../../shared/json.js'
import { createLiveKit } from './livekit.js'
import { createPipecat } from './pipecat.js'
import type { Provider, ReadRequest, Translation } from './provider.js'

const CONFIG = readConfig({})

const request = (payload: JsonObject, query = 'call_sid=X') =>
  ({ payload, query: new URLSearchParams(query) }) as ReadRequest
const eventsOf = (provider: Provider, payload: JsonObject, query?: string) =>
  (provider.toEvents(request(payload, query)) as Translation).events

test.each([createLiveKit(CONFIG), createPipecat(CONFIG)])(
  '$name: the_call_is_named_by_the_URL_or_the_body_or_it_is_refused',
  (provider) => {
    expect(eventsOf(provider, { call_sid: 'Y' })).toMatchObject([{ call_sid: 'X', meta: {} }])
    expect(eventsOf(provider, { call_sid: 'Y' }, '')).toMatchObject([{ call_sid: 'Y' }])
    expect(provider.toEvents(request({}, ''))).toMatchObject({ code: 'missing_field', path: 'call_sid' })
    expect(provider.verify).toBeUndefined()
  },
)

test('LiveKit: what_nobody_said_is_no_turn', () => {
  for (const item of [
    { id: 'i', role: 'user', content: [{ type: 'image_content', image: 'data:…' }] },
    { id: 'i', role: 'assistant', content: [] },
    { id: 'i', role: 'assistant', content: ['  '] },
    { id: 'i', content: ['Whose?'] },
    { id: 'i', type: 'function_call', name: 'book', arguments: '{}' },
    null,
    'item',
  ]) {
    const payload = { type: 'conversation_item_added', item }
    expect(eventsOf(createLiveKit(CONFIG), payload), JSON.stringify(item)).toMatchObject([
      { type: 'call.data', meta: payload },
    ])
  }
})

test('LiveKit: text_is_taken_also_when_content_is_no_list', () => {
  const payload = {
    type: 'conversation_item_added',
    item: { id: 'i', role: 'user', content: 'Hello', created_at: 1769335201.9996 },
  }
  expect(eventsOf(createLiveKit(CONFIG), payload)).toMatchObject([{ type: 'turn', text: 'Hello', ts: 1769335202000 }])
})

test('Pipecat: the_two_events_of_one_user_turn_are_one_key_and_equal_words_later_are_another', () => {
  const id = (event: string, timestamp?: string) =>
    eventsOf(createPipecat(CONFIG), { event, content: 'Yes.', timestamp })[0]!.id
  const at = '2026-01-25T10:00:01.250+00:00'
  expect(id('on_user_turn_stopped', at)).toBe(id('on_user_turn_message_added', at))
  expect(id('on_user_turn_stopped', at)).not.toBe(id('on_assistant_turn_stopped', at))
  expect(id('on_user_turn_stopped', at)).not.toBe(id('on_user_turn_stopped', '2026-01-25T10:00:02.250+00:00'))
  expect(id('on_user_turn_stopped')).toBeUndefined()
})
