import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { parseEvent, Refusal, type Turn } from '../../shared/events.js'
import { callSidInKey, contentOf, presumedEnd, readSession, readTime, type Session } from './session.js'

const item = (n: number, speaker = n % 2 === 0 ? 'ai' : 'user') => ({
  speaker,
  text: `turn ${n}`,
  timestamp: `2026-01-25T16:45:${String(10 + n).padStart(2, '0')}.123456`,
})
const blob = (transcript: unknown, more: object = {}) => ({
  call_sid: 'CA1',
  lead_id: 7,
  lead_name: 'Asha',
  lead_phone: '+919800000000',
  property_type: null,
  location: 'Pune',
  budget: 7.5e6,
  source: 'web',
  conversation_stage: 'qualification',
  audio_buffer: 'ff'.repeat(100),
  silence_chunks: 3,
  transcript_history: transcript,
  last_agent_question: 'When?',
  collected_data: { bhk: 3 },
  is_bot_speaking: true,
  escalation_requested: false,
  objections_encountered: ['price'],
  close_attempts: 1,
  session_start_time: '2026-01-25T16:45:00',
  last_interaction_time: '2026-01-25T16:46:00.5',
  ...more,
})
const read = (value: unknown, named = 'CA1') => {
  const session = readSession(named, typeof value === 'string' ? value : JSON.stringify(value))
  if (!('started' in session)) throw new Error(session.reason)
  return session
}
const idsOf = ({ turns }: Session) => turns.map(({ id }) => id!)
const texts = ({ turns }: Session) => turns.map(({ text }) => text)

test('a_session_becomes_the_events_of_its_call', () => {
  const session = read(blob([item(0), item(1), item(2, 'agent'), item(3, 'customer')]))
  const base = Date.UTC(2026, 0, 25, 16, 45)
  expect(session.started).toEqual({
    type: 'call.started',
    call_sid: 'CA1',
    id: expect.stringMatching(/^rescue-/),
    source: 'rescue',
    provider: 'exotel',
    ts: base,
    meta: {
      lead_id: 7,
      lead_name: 'Asha',
      lead_phone: '+919800000000',
      location: 'Pune',
      budget: 7.5e6,
      source: 'web',
    },
  })
  expect(session.turns.map(({ speaker, text, ts }) => [speaker, text, ts! - base])).toEqual([
    ['agent', 'turn 0', 10_123],
    ['customer', 'turn 1', 11_123],
    ['agent', 'turn 2', 12_123],
    ['customer', 'turn 3', 13_123],
  ])
  expect(session.data).toEqual({
    type: 'call.data',
    call_sid: 'CA1',
    id: expect.stringMatching(/^rescue-/),
    source: 'rescue',
    ts: base + 60_500,
    data: { bhk: 3 },
    stage: 'qualification',
    objections: ['price'],
    meta: { escalation_requested: false, close_attempts: 1 },
  })
  expect(session).toMatchObject({ isTruncated: false, unreadable: [], lastMs: base + 60_500 })
  for (const event of [session.started, ...session.turns, session.data!]) {
    expect(parseEvent(event)).toEqual({ event, changed: false })
    expect('seq' in event).toBe(false)
  }
})

test('whatever_states_of_a_blob_are_looked_at_their_union_is_every_turn_once', () => {
  const same = { speaker: 'ai', text: 'Hello?', timestamp: null }
  const all = [item(0), same, item(1), same, item(2), same]
  const states = fc.array(fc.shuffledSubarray(all.map((_, i) => i)), { minLength: 1, maxLength: 6 })
  fc.assert(
    fc.property(states, (looks) => {
      const ids = new Map<string, string>()
      for (const look of looks) {
        for (const turn of read(blob(look.map((i) => all[i]))).turns) ids.set(turn.id!, turn.text)
      }
      const most = Math.max(...looks.map((look) => look.filter((i) => all[i] === same).length))
      const others = new Set(looks.flat().filter((i) => all[i] !== same)).size
      expect(ids.size).toBe(most + others)
    }),
  )
})

test('ids_do_not_depend_on_how_the_speaker_is_called_and_differ_where_anything_said_differs', () => {
  const [id] = idsOf(read(blob([item(0, 'ai')])))
  expect(idsOf(read(blob([item(0, 'agent')])))).toEqual([id])
  const others = [item(0, 'user'), { ...item(0), text: 'x' }, { ...item(0), timestamp: '2026-01-25T16:45:10.123457' }]
  expect(new Set([id, ...others.flatMap((other) => idsOf(read(blob([other]))))]).size).toBe(4)
})

