/** The event contract, field by field: what is taken, as what, and what is refused with which words. */
import { describe, expect, test } from 'vitest'
import { CALL_STATUSES, MAX_TEXT_BYTES } from './event-rules.js'
import { type CallEvent, idempotencyKey, parseEvent, Refusal } from './events.js'

type Json = Record<string, unknown>

const turn = (fields: Json = {}): Json => ({
  type: 'turn',
  call_sid: 'CA1',
  speaker: 'agent',
  text: 'hello',
  ...fields,
})
const status = (fields: Json = {}): Json => ({ type: 'call.status', call_sid: 'CA1', ...fields })

/** As ingest gets it: through JSON. */
function parse(given: unknown, bound?: string): Json {
  const parsed = parseEvent(given, bound)
  if (parsed instanceof Refusal) throw new Error(`refused: ${parsed.message}`)
  return parsed.event as unknown as Json
}

function refusal(given: unknown, bound?: string): Refusal {
  const parsed = parseEvent(given, bound)
  if (parsed instanceof Refusal) return parsed
  throw new Error(`taken: ${JSON.stringify(parsed.event)?.slice(0, 200)}`)
}

/** `levels` arrays in each other. */
function nested(levels: number): unknown {
  let value: unknown[] = []
  for (let i = 1; i < levels; i++) value = [value]
  return value
}

describe('speaker', () => {
  test.each([
    ['agent', ['agent', 'ai', 'bot', 'assistant', 'AI', 'Bot', 'AGENT']],
    ['customer', ['customer', 'user', 'caller', 'human', 'User', 'CUSTOMER']],
    ['system', ['system', 'System']],
  ])('%s_has_aliases', (canonical, aliases) => {
    for (const alias of aliases) expect(parse(turn({ speaker: alias })).speaker, alias).toBe(canonical)
  })

  test('any_other_speaker_is_kept_as_it_is', () => {
    const others = [
      'supervisor',
      'Dr. Müller',
      'agent 2',
      ' agent',
      '坐席',
      '__proto__',
      'constructor',
      'x'.repeat(128),
    ]
    for (const speaker of others) expect(parse(turn({ speaker }))).toEqual(turn({ speaker }))
  })
})

describe('status', () => {
  test('underscores_and_hyphens_and_cases_are_the_same', () => {
    for (const known of CALL_STATUSES) {
      for (const spelled of [known, known.replaceAll('-', '_'), known.toUpperCase()]) {
        expect(parse(status({ status: spelled })), spelled).toEqual(status({ status: known }))
      }
    }
  })

  test('an_unknown_status_is_kept_in_meta_and_never_becomes_failed', () => {
    for (const unknown of [
      'answered',
      'cancelled',
      'in progress',
      '',
      'FAILED!',
      'constructor',
      42,
      { code: 486 },
      [],
    ]) {
      expect(parse(status({ status: unknown }))).toEqual(status({ meta: { status: unknown } }))
    }
    expect(parse(status({ status: 'odd', meta: { status: 'mine', status_: 1 } }))).toEqual(
      status({ meta: { status: 'mine', status_: 1, status__: 'odd' } }),
    )
  })

  test('an_unknown_direction_is_kept_in_meta', () => {
    const started = { type: 'call.started', call_sid: 'CA1' }
    expect(parse({ ...started, direction: 'inbound' })).toEqual({ ...started, direction: 'inbound' })
    expect(parse({ ...started, direction: 'outbound' })).toEqual({ ...started, direction: 'outbound' })
    for (const unknown of ['outbound-api', 'Inbound', 7, ['inbound']]) {
      expect(parse({ ...started, direction: unknown })).toEqual({ ...started, meta: { direction: unknown } })
    }
  })
})

