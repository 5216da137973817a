/** What Exotel's fixtures do not show: credentials, clocks, odd values, streams that do not go by the book. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { readConfig } from '../../shared/config.js'
import { type CallEvent, Refusal } from '../../shared/events.js'
import type { JsonObject } from '../../shared/json.js'
import { parseGenerously } from '../webhooks.js'
import { createExotel } from './exotel.js'
import type { ProviderRequest } from './provider.js'

const RECEIVED = Date.parse('2024-01-15T09:00:50Z')

function request(route: string, headers: Record<string, string> = {}): ProviderRequest {
  const header = (name: string) => headers[name] ?? ''
  const common = { method: 'POST', query: new URLSearchParams(), publicUrls: [], body: Buffer.alloc(0), header }
  return { ...common, route, pathSecret: undefined, receivedMs: RECEIVED }
}

/** As ingest takes them. */
function eventsOf(route: string, payload: JsonObject, environment: Record<string, string> = {}, receivedMs = RECEIVED) {
  const provider = createExotel(readConfig(environment))
  const translation = provider.toEvents({ ...request(route), receivedMs, payload: { CallSid: 'CA1', ...payload } })
  if (translation instanceof Refusal) throw new Error(translation.message)
  return translation.events.map(taken)
}

function taken(event: Parameters<typeof parseGenerously>[0]): JsonObject {
  const parsed = parseGenerously(event, '')
  if (parsed instanceof Refusal) throw new Error(parsed.message)
  return { ...(parsed satisfies CallEvent) }
}

const only = (events: JsonObject[], type: string) => {
  expect(events.filter((event) => event.type === type)).toHaveLength(1)
  return events.find((event) => event.type === type)!
}

describe('credentials', () => {
  const { verify } = createExotel(readConfig({ EXOTEL_SECRET: 'one, two,bot:pa55' }))
  const basic = (credentials: string) => ({ authorization: `Basic ${Buffer.from(credentials).toString('base64')}` })

  test.each([
    [basic('anybody:one'), undefined, undefined],
    [basic(':two'), undefined, undefined],
    [basic('bot:pa55'), undefined, undefined],
    [{}, 'two', undefined],
    [basic('bot:wrong'), 'one', undefined],
    [basic('another:pa55'), undefined, 'unauthorized'],
    [basic('one:'), undefined, 'unauthorized'],
    [basic('one'), undefined, 'unauthorized'],
    [{ authorization: 'Bearer one' }, undefined, 'unauthorized'],
    [{}, undefined, 'unauthorized'],
    [{}, '', 'unauthorized'],
    [{}, 'on', 'forbidden'],
    [{}, 'one,two', 'forbidden'],
    [{}, 'pa55', 'forbidden'],
  ])('%j and the path %j: %s', (headers, pathSecret, code) => {
    const refusal = verify!({ ...request('status', headers), pathSecret })
    expect(refusal?.code).toBe(code)
    expect(refusal?.message ?? '').not.toMatch(/pa55|two/)
  })

  test('without_a_secret_ingest_tokens_guard_it', () => {
    expect(createExotel(readConfig({}))).not.toHaveProperty('verify')
  })

  test('what_opens_our_own_stream_is_not_stored', () => {
    const urls = {
      StreamUrl: 'wss://u:one@ct.example.com/streams/exotel?lead=7',
      Stream: { StreamUrl: 'wss://h/x/two' },
    }
    const { meta } = only(eventsOf('passthru', urls, { EXOTEL_SECRET: 'one,two' }), 'call.data')
    expect(meta).toEqual({
      StreamUrl: 'wss://***@ct.example.com/streams/exotel?lead=7',
      Stream: { StreamUrl: 'wss://h/x/***' },
    })
  })
})