test('times_without_a_zone_are_utc_and_a_turn_without_one_stands_behind_the_one_before', () => {
  expect(readTime('2026-01-25T16:45:12.123956')).toBe(Date.UTC(2026, 0, 25, 16, 45, 12, 123))
  expect(readTime('2026-01-25 16:45:12')).toBe(Date.UTC(2026, 0, 25, 16, 45, 12))
  expect(readTime('2026-01-25T16:45:12+05:30')).toBe(Date.UTC(2026, 0, 25, 11, 15, 12))
  expect(readTime('2026-01-25 16:45:12.5 +05:30')).toBeUndefined()
  expect(readTime(1769359512.5)).toBe(1769359512500)
  for (const none of ['16:45:12', '2026', '2026-01-25T25:00', '1969-12-31T23:59:59', -1, '', null, {}, Number.NaN])
    expect(readTime(none)).toBeUndefined()
  const start = Date.UTC(2026, 0, 25, 16, 45)
  const { turns } = read(
    blob([
      { ...item(0), timestamp: 'soon' },
      item(1),
      { speaker: 'ai', text: 'no time' },
      { ...item(2), timestamp: 5e15 },
    ]),
  )
  expect(turns.map(({ ts }) => ts! - start)).toEqual([0, 11_123, 11_123, 11_123])
  expect(turns.map(({ meta }) => meta)).toEqual([{ timestamp: 'soon' }, undefined, undefined, { timestamp: 5e15 }])
})

test('fields_of_an_item_that_are_not_known_are_kept_whatever_they_are_called', () => {
  const odd = { id: 'x', type: 'y', seq: 3, call_sid: 'z', ts: 1, source: 's', meta: { a: 1 }, confidence: 'high' }
  const [turn] = read(blob([{ ...item(0), ...odd, nothing: null }])).turns
  expect(turn).toMatchObject({ type: 'turn', call_sid: 'CA1', source: 'rescue', meta: odd })
  expect(turn!.seq).toBeUndefined()
})

test('what_is_wrong_in_a_transcript_is_kept_and_its_neighbours_are_turns', () => {
  const wrong = [
    17,
    null,
    'text',
    ['ai', 'x'],
    {},
    { speaker: 'ai' },
    { speaker: 'ai', text: 5 },
    { speaker: {}, text: 'x' },
  ]
  const huge = { speaker: 'ai', text: 'x'.repeat(65 * 1024) }
  const session = read(blob([item(0), ...wrong, item(1), huge, item(2)]))
  expect(texts(session)).toEqual(['turn 0', 'turn 1', 'turn 2'])
  expect(session.unreadable).toHaveLength(wrong.length + 1)
  const kept = session.data!.meta!.unreadable_turns as { reason: string; item: string }[]
  expect(kept.slice(0, wrong.length).map(({ item }) => JSON.parse(item))).toEqual(wrong)
  expect(kept.at(-1)!.item.length).toBeGreaterThan(64 * 1024)
  expect(read(blob({ 0: item(0) })).unreadable).toEqual(['transcript_history is no array'])
})

test('what_is_not_what_it_should_be_is_kept_in_meta', () => {
  const deep = JSON.parse(`${'['.repeat(70)}${']'.repeat(70)}`)
  const strange = { conversation_stage: 5, objections_encountered: ['a', 7], collected_data: 'none', x: deep }
  const more = { session_start_time: 'then', big: 'y'.repeat(20_000), ...JSON.parse('{"__proto__":{"z":1}}') }
  const { data, started } = read({ ...blob([item(0)]), ...strange, ...more, ['__proto__']: { z: 1 } })
  expect(data!.stage).toBeUndefined()
  expect(data!.objections).toEqual(['a'])
  expect(data!.meta).toMatchObject({
    conversation_stage: 5,
    objections_encountered: [7],
    collected_data: 'none',
    x: JSON.stringify(deep),
    session_start_time: 'then',
  })
  expect((data!.meta!.big as string).length).toBe(16 * 1024 + 1)
  expect(Object.getOwnPropertyDescriptor(data!.meta, '__proto__')?.value).toEqual({ z: 1 })
  expect(started.ts).toBe(Date.UTC(2026, 0, 25, 16, 45, 10, 123))
  expect(parseEvent(data)).not.toBeInstanceOf(Refusal)
})

test('call_data_is_new_only_when_it_says_something_new', () => {
  const first = read(blob([item(0)])).data!
  const frame = read(
    blob([item(0)], { audio_buffer: 'aa', silence_chunks: 9, last_interaction_time: '2026-01-25T16:47:00' }),
  )
  expect(contentOf(frame.data!)).toBe(contentOf(first))
  const question = { last_agent_question: 'Where?', last_agent_question_type: 'location' } // the transcript has it, too
  expect(contentOf(read(blob([item(0)], question)).data!)).toBe(contentOf(first))
  expect(frame.data!.id).not.toBe(first.id) // a stage that comes back later is another event
  expect(contentOf(read(blob([item(0)], { close_attempts: 2 })).data!)).not.toBe(contentOf(first))
  expect(contentOf(JSON.parse(JSON.stringify(first)))).toBe(contentOf(first))
})

test('a_blob_without_anything_is_a_call_all_the_same', () => {
  expect(read({})).toMatchObject({ callSid: 'CA1', turns: [], data: undefined, lastMs: undefined })
})

