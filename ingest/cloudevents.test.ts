import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { type Parsed, Refusal } from '../shared/events.js'
import { parseCloudEvent } from './cloudevents.js'

type Json = Record<string, unknown>

const CLOUD_EVENT = {
  specversion: '1.0',
  id: 'A234-1234-1234',
  source: '/bots/7',
  type: 'io.calltape.turn',
  data: { call_sid: 'CA1', seq: 0, speaker: 'user', text: 'Hello' },
}
const OTHER = { ...CLOUD_EVENT, type: 'call.data', data: { call_sid: 'CA1' } }

function eventIn(given: unknown): Json {
  const parsed = parseCloudEvent(given)
  if (parsed instanceof Refusal) throw new Error(parsed.message)
  return parsed.event as unknown as Json
}

describe('an event', () => {
  test('has_its_fields_from_data_and_the_rest_from_the_envelope', () => {
    const given = {
      ...CLOUD_EVENT,
      time: '2026-01-25T10:00:00.5+05:30',
      datacontenttype: 'application/json',
      subject: 'lead 7',
    }
    expect(eventIn({ ...given, traceparent: '00-1', priority: 3, dataschema: 'https://example.com/turn' })).toEqual({
      type: 'turn',
      call_sid: 'CA1',
      id: '["/bots/7","A234-1234-1234"]',
      ts: Date.UTC(2026, 0, 25, 4, 30, 0, 500),
      source: '/bots/7',
      seq: 0,
      speaker: 'customer',
      text: 'Hello',
      meta: {
        type: 'io.calltape.turn',
        subject: 'lead 7',
        traceparent: '00-1',
        priority: 3,
        dataschema: 'https://example.com/turn',
      },
    })
  })

  test.each([
    ['turn', { speaker: 'agent', text: 'x' }, 'turn'],
    ['com.example.turn', { speaker: 'agent', text: 'x' }, 'turn'],
    ['calltape.call.started', {}, 'call.started'],
    ['io.calltape.call.ended', {}, 'call.ended'],
    ['call.status', {}, 'call.status'],
    ['com.example.voice.v2', { type: 'call.data' }, 'call.data'],
    ['com.example.call.ended', { type: 'call.data' }, 'call.ended'],
  ])('type_%s_with_%j_is_%s', (type, data, expected) => {
    expect(eventIn({ ...CLOUD_EVENT, type, data: { call_sid: 'CA1', ...data } })).toMatchObject({ type: expected })
  })

  test.each(['com.example.return', 'my-turn', 'turn.', '.turns', 'io.calltape.call.connected', 'constructor', 'ended'])(
    'type_%s_is_none_of_ours',
    (type) => {
      expect(parseCloudEvent({ ...CLOUD_EVENT, type })).toMatchObject({ code: 'unknown_type', path: 'type' })
    },
  )

  test('is_of_the_call_that_data_names_or_else_of_its_subject', () => {
    expect(eventIn({ ...OTHER, subject: 'CA2' })).toMatchObject({ call_sid: 'CA1', meta: { subject: 'CA2' } })
    expect(eventIn({ ...OTHER, subject: 'CA1' })).not.toHaveProperty('meta')
    for (const data of [{}, { call_sid: null }, null, undefined]) {
      expect(eventIn({ ...OTHER, subject: 'CA2', data })).toEqual({
        type: 'call.data',
        call_sid: 'CA2',
        id: expect.any(String),
        source: '/bots/7',
      })
    }
  })

  test('loses_nothing_that_both_data_and_the_envelope_say', () => {
    const data = { call_sid: 'CA1', id: 'own', source: 'bot', type: 'said', ts: 5, meta: { id: 'mine', trace: 'a' } }
    expect(eventIn({ ...OTHER, data, time: '2026-01-25T10:00:00Z', trace: 'b', text: 'an extension' })).toMatchObject({
      ts: 5,
      source: '/bots/7',
      meta: {
        id: 'mine',
        id_: 'own',
        source: 'bot',
        type: 'said',
        time: '2026-01-25T10:00:00Z',
        trace: 'a',
        trace_: 'b',
        text: 'an extension',
      },
    })
  })

  test('an_attribute_called_as_a_field_is_no_field', () => {
    const given = {
      ...CLOUD_EVENT,
      confidence: 0.5,
      outcome: 'x',
      call_sid: 'CA9',
      meta: 'y',
      data: { ...CLOUD_EVENT.data },
    }
    const event = eventIn(given)
    expect(event).toMatchObject({
      call_sid: 'CA1',
      meta: { confidence: 0.5, outcome: 'x', call_sid: 'CA9', meta: 'y' },
    })
    expect(event).not.toHaveProperty('confidence')
  })

  test('a_source_too_long_for_a_column_is_in_meta', () => {
    const source = `/${'x'.repeat(128)}`
    expect(eventIn({ ...OTHER, source, data: { call_sid: 'CA1', source: 'bot' } })).toEqual({
      type: 'call.data',
      call_sid: 'CA1',
      id: expect.stringMatching(/^sha256:[\w-]{43}$/),
      meta: { source, source_: 'bot' },
    })
  })

  test('null_is_not_there', () => {
    const nulls = {
      time: null,
      subject: null,
      datacontenttype: null,
      dataschema: null,
      data_base64: null,
      extension: null,
    }
    expect(eventIn({ ...OTHER, ...nulls })).toEqual(eventIn(OTHER))
  })

  test('data_in_base64_is_read', () => {
    const json = JSON.stringify({ call_sid: 'CA1', speaker: 'user', text: 'नमस्ते' })
    const given = { ...CLOUD_EVENT, data: null, data_base64: Buffer.from(json).toString('base64') }
    expect(eventIn(given)).toMatchObject({ call_sid: 'CA1', text: 'नमस्ते' })
  })

  test.each(['application/json', 'application/JSON; charset=utf-8', 'application/vnd.example+json', 'text/json'])(
    '%s_is_JSON',
    (datacontenttype) => {
      expect(eventIn({ ...OTHER, datacontenttype })).toMatchObject({ call_sid: 'CA1' })
    },
  )

  test('a_field_called_proto_is_data', () => {
    const given = JSON.parse(
      JSON.stringify(OTHER)
        .replace('"call_sid"', '"__proto__":{"polluted":1},"call_sid"')
        .replace('{', '{"__proto__":{"x":1},'),
    )
    const { meta } = eventIn(given) as { meta: Json }
    expect(Object.keys(meta)).toEqual(['__proto__', '__proto___'])
    expect(({} as Json).polluted).toBeUndefined()
  })
})