describe('times', () => {
  const tsOf = (DateUpdated: unknown, zone = 'Asia/Kolkata', received = RECEIVED) =>
    only(eventsOf('status', { DateUpdated }, { EXOTEL_TIME_ZONE: zone }, received), 'call.status').ts

  test.each([
    ['2024-01-15 14:30:45', 'Asia/Kolkata', '2024-01-15T09:00:45Z'],
    ['2024-01-15 14:30:45', 'UTC', '2024-01-15T14:30:45Z'],
    ['2024-01-15 14:30:45', 'America/New_York', '2024-01-15T19:30:45Z'],
    ['2024-07-15 14:30:45', 'America/New_York', '2024-07-15T18:30:45Z'],
    ['2024-03-10 01:59:59', 'America/New_York', '2024-03-10T06:59:59Z'],
    ['2024-03-10 03:00:00', 'America/New_York', '2024-03-10T07:00:00Z'],
    ['2024-01-15T14:30:45+05:30', 'UTC', '2024-01-15T09:00:45Z'],
    ['2026-01-15T10:30:00.529Z', 'Asia/Kolkata', '2026-01-15T10:30:00.529Z'],
    ['Mon, 15 Jan 2024 14:30:45', 'Asia/Kolkata', '2024-01-15T09:00:45Z'],
    ['Mon, 15 Jan 2024 14:30:45 +0530', 'UTC', '2024-01-15T09:00:45Z'],
  ])('%s in %s is %s', (text, zone, instant) => {
    expect(tsOf(text, zone)).toBe(Date.parse(instant))
  })

  test('an_hour_that_comes_twice_is_the_one_of_the_receipt', () => {
    const first = Date.parse('2024-11-03T05:30:00Z')
    for (const instant of [first, first + 3_600_000]) {
      expect(tsOf('2024-11-03 01:30:00', 'America/New_York', instant + 2000)).toBe(instant)
    }
  })

  test.each(['yesterday', '14:30:45', '2024', 'Mon, 99 Jan 2024 14:30:45', 1705309245, { at: 'noon' }])(
    '%j_is_no_time_and_kept',
    (DateUpdated) => {
      const event = only(eventsOf('status', { DateUpdated }), 'call.status')
      expect(event).not.toHaveProperty('ts')
      expect(event.meta).toEqual({ DateUpdated })
    },
  )

  test('an_end_without_a_time_of_its_own_is_when_it_was_updated', () => {
    for (const EndTime of [null, '', 'null', '1970-01-01 05:30:00', '0000-00-00 00:00:00']) {
      const events = eventsOf('status', { Status: 'failed', EndTime, DateUpdated: '2024-01-15 14:30:45' })
      expect(only(events, 'call.ended').ts).toBe(Date.parse('2024-01-15T09:00:45Z'))
    }
  })
})

describe('StatusCallback', () => {
  test.each([
    ['completed', undefined, 'completed', true],
    ['NO_ANSWER', undefined, 'no-answer', true],
    ['canceled', undefined, 'canceled', true],
    ['in-progress', 'answered', 'in-progress', false],
    [undefined, 'answered', 'in-progress', false],
    ['ringing', 'ringing', 'ringing', false],
    ['queued', undefined, 'queued', false],
    ['rerouted', undefined, undefined, false],
    ['rerouted', 'terminal', undefined, true],
    [null, 'Terminal', undefined, true],
  ])('Status %j of EventType %j is %j, its end %j', (Status, EventType, status, isEnd) => {
    const events = eventsOf('status', { Status, ...(EventType && { EventType }) })
    expect(only(events, 'call.status').status).toBe(status)
    expect(events.some(({ type }) => type === 'call.ended')).toBe(isEnd)
  })

  test('ConversationDuration_counts_before_Duration', () => {
    const of = (payload: JsonObject) => only(eventsOf('status', payload), 'call.status')
    expect(of({ ConversationDuration: 0, Duration: '61' })).toMatchObject({
      duration_seconds: 0,
      meta: { Duration: '61' },
    })
    expect(of({ ConversationDuration: null, Duration: '61' })).toMatchObject({ duration_seconds: 61 })
    expect(of({ ConversationDuration: 'long' })).toMatchObject({ meta: { ConversationDuration: 'long' } })
  })

  test.each([
    ['inbound', 'inbound'],
    ['incoming', 'inbound'],
    ['outbound-dial', 'outbound'],
    ['outbound-api', 'outbound'],
    ['Outgoing', 'outbound'],
    ['sideways', undefined],
  ])('Direction %s is %s, and kept', (Direction, direction) => {
    const events = eventsOf('status', { Direction })
    expect(only(events, 'call.started').direction).toBe(direction)
    expect(only(events, 'call.status').meta).toEqual({ Direction })
  })

  test('legs_may_be_json_in_a_form', () => {
    const Legs = [{ OnCallDuration: 335, Status: null, AnsweredBy: 'NotSure' }]
    const { meta } = only(eventsOf('status', { Legs: JSON.stringify(Legs) }), 'call.status')
    expect(meta).toEqual({ Legs })
  })

  test('what_says_more_of_the_callers_than_before_is_another_event', () => {
    const ids = [{}, { From: '+911' }, { To: '+912', From: '+911' }, { From: '+911', To: '+912', Status: 'busy' }].map(
      (payload) => only(eventsOf('status', payload), 'call.started').id,
    )
    expect(new Set(ids).size).toBe(3)
    expect(ids[2]).toBe(ids[3])
  })
})

