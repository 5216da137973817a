import { describe, expect, test } from 'vitest'
import { readConfig } from '../../shared/config.js'
import { Refusal } from '../../shared/events.js'
import type { JsonObject } from '../../shared/json.js'
import { twilioSignature } from '../../test/support/twilio.js'
import type { ProviderRequest, Translation } from './provider.js'
import { createTwilio } from './twilio.js'
import { verifySignature } from './twilio-signature.js'

const twilio = createTwilio(readConfig({}))

interface Given {
  route?: string
  method?: string
  body?: string
  type?: string
  headers?: Record<string, string>
}

/** @param urls the last one's query is the request's */
function request(
  urls: string[],
  { route = 'voice', method = 'POST', body = '', type, headers }: Given,
): ProviderRequest {
  const all: Record<string, string> = { 'content-type': type ?? 'application/x-www-form-urlencoded', ...headers }
  const query = new URLSearchParams(urls.at(-1)?.split('?')[1])
  return {
    method,
    route,
    pathSecret: undefined,
    query,
    publicUrls: urls,
    header: (name) => all[name] ?? '',
    body: Buffer.from(body),
    receivedMs: 0,
  }
}

const form = (fields: Record<string, string>) => new URLSearchParams(fields).toString()

describe('signature', () => {
  const url = 'https://mycompany.com/myapp.php?foo=1&bar=2'
  const caller = { CallSid: 'CA1234567890ABCDE', Digits: '1234', To: '+18005551212' }
  const documented = form({ ...caller, Caller: '+14158675310', From: '+14158675310' })
  const inSdks = form({ ...caller, Caller: '+14158675309', From: '+14158675309' })
  const json = '{"property": "value", "boolean": true}'
  const digest = '0a1ff7634d9ab3b95db5c9a2dfe9416e41502b283a80c7cf19632632f96e6620'
  const isTaken = (signature: string, urls: string[], given: Given) =>
    verifySignature(request(urls, { ...given, headers: { 'x-twilio-signature': signature } }), ['old', '12345']) ===
    undefined

  test.each([
    ['its documentation', 'GvWf1cFY/Q7PnoempGyD5oXAezc=', url, { body: documented }],
    ['its SDKs', 'RSOYDt4T1cUTdK1PDd93/VVr8B8=', url, { body: inSdks }],
    [
      'a port that it was not given',
      'RSOYDt4T1cUTdK1PDd93/VVr8B8=',
      url.replace('.com', '.com:1234'),
      { body: inSdks },
    ],
    ['the standard port of https', 'kvajT1Ptam85bY51eRf/AJRuM3w=', url, { body: inSdks }],
    ['the standard port of http', '0ZXoZLH/DfblKGATFgpif+LLRf4=', url.replace('https', 'http'), { body: inSdks }],
    ['JSON', 'a9nBmqA0ju/hNViExpshrM61xv4=', `${url}&bodySHA256=${digest}`, { body: json, type: 'application/json' }],
    [
      'JSON, and no other query',
      'y77kIzt2vzLz71DgmJGsen2scGs=',
      `https://mycompany.com/myapp.php?bodySHA256=${digest}`,
      { body: json, type: 'application/json; charset=utf-8' },
    ],
  ])('the_vector_of_%s_holds', (_, signature, at, given) => {
    expect(isTaken(signature, [at], given)).toBe(true)
    expect(isTaken(signature, ['http://127.0.0.1:8080/', at], given)).toBe(true)
    expect(isTaken(signature, [at], { ...given, body: given.body.replace('1', '2').replace('value', 'Value') })).toBe(
      false,
    )
    expect(isTaken(signature.replace('=', ''), [at], given)).toBe(false)
  })

  test('of_a_name_that_comes_twice_each_value_counts_once_in_order', () => {
    const signature = twilioSignature('12345', url, { Digits: ['5678', '1234', '1234'], Account: 'AC1' })
    expect(isTaken(signature, [url], { body: 'Digits=5678&Account=AC1&Digits=1234&Digits=1234' })).toBe(true)
  })

  test.each([
    ["https://a.example/v?name=it's", 'https://a.example/v?name=it%27s'],
    ['https://a.example/v?name=it%27s', "https://a.example/v?name=it's"],
    ['https://a.example/v?name=a%20b', 'https://a.example/v?name=a+b'],
    ['https://a.example:443/v', 'https://A.example/v'],
    ['https://user:word@a.example/v', 'https://user:word@a.example:8443/v'],
    ['wss://a.example/streams/twilio/', 'wss://a.example/streams/twilio'],
    ['wss://a.example:443/streams/twilio', 'wss://a.example/streams/twilio'],
    ['wss://a.example/streams/twiliotenantacme', 'wss://a.example/streams/twilio?tenant=acme'],
  ])('%s_may_be_signed_where_%s_is_called', (signed, called) => {
    expect(isTaken(twilioSignature('12345', signed), [called], { type: '' })).toBe(true)
  })

  test('a_form_of_any_size_and_shape_is_judged_at_once', () => {
    const names = Array.from({ length: 100_000 }, (_, i) => i.toString(36))
    const started = performance.now()
    expect(isTaken(twilioSignature('12345', url), [url], { body: names.join('&') })).toBe(false)
    expect(isTaken(twilioSignature('12345', url), [url], { body: 'a'.repeat(16 * 1024 * 1024) })).toBe(false)
    expect(performance.now() - started).toBeLessThan(5000) // quadratic: minutes
  })

  test('only_websockets_get_a_slash_or_a_query_like_a_form', () => {
    for (const signed of ['https://a.example/v/?b=c', 'https://a.example/vbc']) {
      expect(isTaken(twilioSignature('12345', signed), ['https://a.example/v?b=c'], { type: '' })).toBe(false)
    }
  })

  test('it_is_asked_for_only_where_a_token_is_configured', () => {
    expect(twilio.verify).toBeUndefined()
    expect(createTwilio(readConfig({ TWILIO_AUTH_TOKEN: '12345' })).verify).toBeDefined()
  })
})

