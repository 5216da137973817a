import { createHmac } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { readConfig } from '../../shared/config.js'
import type { JsonObject } from '../../shared/json.js'
import { createElevenLabs } from './elevenlabs.js'
import type { ReadRequest, Translation } from './provider.js'

const SECRET = 'wsec_of_elevenlabs'
const NOW = Date.UTC(2026, 5, 16)
const BODY = '{"type":"post_call_transcription","data":{"conversation_id":"x"}}'
const elevenLabs = createElevenLabs(readConfig({ ELEVENLABS_SECRET: `next,${SECRET}` }))

function signature(t: number | string, { body = BODY, secret = SECRET } = {}): string {
  return `t=${t},v0=${createHmac('sha256', secret).update(`${t}.${body}`).digest('hex')}`
}

describe('verify', () => {
  const t = NOW / 1000
  const refusalOf = (header: string, body = BODY) =>
    elevenLabs.verify!({
      header: (name: string) => (name === 'elevenlabs-signature' ? header : ''),
      body: Buffer.from(body),
      receivedMs: NOW,
    } as never)?.message

  test('a_signature_of_the_last_half_hour_over_this_body_is_accepted_under_any_of_the_secrets', () => {
    expect(refusalOf(signature(t))).toBeUndefined()
    expect(refusalOf(signature(t - 1800, { secret: 'next' }))).toBeUndefined()
  })

  test('missing_wrong_old_and_changed_ones_are_refused', () => {
    const right = signature(t)
    for (const wrong of [
      '',
      `t=${t}`,
      right.replace('v0', 'v1'),
      right.replace('t=', 't=1'),
      signature(t, { secret: '' }),
    ]) {
      expect(refusalOf(wrong), wrong).toMatch(/does not fit/)
    }
    expect(refusalOf(right, BODY.replace('"x"', '"y"'))).toMatch(/does not fit/)
    for (const old of [signature(t - 1801), signature(t + 1801), signature('now'), signature('')]) {
      expect(refusalOf(old), old).toMatch(/of the last 30 minutes/)
    }
  })
})

const translated = (type: string, data: JsonObject) =>
  elevenLabs.toEvents({ payload: { type, event_timestamp: 1_781_600_020, data } } as unknown as ReadRequest)
const eventsOf = (data: JsonObject, type = 'post_call_transcription') =>
  (translated(type, { conversation_id: 'x', ...data }) as Translation).events
const the = (type: string, data: JsonObject) => eventsOf(data).filter((event) => event.type === type)

test('who_called_whom_is_told_by_the_direction', () => {
  const numbers = { agent_number: '+1', external_number: '+2' }
  const startedWith = (direction: string) =>
    the('call.started', { metadata: { phone_call: { ...numbers, direction } } })
  expect(startedWith('inbound')).toMatchObject([{ from: '+2', to: '+1', direction: 'inbound' }])
  expect(startedWith('outbound')).toMatchObject([{ from: '+1', to: '+2', direction: 'outbound' }])
})

test('what_the_agent_did_without_a_word_is_no_turn_and_leaves_no_gap', () => {
  const work = { role: 'agent', message: null, tool_calls: [{ tool_name: 'look' }] }
  const transcript = [
    { role: 'user', message: 'Hi.' },
    work,
    { role: 'agent', message: 'Bye.' },
    { role: 'user', message: ' ' },
  ]
  expect(the('turn', { transcript })).toMatchObject([{ seq: 0 }, { seq: 1, text: 'Bye.' }])
  expect(the('call.ended', { transcript })).toMatchObject([
    { turn_count: 2, meta: { transcript: [work, transcript[3]] } },
  ])
})

test('a_transcript_that_is_no_list_is_kept_and_proves_nothing', () => {
  const [ended] = the('call.ended', { transcript: 'Agent: Hi.' })
  expect(ended).toMatchObject({ meta: { transcript: 'Agent: Hi.' } })
  expect(ended!.turn_count).toBeUndefined()
})

test('without_times_there_are_none', () => {
  for (const event of eventsOf({ transcript: [{ role: 'user', message: 'Hi.', time_in_call_secs: 1 }] })) {
    expect(event.ts).toBeUndefined()
  }
})

test('audio_is_dropped', () => {
  expect(eventsOf({ full_audio: 'SUQz' }, 'post_call_audio')).toEqual([])
})

test.each([
  ['busy', 'busy'],
  ['no-answer', 'no-answer'],
  ['unknown', 'failed'],
])('a_call_that_did_not_come_about_for_%s_is_%s', (failure_reason, status) => {
  expect(eventsOf({ failure_reason }, 'call_initiation_failure')).toMatchObject([
    { type: 'call.started', direction: 'outbound' },
    { type: 'call.status', status },
    { type: 'call.ended', reason: failure_reason },
  ])
})

test('what_is_of_no_call_is_ignored_and_a_call_without_a_name_refused', () => {
  expect(translated('voice_removal_notice', {})).toEqual({ events: [] })
  expect(translated('call_initiation_failure', {})).toMatchObject({
    code: 'missing_field',
    path: 'data.conversation_id',
  })
  expect(translated('', {})).toMatchObject({ code: 'missing_field' })
})