describe('Passthru', () => {
  test('no_CallType_ends_the_call', () => {
    for (const CallType of ['call-attempt', 'completed', 'client-hangup', 'incomplete', 'voicemail', 'a new one']) {
      const events = eventsOf('passthru', { CallType, DialCallDuration: '12' })
      expect(events.map(({ type }) => type)).toEqual(['call.started', 'call.data'])
      expect(events[1]!.meta).toEqual({ CallType, DialCallDuration: '12' })
    }
  })

  test.each([
    ['"0042"', '0042'],
    ['" 7 "', '7'],
    [42, '42'],
    ['*1#', '*1#'],
    ['""', undefined],
  ])('digits %j are %j', (digits, expected) => {
    expect(only(eventsOf('passthru', { digits }), 'call.data').data).toEqual(expected && { digits: expected })
  })

  test('a_request_that_names_no_call_is_refused_by_field', () => {
    for (const payload of [{}, { CallSid: '' }, { CallSid: null }, { CallSid: ['a', 'b'] }]) {
      const refusal = createExotel(readConfig({})).toEvents({ ...request('passthru'), payload })
      expect(refusal).toMatchObject({ code: 'missing_field', path: 'CallSid' })
    }
  })
})

describe('a stream', () => {
  const open = () => {
    const stream = createExotel(readConfig({})).openStream!()
    return (message: JsonObject) => stream.toEvents(message)?.map(taken)
  }
  const start = (call_sid: string, more: JsonObject = {}) => ({
    event: 'start',
    sequence_number: 1,
    stream_sid: 'MZ1',
    start: { stream_sid: 'MZ1', call_sid, from: '+911', to: '+912' },
    ...more,
  })

  test('a_repeated_start_is_the_same_events', () => {
    const send = open()
    expect(send(start('CA1', { sequence_number: '2' }))!.map(({ id }) => id)).toEqual(
      send(start('CA1'))!.map(({ id }) => id),
    )
  })

  test('numbered_messages_are_known_again_and_others_are_each_their_own', () => {
    const send = open()
    send(start('CA1'))
    const idOf = (message: JsonObject) =>
      send({ event: 'mark', stream_sid: 'MZ1', mark: { name: 'l' }, ...message })![0]!.id
    expect(idOf({ sequence_number: '7' })).toBe(idOf({ sequence_number: '7' }))
    expect(idOf({ sequence_number: '8' })).not.toBe(idOf({ sequence_number: '7' }))
    expect(idOf({})).toBeUndefined()
  })

  test('a_stop_before_any_start_ends_the_call_that_it_names', () => {
    expect(open()({ event: 'stop', stop: { call_sid: 'CA1', reason: 'stopped' } })).toMatchObject([
      { type: 'call.ended', call_sid: 'CA1', reason: 'stopped' },
    ])
  })

  test('a_start_without_a_call_goes_by_its_stream', () => {
    const send = open()
    const events = send({ event: 'start', streamSid: 'MZ1', start: { streamSid: 'MZ1', from: '+911' } })!
    expect(events.map(({ call_sid }) => call_sid)).toEqual(['MZ1', 'MZ1'])
    expect(send({ event: 'stop', stop: {} })).toMatchObject([{ type: 'call.ended', call_sid: 'MZ1', reason: 'stop' }])
  })

  test('what_is_not_documented_is_kept_whole', () => {
    const send = open()
    send(start('CA1'))
    const meta = { event: 'transcript', stream_sid: 'MZ1', transcript: { text: 'hello' } }
    expect(send(meta)).toEqual([{ type: 'call.data', call_sid: 'CA1', source: 'exotel', meta }])
    expect(send({ event: 'clear', stream_sid: 'MZ1' })).toMatchObject([{ meta: { event: 'clear' } }])
  })

  test('keys_add_up_but_not_for_ever', () => {
    const send = open()
    send(start('CA1'))
    const press = (digit: unknown) => send({ event: 'dtmf', dtmf: { digit, duration: 100 } })![0]!
    expect([press('4'), press(2), press('#')].map(({ data }) => data)).toEqual([
      { dtmf: '4' },
      { dtmf: '42' },
      { dtmf: '42#' },
    ])
    expect(press(null)).toMatchObject({ meta: { dtmf: { digit: null } } })
    for (let i = 0; i < 1000; i++) press('0')
    expect(press('1').data).toEqual({ dtmf: `${'0'.repeat(255)}1` })
    send(start('CA1'))
    expect(press('2').data, 'a repeated start').toEqual({ dtmf: `${'0'.repeat(254)}12` })
    send(start('CA2'))
    expect(press('3').data, 'another call').toEqual({ dtmf: '3' })
  })
})