describe('null', () => {
  const optional: Record<string, Json> = {
    turn: { id: null, ts: null, source: null, meta: null, seq: null, confidence: null, language: null },
    'call.started': { direction: null, from: null, to: null, provider: null },
    'call.status': { status: null, duration_seconds: null, recording_url: null },
    'call.data': { data: null, stage: null, objections: null },
    'call.ended': { reason: null, outcome: null, turn_count: null, duration_seconds: null, recording_url: null },
  }
  test.each(Object.keys(optional))('of_an_optional_field_means_absent: %s', (type) => {
    const bare = type === 'turn' ? turn() : { type, call_sid: 'CA1' }
    expect(parse({ ...bare, ...optional[type] })).toEqual(bare)
  })

  test('of_a_required_field_means_that_it_is_missing', () => {
    for (const path of ['call_sid', 'speaker', 'text']) {
      expect(refusal(turn({ [path]: null })), path).toMatchObject({ code: 'missing_field', path })
    }
    expect(parse(turn({ call_sid: null }), 'CA9').call_sid, 'on a bound connection').toBe('CA9')
  })

  test('of_an_unknown_field_is_kept', () => {
    expect(parse(turn({ extra: null }))).toEqual(turn({ meta: { extra: null } }))
  })
})

describe('times', () => {
  test.each<[unknown, string]>([
    [0, '1970-01-01T00:00:00.000Z'],
    [1_704_067_200_000, '2024-01-01T00:00:00.000Z'],
    [1_704_067_200_000.6, '2024-01-01T00:00:00.001Z'],
    [253_402_300_799_999, '9999-12-31T23:59:59.999Z'],
    ['1970-01-01T00:00:00Z', '1970-01-01T00:00:00.000Z'],
    ['1969-12-31T19:00:00-05:00', '1970-01-01T00:00:00.000Z'],
    ['2024-01-01T05:30:00+05:30', '2024-01-01T00:00:00.000Z'],
    ['2024-01-01T00:00:00-00:00', '2024-01-01T00:00:00.000Z'],
    ['2024-01-01t00:00:00z', '2024-01-01T00:00:00.000Z'],
    ['2024-01-01 00:00:00Z', '2024-01-01T00:00:00.000Z'],
    ['2024-01-01T00:00:00.5Z', '2024-01-01T00:00:00.500Z'],
    ['2024-01-01T00:00:00.123456789+00:00', '2024-01-01T00:00:00.123Z'],
    ['9999-12-31T23:59:59.999Z', '9999-12-31T23:59:59.999Z'],
  ])('%s is %s', (given, iso) => {
    for (const field of ['ts', 'started_at', 'ended_at']) {
      expect(parse(turn({ [field]: given }))).toEqual(turn({ [field]: Date.parse(iso) }))
    }
  })

  test.each<[unknown, string]>([
    ['2024-01-01T00:00:00', 'no zone'],
    ['2024-01-01', 'no time'],
    ['2024-01-01T00:00Z', 'no seconds'],
    ['1704067200000', 'a number in a string'],
    ['Mon, 01 Jan 2024 00:00:00 GMT', 'another format'],
    ['2024-01-01T00:00:00Z ', 'something behind it'],
    ['2024-01-01T00:00:00.Z', 'an empty fraction'],
    ['2024-01-01T00:00:00+0530', 'a zone without colon'],
    ['2024-13-01T00:00:00Z', 'no such month'],
    ['2024-01-01T25:00:00Z', 'no such hour'],
    ['2024-01-01T00:00:00+99:99', 'no such zone'],
    ['', 'empty'],
    ['now', 'a word'],
    [-1, 'before 1970'],
    ['1969-12-31T23:59:59.999Z', 'before 1970'],
    [253_402_300_800_000, 'after 9999'],
    ['9999-12-31T23:59:59-23:59', 'after 9999'],
    [1e300, 'far too large'],
    [true, 'a boolean'],
    [{}, 'an object'],
  ])('%j is refused: %s', (given) => {
    for (const path of ['ts', 'started_at', 'ended_at']) {
      const refused = refusal(turn({ [path]: given }))
      expect(refused).toMatchObject({ code: 'invalid_field', path })
      expect(refused.message).toContain(`${path} wants epoch milliseconds or an RFC 3339 time with its zone`)
    }
  })
})