const BASE64 = (text: string | Uint8Array) => Buffer.from(text).toString('base64')

test.each<[string, Json, string]>([
  ['specversion', { specversion: undefined }, 'missing_field'],
  ['specversion', { specversion: null }, 'missing_field'],
  ['specversion', { specversion: '0.3' }, 'invalid_field'],
  ['specversion', { specversion: 1 }, 'invalid_field'],
  ['id', { id: undefined }, 'missing_field'],
  ['id', { id: '' }, 'invalid_field'],
  ['id', { id: 7 }, 'invalid_field'],
  ['source', { source: undefined }, 'missing_field'],
  ['source', { source: '' }, 'invalid_field'],
  ['source', { source: ['a'] }, 'invalid_field'],
  ['source', { source: 'calltape' }, 'invalid_field'],
  ['type', { type: undefined }, 'missing_field'],
  ['type', { type: '' }, 'invalid_field'],
  ['time', { time: 'yesterday' }, 'invalid_field'],
  ['time', { time: '2026-01-25T10:00:00' }, 'invalid_field'],
  ['time', { time: 1769335200000 }, 'invalid_field'],
  ['time', { time: 'yesterday', data: { ...CLOUD_EVENT.data, ts: 1 } }, 'invalid_field'],
  ['datacontenttype', { datacontenttype: 'application/xml' }, 'invalid_field'],
  ['datacontenttype', { datacontenttype: 'application/jsonp' }, 'invalid_field'],
  ['datacontenttype', { datacontenttype: '' }, 'invalid_field'],
  ['datacontenttype', { datacontenttype: 5 }, 'invalid_field'],
  ['data', { data: 'Hello' }, 'invalid_field'],
  ['data', { data: '{"call_sid":"CA1"}' }, 'invalid_field'],
  ['data', { data: [] }, 'invalid_field'],
  ['data_base64', { data_base64: BASE64('{}') }, 'invalid_field'],
  ['data_base64', { data: undefined, data_base64: 5 }, 'invalid_field'],
  ['data_base64', { data: undefined, data_base64: '%%' }, 'invalid_field'],
  ['data_base64', { data: undefined, data_base64: BASE64('{') }, 'invalid_field'],
  ['data_base64', { data: undefined, data_base64: BASE64('[]') }, 'invalid_field'],
  ['data_base64', { data: undefined, data_base64: BASE64(new Uint8Array([0x7b, 0xff, 0x7d])) }, 'invalid_field'],
  ['call_sid', { data: { speaker: 'a', text: 'x' } }, 'missing_field'],
  ['call_sid', { data: { speaker: 'a', text: 'x' }, subject: 'no call' }, 'invalid_field'],
  ['call_sid', { data: { speaker: 'a', text: 'x' }, subject: 7 }, 'invalid_field'],
  ['text', { data: { call_sid: 'CA1', speaker: 'a' } }, 'missing_field'],
  ['meta', { data: { ...CLOUD_EVENT.data, meta: 'x' }, extension: 1 }, 'invalid_field'],
])('%s_is_refused_by_name_in_%j', (path, change, code) => {
  const refusal = parseCloudEvent({ ...CLOUD_EVENT, ...change }) as Refusal
  expect(refusal).toMatchObject({ path, code, message: expect.stringMatching(path) })
  expect(refusal.message.length).toBeLessThan(250)
})