describe('a_blob_that_breaks_off', () => {
  const whole = JSON.stringify(blob([item(0), { ...item(1), words: [{ w: 'a' }] }, item(2)]))

  test('gives_every_turn_that_is_complete_wherever_it_breaks_off', () => {
    const ids = idsOf(read(whole))
    const ends = ids.map((_, n) => whole.indexOf(`"turn ${n}"`)).map((from) => whole.indexOf('}', from))
    ends[1] = whole.indexOf(']}', ends[1]) + 1
    for (let length = 12; length < whole.length; length++) {
      const session = readSession('CA1', whole.slice(0, length))
      const complete = ends.filter((end) => end < length).length
      if (!('started' in session)) {
        expect([complete, length < 20]).toEqual([0, true])
        continue
      }
      expect(session.isTruncated).toBe(true)
      expect(session.unreadable).toEqual([])
      expect(idsOf(session)).toEqual(ids.slice(0, complete))
    }
  })

  test('keeps_what_was_complete_of_its_other_fields', () => {
    const cut = whole.slice(0, whole.indexOf('"objections_encountered":["price"') + 33)
    expect(read(cut).data).toMatchObject({ data: { bhk: 3 }, stage: 'qualification', objections: ['price'] })
    const inNumber = whole.slice(0, whole.indexOf('"budget":') + 12)
    expect(read(inNumber).started.meta).not.toHaveProperty('budget') // what is there may be half of it
  })

  test('or_goes_on_as_something_else_gives_what_was_there_before', () => {
    expect(texts(read(`${whole.slice(0, whole.indexOf('"turn 2"'))}\u0000\u0000`))).toEqual(['turn 0', 'turn 1'])
    const trailing = read(`${whole}}`)
    expect([trailing.isTruncated, texts(trailing).length]).toEqual([true, 3])
  })
})

test('constants_of_python_are_null_and_text_that_looks_like_them_is_text', () => {
  const text = JSON.stringify(blob([{ ...item(0), text: 'NaN "and" -Infinity \\' }, item(1)]))
  const session = read(text.replace('7500000', '-Infinity').replace('"silence_chunks":3', '"silence_chunks": NaN'))
  expect(session.isTruncated).toBe(false)
  expect(session.started.meta).not.toHaveProperty('budget')
  expect(texts(session)).toEqual(['NaN "and" -Infinity \\', 'turn 1'])
  const cut = text.replace('7500000', 'Infinity').slice(0, text.indexOf('turn 1') + 3)
  expect(texts(read(cut))).toEqual(['NaN "and" -Infinity \\'])
})

test('what_is_no_session_is_named_without_its_words_and_kept_if_its_call_is_known', () => {
  const secret = 'my number is 12345'
  for (const text of [secret, `["${secret}"]`, '17', 'null', `"${secret}"`, '', '{', `{"${secret}`, '[{"a":1']) {
    const session = readSession('CA1', text)
    if ('started' in session) throw new Error(`${text} passed for a session`)
    expect(session.reason).not.toContain('12345')
    expect(session.data!.meta).toMatchObject({ unreadable_session: text })
    expect(parseEvent(session.data)).not.toBeInstanceOf(Refusal)
    expect('data' in readSession('no call', text)).toBe(false)
  }
  const long = readSession('CA1', `x${'\u{1F600}'.repeat(100_000)}`)
  const kept = 'started' in long ? '' : String(long.data?.meta?.unreadable_session)
  expect([kept.length > 60_000, kept.length < 70_000, kept.isWellFormed()]).toEqual([true, true, true])
})

test('the_key_says_whose_session_it_is_and_the_blob_where_the_key_cannot', () => {
  expect(callSidInKey('session:CA1', 'session:*')).toBe('CA1')
  expect(callSidInKey('session:a:b', 'session:*')).toBe('a:b')
  expect(callSidInKey('session:CA1', 'session:CA*')).toBe('CA1')
  expect(callSidInKey('bot2/CA1', 'bot2/[A-Z]*')).toBe('CA1')
  const other = read(blob([item(0)], { call_sid: 'CA2' }))
  expect(other.callSid).toBe('CA1')
  expect(other.data!.meta).toMatchObject({ session_call_sid: 'CA2' })
  expect(read(blob([item(0)]), 'not one').callSid).toBe('CA1')
  expect(readSession('not one', '{"call_sid":5}')).toEqual({ reason: 'neither the key nor the value has a call_sid' })
})

test('an_end_is_the_same_for_the_same_turns_in_whatever_order', () => {
  expect(presumedEnd('CA1', ['b', 'a'])).toEqual(presumedEnd('CA1', ['a', 'b']))
  expect(presumedEnd('CA1', ['a']).id).not.toBe(presumedEnd('CA1', ['a', 'b']).id)
  expect(parseEvent(presumedEnd('CA1', []), undefined, true)).not.toBeInstanceOf(Refusal)
})

test('texts_of_any_characters_pass_unchanged', () => {
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.string({ unit: 'binary' }), fc.string({ minLength: 1 }))), (said) => {
      const transcript = said.map(([text, speaker]) => ({ speaker, text, timestamp: null }))
      const { turns, unreadable } = read(blob(transcript))
      expect([turns.map(({ text }: Turn) => text), unreadable]).toEqual([said.map(([text]) => text), []])
    }),
  )
})