describe('text', () => {
  const units = {
    'one byte': 'x',
    'two bytes': 'ü',
    'three bytes': '€',
    'four bytes': '😀',
    'a lone surrogate': '\ud800',
  }
  test.each(Object.entries(units))('is_limited_to_64_KiB_of_UTF_8_with_characters_of: %s', (_, unit) => {
    const bytes = Buffer.byteLength(unit)
    const fits = unit.repeat(Math.floor(MAX_TEXT_BYTES / bytes)).padEnd(0)
    const text = 'x'.repeat(MAX_TEXT_BYTES - Buffer.byteLength(fits)) + fits
    expect(Buffer.byteLength(text)).toBe(65_536)
    expect(parse(turn({ text })).text).toBe(text)
    const refused = refusal(turn({ text: `${text}x` }))
    expect(refused).toMatchObject({ code: 'invalid_field', path: 'text' })
    expect(refused.message).toContain('at most 65536 bytes of UTF-8')
    expect(refused.message.length, 'does not repeat the text').toBeLessThan(200)
  })

  test('may_be_empty_but_not_missing_or_something_else', () => {
    expect(parse(turn({ text: '' })).text).toBe('')
    const { text: _, ...without } = turn()
    expect(refusal(without)).toMatchObject({ code: 'missing_field', path: 'text' })
    for (const text of [1, true, {}, ['a']]) expect(refusal(turn({ text })).path).toBe('text')
  })
})

describe('seq_and_turn_count', () => {
  const fields = [
    ['seq', (value: unknown) => turn({ seq: value })],
    ['turn_count', (value: unknown) => ({ type: 'call.ended', call_sid: 'CA1', turn_count: value })],
  ] as const
  test.each(fields)('%s_is_an_integer_from_0_to_what_int4_holds', (path, event) => {
    for (const good of [0, 1, 2_147_483_647]) expect(parse(event(good))).toEqual(event(good))
    for (const bad of [-1, 0.5, 2_147_483_648, Infinity, '1', true, [1]]) {
      const refused = refusal(event(bad))
      expect(refused, String(bad)).toMatchObject({ code: 'invalid_field', path })
      expect(refused.message).toContain(`${path} wants an integer from 0 to 2147483647`)
    }
  })
})