test.each([null, 5, 'x', [], [CLOUD_EVENT], true])('%j_is_no_CloudEvent', (given) => {
  expect(parseCloudEvent(given)).toMatchObject({ code: 'not_an_object' })
})

test('a_name_that_is_taken_without_an_end_is_refused', () => {
  const meta = Object.fromEntries(Array.from({ length: 17 }, (_, i) => [`x${'_'.repeat(i)}`, 1]))
  expect(parseCloudEvent({ ...OTHER, x: 2, data: { call_sid: 'CA1', meta } })).toMatchObject({
    code: 'invalid_field',
    path: 'x',
  })
})

/** Of the characters with which two pairs could be made to look the same. */
const tricky = fc.oneof(
  fc.string({
    unit: fc.constantFrom('"', '\\', ',', '[', ']', 'a', ' ', '\0', '\ud800', '\udc00', 'ÿ'),
    minLength: 1,
    maxLength: 90,
  }),
  fc.constantFrom('\\u0000', '\\ud800', '\ud800', '\0', 'a","b', 'a', 'b', '"'),
)

test('two_pairs_of_source_and_id_never_have_one_key_and_it_can_always_be_stored', () => {
  const keyOf = (source: string, id: string) => (parseCloudEvent({ ...OTHER, source, id }) as Parsed).event.id!
  fc.assert(
    fc.property(tricky, tricky, tricky, tricky, (source, id, otherSource, otherId) => {
      const [key, other] = [keyOf(source, id), keyOf(otherSource, otherId)]
      expect(key).toBe(keyOf(source, id))
      expect(key === other).toBe(source === otherSource && id === otherId)
      expect(key.length).toBeLessThanOrEqual(128)
      expect(key.isWellFormed() && !key.includes('\0')).toBe(true)
    }),
    { numRuns: 2000 },
  )
})