describe('webhooks', () => {
  function eventsOf(route: string, payload: JsonObject, headers: Record<string, string> = {}) {
    const translation = twilio.toEvents({ ...request([], { route, headers }), payload: { CallSid: 'CA1', ...payload } })
    if (translation instanceof Refusal) throw new Error(translation.message)
    return translation.events
  }
  const last = (route: string, payload: JsonObject, headers?: Record<string, string>) =>
    eventsOf(route, payload, headers).at(-1)!

  test.each(['queued', 'initiated', 'ringing', 'in-progress'])('%s_does_not_end_the_call', (CallStatus) => {
    expect(eventsOf('voice', { CallStatus })).toMatchObject([{ type: 'call.status', status: CallStatus }])
  })

  test.each(['completed', 'busy', 'failed', 'no-answer', 'canceled'])('%s_ends_the_call', (CallStatus) => {
    const ends = [{ type: 'call.status' }, { type: 'call.ended', reason: CallStatus, duration_seconds: 7 }]
    expect(eventsOf('voice', { CallStatus, CallDuration: '7' })).toMatchObject(ends)
  })

  test('a_retry_has_the_id_of_what_it_repeats_and_another_message_has_another_one', () => {
    const token = { 'i-twilio-idempotency-token': 'token' }
    const ringing = { CallStatus: 'ringing', From: '+1' }
    const id = (payload: JsonObject, headers?: Record<string, string>) => last('voice', payload, headers).id
    expect(id({ ...ringing, SequenceNumber: '1' }, token)).toBe('1-ringing')
    expect(id(ringing, token)).toBe('token')
    expect(id(ringing)).toBe(id({ From: '+1', CallStatus: 'ringing' }))
    expect(id(ringing)).not.toBe(id({ ...ringing, Digits: '1' }))
  })

  test('statuses_of_one_second_are_in_the_order_of_their_numbers', () => {
    const at = (SequenceNumber: string) =>
      last('voice', { CallStatus: 'ringing', SequenceNumber, Timestamp: 'Thu, 05 Mar 2026 10:00:00 +0000' }).ts
    expect(at('0')).toBe(Date.UTC(2026, 2, 5, 10))
    expect(at('2')).toBe(Date.UTC(2026, 2, 5, 10) + 2)
  })

  test('an_end_whose_form_has_no_start_tells_when_the_call_began', () => {
    const Timestamp = 'Thu, 05 Mar 2026 10:00:40 +0000'
    const [started] = eventsOf('voice', { CallStatus: 'completed', CallDuration: '35', Timestamp, From: 'sip:a@b' })
    expect(started).toMatchObject({ type: 'call.started', from: 'sip:a@b', ts: Date.UTC(2026, 2, 5, 10, 0, 5) })
    expect(eventsOf('voice', { CallStatus: 'completed', From: '+1' })[0]?.ts).toBeUndefined()
  })

  test('fields_sent_twice_are_one_and_odd_ones_are_kept_as_they_are', () => {
    const twice = twilio.toEvents({ ...request([], {}), payload: { CallSid: ['CA1', 'CA1'], CallStatus: ['ringing'] } })
    expect((twice as Translation).events).toMatchObject([{ call_sid: 'CA1', status: 'ringing' }])
    const odd = { CallStatus: 'completed', CallDuration: 'long', Timestamp: 'noon', Digits: ['1', '2'] }
    expect(eventsOf('voice', odd)[0]!.meta).toEqual({ CallDuration: 'long', Timestamp: 'noon', Digits: ['1', '2'] })
  })

  test('a_request_that_names_no_call_is_refused_by_the_field', () => {
    const refusal = twilio.toEvents({ ...request([], {}), payload: { CallStatus: 'ringing' } })
    expect(refusal).toMatchObject({ code: 'missing_field', path: 'CallSid' })
  })

  test('only_what_asks_what_to_do_is_answered_with_twiml', () => {
    const answer = (route: string, payload: JsonObject) => twilio.answer!({ ...request([], { route }), payload })
    expect(answer('voice', { CallStatus: 'ringing' })).toMatchObject({ contentType: 'text/xml; charset=utf-8' })
    expect(answer('voice', { CallbackSource: 'call-progress-events' }).status).toBe('204 No Content')
    expect(answer('transcription', {}).status).toBe('204 No Content')
    expect(answer('recording', {}).status).toBe('204 No Content')
  })

  test.each([
    ['inbound_track', 'customer'],
    ['outbound_track', 'agent'],
    ['constructor', 'constructor'],
    ['', 'unknown'],
  ])('who_speaks_on_%s_is_the_%s', (Track, speaker) => {
    const TranscriptionData = '{"transcript":"null","confidence":0.5,"words":[1]}'
    const turn = last('transcription', { TranscriptionEvent: 'transcription-content', Track, TranscriptionData })
    expect(turn).toMatchObject({ type: 'turn', speaker, text: 'null', confidence: 0.5 })
    expect(turn.meta).toMatchObject({ Track, TranscriptionData: { words: [1] } })
  })

  test('only_the_start_and_the_end_of_a_transcription_that_are_numbered_are_marked', () => {
    const mark = (event: string, more: JsonObject) =>
      (last('transcription', { TranscriptionEvent: `transcription-${event}`, ...more }).meta as JsonObject).sequence
    const numbered = { TranscriptionSid: 'GT1', SequenceId: '1' }
    expect(mark('started', numbered)).toEqual({ of: 'GT1', at: 1, starts: true, dense: true })
    expect(mark('started', { ...numbered, PartialResults: 'True' })).toMatchObject({ dense: false })
    expect(mark('stopped', numbered)).toEqual({ of: 'GT1', at: 1, ends: true })
    expect(mark('error', numbered)).toBeUndefined()
    expect(mark('constructor', numbered)).toBeUndefined()
    expect(mark('stopped', { TranscriptionSid: 'GT1' })).toBeUndefined()
    expect(mark('stopped', { ...numbered, SequenceId: '1.5' })).toBeUndefined()
  })

  test('a_recording_has_the_time_at_which_it_was_done', () => {
    const RecordingStartTime = 'Thu, 05 Mar 2026 10:00:00 +0000'
    const ts = (RecordingStatus: string) =>
      last('recording', { RecordingSid: 'RE1', RecordingStatus, RecordingStartTime, RecordingDuration: '9' }).ts
    expect(ts('in-progress')).toBe(Date.UTC(2026, 2, 5, 10))
    expect(ts('completed')).toBe(Date.UTC(2026, 2, 5, 10, 0, 9))
  })
})