describe('unknown_fields', () => {
  test('go_into_meta', () => {
    const given = turn({ sentiment: 0.5, tags: ['a', { b: 1 }], status: 'ringing', 'odd name': '', meta: { mine: 1 } })
    expect(parse(given)).toEqual(
      turn({ meta: { mine: 1, sentiment: 0.5, tags: ['a', { b: 1 }], status: 'ringing', 'odd name': '' } }),
    )
  })

  test('give_way_to_what_meta_has_under_their_names', () => {
    const meta = { a: 'mine', a_: 'mine, too', b: null }
    expect(parse(turn({ a: 1, meta, b: 2, a_: 3 })).meta).toEqual({ ...meta, a__: 1, b_: 2, a___: 3 })
    expect(meta, 'what was given is not changed').toEqual({ a: 'mine', a_: 'mine, too', b: null })
  })

  test('are_refused_where_meta_has_too_many_names_like_theirs', () => {
    const meta = (underscores: number) =>
      Object.fromEntries([...Array(underscores).keys()].map((n) => [`a${'_'.repeat(n)}`, n]))
    expect(parse(turn({ a: 'x', meta: meta(16) })).meta).toEqual({ ...meta(16), [`a${'_'.repeat(16)}`]: 'x' })
    expect(refusal(turn({ a: 'x', meta: meta(17) }))).toMatchObject({
      code: 'invalid_field',
      path: 'a',
      message: 'a wants a name that meta does not have already',
    })
    // A megabyte of them: looking for a free name for each would take many seconds.
    const start = performance.now()
    expect(refusal(turn({ ...meta(1000), meta: meta(1000) })).path).toBe('a')
    expect(performance.now() - start).toBeLessThan(1000)
  })

  test('of_another_type_are_unknown_here', () => {
    expect(parse(status({ text: 5, speaker: [], seq: -1 })).meta).toEqual({ text: 5, speaker: [], seq: -1 })
  })

  test('called_like_properties_of_every_object_are_data_and_pollute_nothing', () => {
    const json =
      '{"type":"turn","call_sid":"CA1","speaker":"agent","text":"hello","__proto__":{"polluted":true},' +
      '"constructor":{"prototype":{"polluted":true}},"toString":1,"hasOwnProperty":2,"meta":{"__proto__":{"p":1},"valueOf":3}}'
    const event = parse(JSON.parse(json))
    expect(JSON.parse(JSON.stringify(event))).toEqual(
      JSON.parse(
        '{"type":"turn","call_sid":"CA1","speaker":"agent","text":"hello","meta":{"__proto__":{"p":1},"valueOf":3,' +
          '"__proto___":{"polluted":true},"constructor":{"prototype":{"polluted":true}},"toString":1,"hasOwnProperty":2}}',
      ),
    )
    expect(Object.keys(event.meta as object)).toContain('__proto__')
    expect(({} as Json).polluted).toBeUndefined()
    expect(Object.getPrototypeOf(event)).toBe(Object.prototype)
    expect(Object.getPrototypeOf(event.meta)).toBe(Object.prototype)
  })

  test('called___proto___keep_their_name_where_it_is_free', () => {
    const given = JSON.parse(
      '{"type":"turn","call_sid":"CA1","speaker":"agent","text":"hello","__proto__":{"polluted":1}}',
    )
    const event = parse(given)
    expect(JSON.stringify(event.meta)).toBe('{"__proto__":{"polluted":1}}')
    expect((event.meta as Json).polluted).toBeUndefined()
  })

  test('called_like_properties_of_every_object_do_not_stand_for_required_ones', () => {
    const given = JSON.parse('{"type":"turn","call_sid":"CA1","__proto__":{"speaker":"agent","text":"hello"}}')
    expect(refusal(given)).toMatchObject({ code: 'missing_field', path: 'speaker' })
  })
})

describe('depth', () => {
  const fields: [string, (value: unknown) => Json][] = [
    ['meta', (value) => turn({ meta: { value } })],
    ['data', (value) => ({ type: 'call.data', call_sid: 'CA1', data: { value } })],
    ['an_unknown_field', (value) => turn({ value })],
    ['an_unknown_status', (value) => status({ status: value })],
    ['an_unknown_direction', (value) => ({ type: 'call.started', call_sid: 'CA1', direction: value })],
  ]
  test.each(fields)('a_value_in_%s_may_be_nested_63_deep_and_no_deeper', (_, event) => {
    const taken = parse(event(nested(63)))
    expect(parse(taken), 'the sink takes what ingest took').toEqual(taken)
    for (const levels of [64, 65, 100_000]) {
      const refused = refusal(event(nested(levels)))
      expect(refused.code).toBe('invalid_field')
      expect(refused.message).toMatch(/wants .*nested at most 6[34] deep/)
    }
  })

  test('a_deep_value_where_another_is_wanted_is_refused', () => {
    const deep = nested(100_000)
    const given = [
      deep,
      { type: deep },
      turn({ call_sid: deep }),
      turn({ text: deep }),
      turn({ ts: deep }),
      turn({ id: deep }),
    ]
    for (const event of given) expect(refusal(event).message.length).toBeLessThan(200)
  })
})

