import { describe, expect, test } from 'vitest'
import { readConfig } from '../../shared/config.js'
import type { JsonObject } from '../../shared/json.js'
import type { ReadRequest, Translation } from './provider.js'
import { createVapi } from './vapi.js'

const vapi = createVapi(readConfig({ VAPI_SECRET: 'next, s3cret' }))
const T0 = 1_781_600_000_000

const translated = (message: JsonObject) =>
  vapi.toEvents({ payload: { message: { call: { id: 'x' }, ...message } } } as unknown as ReadRequest) as Translation
const eventsOf = (message: JsonObject) => translated(message).events.slice(1)

describe('verify', () => {
  const refusalOf = (headers: Record<string, string>) =>
    vapi.verify!({ header: (name: string) => headers[name] ?? '' } as never)

  test('the_secret_is_taken_from_either_header', () => {
    expect(refusalOf({ 'x-vapi-secret': 's3cret' })).toBeUndefined()
    expect(refusalOf({ 'x-vapi-secret': 'next' })).toBeUndefined()
    expect(refusalOf({ authorization: 'Bearer s3cret' })).toBeUndefined()
  })

  test('anything_else_is_refused', () => {
    for (const secret of ['', 's3cre', 's3cret2', 'next,s3cret']) {
      expect(refusalOf({ 'x-vapi-secret': secret })).toMatchObject({ code: 'forbidden' })
      expect(refusalOf({ authorization: `Bearer ${secret}` })).toMatchObject({ code: 'forbidden' })
    }
    expect(refusalOf({ authorization: 'Basic s3cret' })).toMatchObject({ code: 'forbidden' })
    expect(createVapi(readConfig({})).verify).toBeUndefined()
  })
})

describe('a_transcript', () => {
  const said = { type: 'transcript', role: 'user', transcriptType: 'final', transcript: 'Yes.', timestamp: T0 }
  const idOf = (message: JsonObject) => eventsOf(message)[0]!.id

  test('sent_again_is_the_same_turn_and_the_same_words_later_are_another', () => {
    expect(idOf({ ...said })).toBe(idOf(said))
    expect(idOf({ ...said, timestamp: T0 + 1 })).not.toBe(idOf(said))
    expect(idOf({ ...said, role: 'assistant' })).not.toBe(idOf(said))
  })

  test('without_a_time_is_told_by_the_call_so_far', () => {
    const { timestamp: _, ...untimed } = said
    const before = (message: string) => ({ ...untimed, artifact: { messages: [{ role: 'bot', message }] } })
    expect(idOf(before('a'))).toBe(idOf(before('a')))
    expect(idOf(before('a'))).not.toBe(idOf(before('b')))
  })

  test('that_is_partial_is_ignored', () => {
    expect(translated({ ...said, transcriptType: 'partial' }).events).toEqual([])
  })
})

describe('a_report', () => {
  test.each([
    ['customer-ended-call', 'completed'],
    ['voicemail', 'completed'],
    ['a-reason-of-next-year', 'completed'],
    ['call.in-progress.twilio-completed-call', 'completed'],
    ['customer-busy', 'busy'],
    ['customer-did-not-answer', 'no-answer'],
    ['manually-canceled', 'canceled'],
    ['call.ringing.sip-inbound-caller-hungup-before-call-connect', 'canceled'],
    ['call.in-progress.error-vapifault-worker-died', 'failed'],
    ['pipeline-error-openai-llm-failed', 'failed'],
    ['twilio-failed-to-connect-call', 'failed'],
    ['assistant-not-found', 'failed'],
  ])('of_%s_is_%s_as_a_status_update_is', (endedReason, status) => {
    expect(eventsOf({ type: 'end-of-call-report', endedReason })).toContainEqual(
      expect.objectContaining({ type: 'call.status', id: 'report', status }),
    )
    expect(eventsOf({ type: 'status-update', status: 'ended', endedReason })).toMatchObject([
      { type: 'call.status', status, meta: { status: 'ended' } },
      { type: 'call.ended', reason: endedReason },
    ])
  })

  test('has_the_last_word_when_a_status_update_did_not_say_how_it_ended', () => {
    const [status, ended] = eventsOf({ type: 'status-update', status: 'ended' })
    expect([status!.status, ended!.reason]).toEqual([undefined, undefined])
  })

  test('gives_turns_only_of_what_was_said_aloud_wherever_they_are', () => {
    const messages = [
      { role: 'system', message: 'Be kind.' },
      { role: 'bot', message: 'Hi.', time: T0 },
      { role: 'tool_calls', message: '' },
      { role: 'user', message: 'Bye.', time: T0 + 9 },
    ]
    const turns = [
      { id: 'report-0', seq: 0, speaker: 'bot', text: 'Hi.', ts: T0 },
      { id: 'report-1', seq: 1, speaker: 'user', text: 'Bye.', ts: T0 + 9 },
    ]
    expect(translated({ type: 'end-of-call-report', artifact: { messages } }).unlessSpoken).toMatchObject(turns)
    expect(translated({ type: 'end-of-call-report', messages }).unlessSpoken).toMatchObject(turns)
  })

  test('keeps_the_transcript_as_text_when_it_has_no_messages', () => {
    const ended = eventsOf({ type: 'end-of-call-report', artifact: { transcript: 'AI: Hi.' } })
    expect(ended).toContainEqual(
      expect.objectContaining({
        type: 'call.ended',
        meta: { call: { id: 'x' }, artifact: { transcript: 'AI: Hi.', messages: [] } },
      }),
    )
  })

  test('without_a_duration_counts_from_its_start_to_its_end', () => {
    const times = { startedAt: '2026-06-16T08:53:20.000Z', endedAt: '2026-06-16T08:53:50.500Z' }
    const durationOf = (more: JsonObject) =>
      eventsOf({ type: 'end-of-call-report', ...more }).find(({ type }) => type === 'call.ended')!.duration_seconds
    expect(durationOf(times)).toBe(30.5)
    expect(durationOf({ ...times, durationSeconds: 29 })).toBe(29)
    expect(durationOf({ startedAt: 'yesterday' })).toBeUndefined()
  })
})

test('the_configuration_of_the_assistant_is_not_repeated_with_every_message', () => {
  const context = { assistant: { model: 'm' }, artifact: { messages: [] }, phoneNumber: { number: '+1' } }
  for (const type of ['transcript', 'status-update', 'tool-calls']) {
    const text = JSON.stringify(translated({ type, transcript: 'Hi', role: 'user', ...context }))
    expect(text).not.toMatch(/assistant|artifact|phoneNumber/)
  }
})
