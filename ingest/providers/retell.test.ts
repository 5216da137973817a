import { createHmac } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { readConfig } from '../../shared/config.js'
import type { JsonObject } from '../../shared/json.js'
import type { ReadRequest, Translation } from './provider.js'
import { createRetell } from './retell.js'

const KEY = 'key_of_retell'
const NOW = Date.UTC(2026, 5, 16)
const BODY = '{"event":"call_started","call":{"call_id":"x"}}'
const retell = createRetell(readConfig({ RETELL_API_KEY: `next,${KEY}` }))

function signature(ms: number | string, { body = BODY, key = KEY } = {}): string {
  return `v=${ms},d=${createHmac('sha256', key).update(body).update(String(ms)).digest('hex')}`
}

describe('verify', () => {
  const refusalOf = (header: string, body = BODY) =>
    retell.verify!({
      header: (name: string) => (name === 'x-retell-signature' ? header : ''),
      body: Buffer.from(body),
      receivedMs: NOW,
    } as never)?.message

  test('a_signature_of_now_over_this_body_is_accepted_under_any_of_the_keys', () => {
    expect(refusalOf(signature(NOW))).toBeUndefined()
    expect(refusalOf(signature(NOW - 300_000, { key: 'next' }))).toBeUndefined()
  })

  test('missing_wrong_old_and_changed_ones_are_refused', () => {
    const right = signature(NOW)
    for (const wrong of ['', `v=${NOW}`, right.replace('v=', 'v=1'), right.slice(0, -1), signature(NOW, { key: '' })]) {
      expect(refusalOf(wrong), wrong).toMatch(/does not fit/)
    }
    expect(refusalOf(right, BODY.replace('x', 'y'))).toMatch(/does not fit/)
    for (const old of [signature(NOW - 300_001), signature(NOW + 300_001), signature('now'), signature('')]) {
      expect(refusalOf(old), old).toMatch(/of the last 5 minutes/)
    }
  })
})

const eventsOf = (event: string, call: JsonObject, more: JsonObject = {}) =>
  (
    retell.toEvents({
      payload: { event, call: { call_id: 'x', ...call }, ...more },
    } as unknown as ReadRequest) as Translation
  ).events
const turnsOf = (event: string, call: JsonObject) => eventsOf(event, call).filter(({ type }) => type === 'turn')
const item = (content: string, role = 'user') => ({ role, content })

describe('turns', () => {
  const transcript_object = ['a', 'b', 'c', 'd', 'e', 'f'].map((content) => item(content))

  test('of_an_update_are_the_latest_but_for_the_last_which_may_still_grow', () => {
    expect(turnsOf('transcript_updated', { transcript_object }).map(({ seq, text }) => [seq, text])).toEqual([
      [1, 'b'],
      [2, 'c'],
      [3, 'd'],
      [4, 'e'],
    ])
    expect(turnsOf('transcript_updated', { transcript_object: [item('a')] })).toEqual([])
    expect(turnsOf('transcript_updated', {})).toEqual([])
  })

  test('have_the_same_places_in_each_of_the_transcripts', () => {
    const transcript_with_tool_calls = [
      item('a'),
      { role: 'tool_call_invocation', tool_call_id: 't', name: 'n', arguments: '{}' },
      { role: 'tool_call_result', tool_call_id: 't', content: 'found' },
      { role: 'node_transition', former_node_id: 'n' },
      { role: 'dtmf', digit: '5' },
      item('b', 'agent'),
    ]
    const expected = [
      { seq: 0, speaker: 'user', text: 'a' },
      { seq: 1, speaker: 'agent', text: 'b' },
    ]
    const only = eventsOf('call_ended', { transcript_with_tool_calls })
    expect(only).toContainEqual(expect.objectContaining({ type: 'call.ended', turn_count: 2 }))
    expect(turnsOf('call_ended', { transcript_with_tool_calls })).toMatchObject(expected)
    expect(turnsOf('call_ended', { scrubbed_transcript_with_tool_calls: transcript_with_tool_calls })).toMatchObject(
      expected,
    )
    const both = { transcript_object: [item('a'), item('b', 'agent')], transcript_with_tool_calls }
    const ended = eventsOf('call_ended', both).find(({ type }) => type === 'call.ended')!
    expect(ended).toMatchObject({
      turn_count: 2,
      meta: { transcript_with_tool_calls: transcript_with_tool_calls.slice(1, 5) },
    })
    expect(ended.meta).not.toHaveProperty('transcript_object')
  })

  test('are_timed_by_their_words', () => {
    const words = [
      { word: 'a', start: 1.5, end: 2 },
      { word: 'b', start: 2.1, end: 2.75 },
    ]
    const call = {
      start_timestamp: NOW,
      transcript_object: [
        { ...item('a b'), words },
        { ...item('c'), words: [] },
      ],
    }
    const [timed, untimed] = turnsOf('call_ended', call)
    expect(timed).toMatchObject({ ts: NOW + 1500, started_at: NOW + 1500, ended_at: NOW + 2750, meta: { words } })
    expect(untimed!.ts).toBeUndefined()
  })

  test('are_not_counted_where_no_transcript_is_kept', () => {
    const countOf = (call: JsonObject) =>
      eventsOf('call_ended', call).find(({ type }) => type === 'call.ended')!.turn_count
    expect(countOf({})).toBeUndefined()
    expect(countOf({ transcript_object: [] })).toBe(0)
  })
})

test.each([
  ['user_hangup', 'ended', 'completed'],
  ['voicemail_reached', 'ended', 'completed'],
  ['a_reason_of_next_year', 'ended', 'completed'],
  ['dial_busy', 'not_connected', 'busy'],
  ['user_declined', 'not_connected', 'busy'],
  ['dial_no_answer', 'not_connected', 'no-answer'],
  [undefined, 'not_connected', 'no-answer'],
  ['dial_failed', 'not_connected', 'failed'],
  ['error_llm_websocket_open', 'error', 'failed'],
  ['telephony_provider_unavailable', 'not_connected', 'failed'],
  [undefined, 'error', 'failed'],
])('%s_of_a_call_that_is_%s_is_%s', (disconnection_reason, call_status, status) => {
  expect(eventsOf('call_ended', { disconnection_reason, call_status })).toContainEqual(
    expect.objectContaining({ type: 'call.status', id: 'call_ended', status }),
  )
})

test('an_event_that_nobody_knows_is_kept_and_two_of_them_are_two', () => {
  const [, first] = eventsOf('transfer_started', { transcript: 'a' }, { transfer_destination: '+1' })
  const [, second] = eventsOf('transfer_started', { transcript: 'a b' }, { transfer_destination: '+1' })
  expect(first).toMatchObject({ type: 'call.data', meta: { event: 'transfer_started', transfer_destination: '+1' } })
  expect(first!.id).not.toBe(second!.id)
})