describe('the_call', () => {
  test('call_sid_is_1_to_128_characters_of_a_few_kinds', () => {
    for (const sid of ['a', '0', 'CA1', 'a_b.c:d@e+f-g', '+15551234', 'x'.repeat(128), '__proto__', '..']) {
      expect(parse(turn({ call_sid: sid })).call_sid).toBe(sid)
    }
    const bad = ['', 'x'.repeat(129), 'a b', 'a/b', 'a\n', '\0', 'a{b}', 'ü', '٣', 'a%20', '*', 5, true, {}, ['CA1']]
    for (const sid of bad) {
      const refused = refusal(turn({ call_sid: sid }))
      expect(refused, JSON.stringify(sid)).toMatchObject({ code: 'invalid_field', path: 'call_sid' })
      expect(refused.message).toContain('call_sid wants 1 to 128 characters of A-Z a-z 0-9 _ . : @ + -')
    }
  })

  test('a_bound_connection_gives_its_call_and_takes_no_other', () => {
    const { call_sid: _, ...without } = turn()
    expect(parse(without, 'CA9')).toEqual(turn({ call_sid: 'CA9' }))
    expect(parse(turn(), 'CA1')).toEqual(turn())
    expect(refusal(turn(), 'CA9')).toMatchObject({
      code: 'call_sid_mismatch',
      path: 'call_sid',
      message: expect.stringMatching(/bound to call CA9.*"CA1"/),
    })
    expect(refusal(without)).toMatchObject({ code: 'missing_field', path: 'call_sid' })
  })
})

describe('idempotency', () => {
  const key = (event: Json) => idempotencyKey(parse(event) as unknown as CallEvent, '17-3')
  test('the_key_is_id_else_seq_else_the_entry', () => {
    expect(key(turn({ id: 'mine', seq: 4 }))).toBe('mine')
    expect(key(turn({ seq: 4 }))).toBe('4')
    expect(key(turn({ seq: 0 }))).toBe('0')
    expect(key(turn({ seq: -0 }))).toBe('0')
    expect(key(turn())).toBe('17-3')
    expect(key(turn({ id: null, seq: 4 }))).toBe('4')
    expect(key(turn({ id: null, seq: null }))).toBe('17-3')
    expect(key(status({ id: 'mine' }))).toBe('call.status mine')
    expect(key(status({ seq: 4 })), 'seq is the key of turns only').toBe('17-3')
  })

  test('an_id_is_1_to_128_characters_that_PostgreSQL_can_hold', () => {
    for (const id of ['x', 'x'.repeat(128), 'ü😀', ' ']) expect(parse(turn({ id })).id).toBe(id)
    for (const id of ['', 'x'.repeat(129), 'a\0b', '\ud800', 'a\udc00b', 5, {}, false]) {
      expect(refusal(turn({ id })), JSON.stringify(id)).toMatchObject({ code: 'invalid_field', path: 'id' })
    }
  })
})

describe('types', () => {
  test.each<unknown>([undefined, null, '', 'Turn', 'call', 'constructor', '__proto__', 'toString', 7, {}, ['turn']])(
    '%j_is_refused_and_the_known_ones_are_named',
    (type) => {
      const refused = refusal({ type, call_sid: 'CA1' })
      expect(refused).toMatchObject({ code: 'unknown_type', path: 'type' })
      expect(refused.message).toContain('turn, call.started, call.status, call.data, call.ended')
      expect(refused.message, 'internal ones are nobody’s business').not.toContain('call.connected')
    },
  )

  test.each(['call.connected', 'call.disconnected'])('%s_is_refused_from_outside_and_read_by_the_sink', (type) => {
    const event = { type, call_sid: 'CA1', source: 'ingest' }
    expect(refusal(event)).toMatchObject({ code: 'unknown_type', path: 'type' })
    expect(refusal(event, 'CA1')).toMatchObject({ code: 'unknown_type' })
    expect(parseEvent(event, undefined, true)).toEqual({ event, changed: false })
  })

  test.each<[string, unknown]>([
    ['a number', 5],
    ['a string', 'turn'],
    ['null', null],
    ['true', true],
    ['an array', [turn()]],
    ['nothing', undefined],
  ])('%s_is_not_an_event', (_, given) => {
    expect(refusal(given)).toMatchObject({ code: 'not_an_object' })
    expect(refusal(given).path).toBeUndefined()
  })

  test('a_bare_event_of_each_type_is_taken_unchanged', () => {
    for (const type of ['call.started', 'call.status', 'call.data', 'call.ended']) {
      const event = { type, call_sid: 'CA1' }
      expect(parseEvent(event)).toEqual({ event, changed: false })
    }
    expect(parseEvent(turn())).toEqual({ event: turn(), changed: false })
  })
})