describe('whatever comes', () => {
  const names = [
    'CallSid',
    'Status',
    'EventType',
    'From',
    'To',
    'Direction',
    'DateUpdated',
    'EndTime',
    'Duration',
    'digits',
  ].concat([
    'Stream',
    'StreamUrl',
    'Legs',
    'RecordingUrl',
    'CustomField',
    'call_sid',
    'event',
    'start',
    'stop',
    '__proto__',
  ])
  const payload = fc.dictionary(fc.oneof(fc.constantFrom(...names), fc.string()), fc.jsonValue({ maxDepth: 4 }))
  const DEEP = JSON.parse(`${'{"a":'.repeat(100_000)}1${'}'.repeat(100_000)}`) as JsonObject

  test('nothing_throws', () => {
    fc.assert(
      fc.property(fc.array(payload, { maxLength: 4 }), (payloads) => {
        const provider = createExotel(readConfig({ EXOTEL_SECRET: 's' }))
        const stream = provider.openStream!()
        for (const each of payloads) {
          for (const route of provider.routes) {
            const translation = provider.toEvents({ ...request(route), payload: each })
            if (!(translation instanceof Refusal)) for (const event of translation.events) parseGenerously(event, '')
          }
          for (const event of stream.toEvents(each) ?? []) parseGenerously(event, '')
        }
      }),
    )
    expect(eventsOf('status', { Status: 'busy', Legs: DEEP }).map(({ type }) => type)).toContain('call.ended')
    expect(eventsOf('passthru', { Stream: DEEP })).toHaveLength(2)
    const stream = createExotel(readConfig({})).openStream!()
    for (const event of ['start', 'dtmf', 'new'])
      stream.toEvents({ event, sequence_number: 1, call_sid: 'CA1', [event]: DEEP })
  })

  test('nothing_is_lost', () => {
    const fields = names.filter((name) => name !== 'CallSid' && name !== '__proto__' && !/^[a-z]*_?[a-z]*$/.test(name))
    const values = fc.record(
      Object.fromEntries(
        fields.map((name) => [name, fc.oneof(word(name), fc.array(word(name)), fc.record({ in: word(name) }))]),
      ),
    )
    fc.assert(
      fc.property(values, (given) => {
        for (const route of ['status', 'passthru']) {
          const stored = JSON.stringify(eventsOf(route, given))
          for (const each of JSON.stringify(given).match(/word-\w+-\d+/g) ?? []) expect(stored).toContain(each)
        }
      }),
    )
  })

  /** That nothing else holds. */
  function word(name: string) {
    return fc.nat().map((n) => `word-${name}-${n}`)
  }
})
