import { generateKeyPairSync, type KeyObject, sign } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { OperatorError, readConfig } from '../../shared/config.js'
import type { JsonObject } from '../../shared/json.js'
import type { ReadRequest, Translation } from './provider.js'
import { createTelnyx } from './telnyx.js'

const NOW = Date.UTC(2026, 5, 16)
const BODY = '{"data":{"event_type":"call.answered","payload":{"call_session_id":"x"}}}'
const [ours, theirs] = [generateKeyPairSync('ed25519'), generateKeyPairSync('ed25519')]
/** As the portal shows it: the last 32 bytes of the key's DER. */
const shown = (key: KeyObject) => key.export({ type: 'spki', format: 'der' }).subarray(-32).toString('base64')

describe('verify', () => {
  const t = NOW / 1000
  const telnyx = createTelnyx(
    readConfig({ TELNYX_PUBLIC_KEY: `${shown(generateKeyPairSync('ed25519').publicKey)},${shown(ours.publicKey)}` }),
  )
  const signature = (timestamp: number | string, body = BODY, key = ours.privateKey) =>
    sign(null, Buffer.from(`${timestamp}|${body}`), key).toString('base64')

  function refusalOf(signed: string, timestamp: number | string = t, body = BODY): string | undefined {
    const headers: Record<string, string> = {
      'telnyx-timestamp': String(timestamp),
      'telnyx-signature-ed25519': signed,
    }
    const header = (name: string) => headers[name] ?? ''
    return telnyx.verify!({ header, body: Buffer.from(body), receivedMs: NOW } as never)?.message
  }

  test('a_signature_of_now_over_this_body_is_accepted_under_any_of_the_keys', () => {
    expect(refusalOf(signature(t))).toBeUndefined()
    expect(refusalOf(signature(t - 300), t - 300)).toBeUndefined()
  })

  test('the_first_vector_of_RFC_8032_has_the_key_that_we_make_of_its_bytes', () => {
    const bytes = Buffer.from('d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a', 'hex')
    const its = createTelnyx(readConfig({ TELNYX_PUBLIC_KEY: bytes.toString('base64') }))
    const pkcs8 = Buffer.from(
      '302e020100300506032b6570042204209d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60',
      'hex',
    )
    const key = { key: pkcs8, format: 'der', type: 'pkcs8' } as const
    const headers: Record<string, string> = {
      'telnyx-timestamp': String(t),
      'telnyx-signature-ed25519': sign(null, Buffer.from(`${t}|${BODY}`), key).toString('base64'),
    }
    const request = { header: (name: string) => headers[name] ?? '', body: Buffer.from(BODY), receivedMs: NOW }
    expect(its.verify!(request as never)).toBeUndefined()
  })

  test('missing_wrong_old_and_changed_ones_are_refused', () => {
    const right = signature(t)
    for (const wrong of [
      '',
      'bm90aGluZw==',
      right.slice(4),
      signature(t, BODY, theirs.privateKey),
      signature('', BODY),
    ]) {
      expect(refusalOf(wrong), wrong).toMatch(/does not fit/)
    }
    expect(refusalOf(right, t, BODY.replace('x', 'y'))).toMatch(/does not fit/)
    expect(refusalOf(right, t + 1)).toMatch(/does not fit/)
    for (const old of [t - 301, t + 301, 'now', '']) {
      expect(refusalOf(signature(old), old), String(old)).toMatch(/of the last 5 minutes/)
    }
  })

  test('a_key_that_is_none_is_an_error_of_the_operator_at_start', () => {
    for (const key of [
      'key',
      shown(ours.publicKey).slice(4),
      ours.publicKey.export({ type: 'spki', format: 'pem' }).toString(),
    ]) {
      expect(() => createTelnyx(readConfig({ TELNYX_PUBLIC_KEY: key }))).toThrow(OperatorError)
    }
    expect(createTelnyx(readConfig({})).verify).toBeUndefined()
  })
})

const translated = (event_type: string, fields: JsonObject, id = 'event-1') => {
  const payload = { data: { event_type, id, occurred_at: '2026-06-16T08:53:20.123456Z', payload: fields } }
  return createTelnyx(readConfig({})).toEvents({ payload } as unknown as ReadRequest) as Translation
}