/** For each field of each type, values that are taken as they are, and values that are refused. */
const FIELDS: [types: string[], field: string, wants: string, good: unknown[], bad: unknown[]][] = [
  [['*'], 'source', 'a string of 0 to 128 characters', ['bot', ''], [5, 'x'.repeat(129), {}]],
  [['*'], 'meta', 'a JSON object', [{}, { a: [1, { b: null }] }], [[], 'x', 5, true]],
  [['turn'], 'speaker', 'a string of 1 to 128 characters', ['agent'], ['', 'x'.repeat(129), 5]],
  [['turn'], 'confidence', 'a number from 0 to 1', [0, 0.5, 1], [-0.01, 1.01, '0.5', true]],
  [['turn'], 'language', 'a string of 0 to 64 characters', ['en-IN', 'hi'], ['x'.repeat(65), 5]],
  [['turn'], 'interrupted', 'true or false', [true, false], ['true', 1, 0]],
  [
    ['call.started'],
    'from',
    'a string of 0 to 512 characters',
    ['+15551234', 'sip:a@b;c=d'],
    [15551234, 'x'.repeat(513)],
  ],
  [['call.started'], 'to', 'a string of 0 to 512 characters', ['+15551234'], [{}, 'x'.repeat(513)]],
  [['call.started'], 'provider', 'a string of 0 to 128 characters', ['exotel'], [1, 'x'.repeat(129)]],
  [
    ['call.status', 'call.ended'],
    'duration_seconds',
    'a number of seconds from 0 to 2147483647',
    [0, 61, 2_147_483_647],
    [-1, '61', 2_147_483_648, true],
  ],
  [
    ['call.status', 'call.ended'],
    'recording_url',
    'a string of 0 to 4096 characters',
    ['https://example.com/a.wav'],
    [5, 'x'.repeat(4097)],
  ],
  [['call.data'], 'data', 'a JSON object', [{}, { budget: 5 }], [[], 'x', 5]],
  [['call.data'], 'stage', 'a string of 0 to 128 characters', ['closing'], [5, 'x'.repeat(129)]],
  [['call.data'], 'objections', 'an array of strings', [[], ['price', '']], ['price', [1], ['a', null], {}]],
  [['call.ended'], 'reason', 'a string of 0 to 1024 characters', ['hangup'], [5, 'x'.repeat(1025)]],
  [['call.ended'], 'outcome', 'a string of 0 to 128 characters', ['sold'], [5, 'x'.repeat(129)]],
]
const ALL = ['turn', 'call.started', 'call.status', 'call.data', 'call.ended']
const perType = FIELDS.flatMap(([types, ...rest]) =>
  (types[0] === '*' ? ALL : types).map((type) => [type, ...rest] as const),
)

test.each(perType)('in_a_%s_%s_wants_%s', (type, field, wants, good, bad) => {
  const event = (value: unknown): Json => ({
    ...(type === 'turn' ? turn() : { type, call_sid: 'CA1' }),
    [field]: value,
  })
  for (const value of good) expect(parseEvent(event(value))).toEqual({ event: event(value), changed: false })
  for (const value of bad) {
    const refused = refusal(event(value))
    expect(refused, JSON.stringify(value)).toMatchObject({ code: 'invalid_field', path: field })
    expect(refused.message).toMatch(new RegExp(`^${field} wants ${wants}`))
    expect(refused.message.length).toBeLessThan(200)
  }
})

test('seconds_are_rounded', () => {
  expect(parse(status({ duration_seconds: 12.5 })).duration_seconds).toBe(13)
  expect(parse(status({ duration_seconds: 0.4 })).duration_seconds).toBe(0)
})