describe('WebSockets', () => {
  const setup = { type: 'setup', sessionId: 'VX1', callSid: 'CA1' }

  test('a_relayed_session_that_was_closed_in_order_ends_the_call_any_other_is_a_disconnect', () => {
    const closing = (code: number, ...messages: JsonObject[]) => {
      const stream = twilio.openStream!()
      for (const message of messages) stream.toEvents(message)
      return stream.closed!(code)
    }
    const ended = [{ type: 'call.ended', call_sid: 'CA1', id: 'VX1', reason: 'session-ended', source: 'twilio' }]
    expect(closing(1000, setup)).toEqual(ended)
    expect(closing(1005, setup)).toEqual(ended)
    expect(closing(1006, setup)).toEqual([])
    expect(closing(1000)).toEqual([])
    expect(closing(1000, { event: 'start', start: { callSid: 'CA1' } })).toEqual([])
  })

  test('audio_and_what_is_not_final_is_nothing_to_keep', () => {
    const stream = twilio.openStream!()
    stream.toEvents(setup)
    expect(stream.toEvents({ streamSid: 'MZ1', event: 'media', media: {} })).toBeUndefined()
    expect(stream.toEvents({ type: 'prompt', voicePrompt: 'Hel', last: false })).toEqual([])
  })

  test('a_prompt_of_a_bot_that_has_connected_again_does_not_pass_for_an_earlier_one', () => {
    const ids = [1, 2].map(() => {
      const stream = twilio.openStream!()
      stream.toEvents(setup)
      return stream.toEvents({ type: 'prompt', voicePrompt: 'Yes.' })![0]!.id
    })
    expect(ids[0] === undefined || ids[0] !== ids[1]).toBe(true)
  })
})