test('the_call_is_the_session_else_the_leg_else_what_it_is_controlled_by', () => {
  const ids = { call_control_id: 'v3:control', call_leg_id: 'leg', call_session_id: 'session' }
  const sidOf = (fields: JsonObject) => translated('call.answered', fields).events[0]!.call_sid
  expect(sidOf(ids)).toBe('session')
  expect(sidOf({ ...ids, call_session_id: null })).toBe('leg')
  expect(sidOf({ call_control_id: 'v3:control' })).toBe('v3:control')
})

test.each(['constructor', 'toString', '__proto__'])('%s_is_a_type_and_a_cause_as_any_other', (word) => {
  const { events } = translated(word, { call_session_id: 's' }) as Translation
  expect(events.at(-1)).toMatchObject({ type: 'call.data', meta: { event_type: word } })
  const hangup = translated('call.hangup', { call_session_id: 's', hangup_cause: word }) as Translation
  expect(hangup.events.slice(-2)).toMatchObject([{ status: undefined }, { type: 'call.ended', reason: word }])
})

describe('a_hangup', () => {
  const ofCause = (hangup_cause: string) => translated('call.hangup', { call_session_id: 'x', hangup_cause })

  test.each([
    ['user_busy', 'busy'],
    ['call_rejected', 'busy'],
    ['timeout', 'no-answer'],
    ['no_answer', 'no-answer'],
    ['originator_cancel', 'canceled'],
    ['not_found', 'failed'],
  ])('for_%s_makes_the_call_%s_only_if_nobody_has_answered_it', (cause, status) => {
    const { events, unlessAnswered } = ofCause(cause)
    expect(events).toMatchObject([{ type: 'call.started' }, { type: 'call.data', meta: { hangup_cause: cause } }])
    expect(unlessAnswered).toMatchObject([
      { type: 'call.status', status },
      { type: 'call.ended', reason: cause },
    ])
  })

  test.each([
    ['normal_clearing', 'completed'],
    ['time_limit', 'completed'],
    ['unspecified', undefined],
    ['a_cause_of_next_year', undefined],
  ])('for_%s_is_%s_and_ends_it', (cause, status) => {
    const { events, unlessAnswered } = ofCause(cause)
    expect(events.slice(2).map(({ type, status, reason }) => [type, status ?? reason])).toEqual([
      ['call.status', status],
      ['call.ended', cause],
    ])
    expect(unlessAnswered).toBeUndefined()
  })
})

describe('a_transcription', () => {
  const ofData = (transcription_data: JsonObject) =>
    translated('call.transcription', { call_session_id: 'x', transcription_data }).events

  test('is_a_turn_when_it_is_final_and_says_something', () => {
    const final = { transcript: 'Hi.', is_final: true, confidence: 0.9 }
    expect(ofData(final)).toMatchObject([{}, { type: 'turn', id: 'event-1', text: 'Hi.', confidence: 0.9 }])
    expect(ofData({ transcript: 'Hi.' })).toHaveLength(2)
    expect(ofData({ ...final, is_final: false })).toEqual([])
    expect(ofData({ ...final, transcript: '' })).toEqual([])
  })

  test('is_of_the_customer_unless_its_track_is_outbound', () => {
    const speakerOf = (transcription_track?: string) => ofData({ transcript: 'Hi.', transcription_track })[1]!.speaker
    expect(['inbound', undefined, 'outbound'].map(speakerOf)).toEqual(['customer', 'customer', 'agent'])
  })
})

test('a_public_recording_is_preferred_to_one_that_is_signed_for_minutes', () => {
  const urlOf = (fields: JsonObject) =>
    translated('call.recording.saved', { call_session_id: 'x', ...fields }).events[1]!.recording_url
  const recording_urls = { mp3: 'signed' }
  expect(urlOf({ recording_urls, public_recording_urls: { mp3: 'public' } })).toBe('public')
  expect(urlOf({ recording_urls, public_recording_urls: {} })).toBe('signed')
  expect(urlOf({ recording_urls: { wav: 'w' }, public_recording_urls: null })).toBe('w')
})

test('what_is_of_no_call_is_ignored_and_a_call_without_a_name_refused', () => {
  expect(translated('message.received', {})).toEqual({ events: [] })
  expect(translated('call.hangup', {})).toMatchObject({ code: 'missing_field', path: 'data.payload.call_session_id' })
  expect(translated('', {})).toMatchObject({ code: 'missing_field' })
})