describe('of_thousands_of_generated_events', () => {
  /** Park and Miller's generator: the same events in every run. */
  let seed = 1
  const random = (below: number) => {
    seed = (seed * 48_271) % 2_147_483_647
    return seed % below
  }
  const pick = <T>(from: readonly T[]): T => from[random(from.length)] as T
  const values = (): unknown[] => [
    ...[
      '',
      'agent',
      'AI',
      'in_progress',
      'odd',
      'inbound',
      'CA1',
      'CA2',
      'bad sid',
      '2024-01-01T00:00:00+05:30',
      'ü😀\0',
    ],
    ...[null, true, false, 0, -0, 1, -1, 0.5, 12.25, 1_704_067_200_000.4, 2 ** 31, 1e300],
    ...[{}, [], [1], ['a'], { status: 'x', meta: { meta: 1 } }, { a_: 1, a: { b: [] } }, JSON.parse('{"__proto__":1}')],
  ]
  const names = [
    ...[
      'id',
      'ts',
      'source',
      'meta',
      'seq',
      'confidence',
      'language',
      'started_at',
      'interrupted',
      'direction',
      'from',
    ],
    ...[
      'provider',
      'status',
      'duration_seconds',
      'data',
      'stage',
      'objections',
      'reason',
      'turn_count',
      'a',
      'a_',
      '__proto__',
    ],
  ]
  const generate = (): Json => {
    const event: Json = { type: pick(ALL), call_sid: pick(['CA1', 'CA1', 'CA1', 'CA2', 'bad sid']) }
    if (event.type === 'turn')
      Object.assign(event, { speaker: pick(['ai', 'human', 'Bob']), text: pick(['', 'hello ü']) })
    for (let n = random(5); n > 0; n--) {
      const value = pick(values())
      Object.defineProperty(event, pick(names), { value, enumerable: true, writable: true, configurable: true })
    }
    return event
  }
  const events = Array.from({ length: 20_000 }, generate)
  const taken = events.flatMap((given) => {
    const parsed = parseEvent(given)
    return parsed instanceof Refusal ? [] : [{ given, ...parsed }]
  })

  test('enough_are_taken_and_enough_are_refused_to_prove_anything', () => {
    expect(taken.length).toBeGreaterThan(5000)
    expect(events.length - taken.length).toBeGreaterThan(2000)
    expect(taken.filter(({ changed }) => changed).length).toBeGreaterThan(2000)
    expect(taken.filter(({ changed }) => !changed).length).toBeGreaterThan(1000)
  })

  test('what_is_given_is_not_changed', () => {
    for (const given of events) {
      const before = JSON.stringify(given)
      parseEvent(given)
      expect(JSON.stringify(given)).toBe(before)
    }
  })

  test('parsing_what_was_parsed_changes_nothing', () => {
    for (const { event } of taken) {
      // Through JSON, as the sink gets it from the stream.
      expect(parseEvent(JSON.parse(JSON.stringify(event)), undefined, true)).toStrictEqual({
        event: JSON.parse(JSON.stringify(event)),
        changed: false,
      })
    }
  })

  test('an_event_that_counts_as_unchanged_means_the_same_as_what_was_given', () => {
    for (const { given, event, changed } of taken) if (!changed) expect(event).toEqual(given)
  })

  test('no_value_is_lost', () => {
    const leaves = (value: unknown): unknown[] =>
      typeof value === 'object' && value !== null ? Object.values(value).flatMap(leaves) : [value]
    for (const { given, event } of taken) {
      const kept = leaves(event)
      const unknown = names.slice(-3).filter((name) => Object.hasOwn(given, name))
      for (const name of unknown) for (const leaf of leaves(given[name])) expect(kept).toContainEqual(leaf)
    }
  })

  test('a_refusal_names_a_field_of_the_event_and_says_what_it_wants', () => {
    for (const given of events) {
      const parsed = parseEvent(given)
      if (!(parsed instanceof Refusal)) continue
      expect(parsed.message).toMatch(new RegExp(`^${parsed.path} (is required and )?wants `))
      expect(Object.hasOwn(given, parsed.path ?? '')).toBe(true)
    }
  })
})

test('nobody_passes_for_calltape', () => {
  const ended = { type: 'call.ended', call_sid: 'CA1', source: 'calltape' }
  expect(parseEvent(ended)).toMatchObject({ code: 'invalid_field', path: 'source' })
  expect(parseEvent(ended, undefined, true)).toMatchObject({ event: ended })
})
