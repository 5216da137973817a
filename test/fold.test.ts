/** fold: what becomes of a call's events in its call_sessions row. */
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { WebSocket } from 'ws'
import type { CallEvent, Turn } from '../shared/events.js'
import { Partitions } from '../shared/keys.js'
import { readPackageFile } from '../shared/package-root.js'
import { EncodedTurns } from '../sink/copy.js'
import { decodeCall, type Entry, emptyBatch } from '../sink/decode.js'
import { writeBatch } from '../sink/write.js'
import type { Said } from './support/arbitrary-calls.js'
import { type Database, freshDatabase, startTestStack, type TestStack, until } from './support/stores.js'
import { Producer } from './support/streams.js'

type Row = Record<string, unknown>

const T0 = Date.UTC(2026, 0, 1, 12)
const at = (seconds: number) => T0 + Math.round(seconds * 1000)
const time = (seconds: number) => new Date(at(seconds))
const stamp = (seconds: number) =>
  time(seconds)
    .toISOString()
    .replace(/\.?0*Z$/, '+00:00')

const turn = (seconds: number, text: string, more: Partial<Turn> = {}): Said => ({
  type: 'turn',
  ts: at(seconds),
  speaker: 'agent',
  text,
  ...more,
})
const ended = (seconds: number, more: Omit<Said & { type: 'call.ended' }, 'type'> = {}): Said => ({
  type: 'call.ended',
  ts: at(seconds),
  ...more,
})

/** calltape's own, as reap.lua appends it: without a time. */
const presumed = (reason = 'abandoned'): Said => ({ type: 'call.ended', source: 'calltape', reason })

let database: Database
beforeAll(async () => {
  database = await freshDatabase()
})
afterAll(() => database.drop())

const partitions = new Partitions(64)
let calls = 0
/** Entry ids go on from here: later than all times in the events. */
let clock = Date.UTC(2026, 1, 1)

/** A call whose batches are written as a sink does it, without Redis between. */
class Call {
  readonly sid = `call-${calls++}`
  private cursor = '0-0'
  /** What Redis knows. */
  finalized = false

  async row(): Promise<Row> {
    const { rows } = await database.pool.query<Row>('SELECT * FROM call_sessions WHERE call_sid = $1', [this.sid])
    if (rows.length !== 1) throw new Error(`${rows.length} rows of call ${this.sid}`)
    return rows[0]!
  }

  /** One batch; its entries arrive a millisecond apart. */
  async store(...events: Said[]): Promise<this> {
    return this.storeAs(...events.map((event): [string, Said] => [`${clock++}-0`, event]))
  }

  /** One batch with entry ids of the test's own. */
  async storeAs(...entries: [id: string, event: Said][]): Promise<this> {
    const lease = {
      callSid: this.sid,
      partition: partitions.of(this.sid),
      deadline: 0,
      cursor: this.cursor,
      waiting: entries.length,
      counted: entries.length,
      read: -1,
      finalized: this.finalized,
      lapses: 0,
      oldestMs: 0,
      bytesAnEntry: 0,
      presumed: false,
    }
    const batch = emptyBatch(new EncodedTurns())
    const read = entries.map(([id, said]): Entry => [id, ['e', JSON.stringify({ ...said, call_sid: this.sid })]])
    decodeCall(lease, read, batch)
    expect(batch.quarantine).toEqual([])
    await writeBatch(database.pool, batch, 60_000)
    this.cursor = entries.at(-1)![0]
    this.finalized ||= batch.settlements[0]!.finalized
    return this
  }
}

const rowOf = async (...events: Said[]) => (await new Call().store(...events)).row()

const texts = (row: Row) => (row.full_transcript as { text: string }[]).map(({ text }) => text)

/** What does not depend on when events arrived. */
function lasting({ call_sid: _sid, finalized_at, ...row }: Row): Row {
  return { ...row, finalized: finalized_at !== null }
}

/** mulberry32: the same numbers at every run. */
function random(seed: number): () => number {
  let a = seed
  return () => {
    a = (a + 0x6d2b79f5) | 0
    let t = Math.imul(a ^ (a >>> 15), 1 | a)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
}

/** Everything that may be said of a call. With an id, so that the same thing said twice is known to be the same. */
const A_WHOLE_CALL: Said[] = [
  { type: 'call.status', ts: at(-2), status: 'queued', meta: { queue: 'a' } },
  {
    type: 'call.started',
    ts: at(0),
    direction: 'outbound',
    from: '+1',
    to: '+2',
    provider: 'exotel',
    meta: { who: 1 },
  },
  { type: 'call.started', ts: at(0.5), direction: 'inbound', from: '+3', to: '+4', provider: 'bot' },
  { type: 'call.status', ts: at(1), status: 'initiated' },
  { type: 'call.status', ts: at(2), status: 'ringing', meta: { ring: 'first' } },
  { type: 'call.connected', ts: at(3), source: 'ingest' },
  { type: 'call.status', ts: at(4), status: 'in-progress', meta: { ring: 'last' } },
  turn(5, 'Hello', { seq: 0 }),
  turn(6, 'Who is it?', { seq: 1, speaker: 'customer' }),
  turn(7, '(noise)', { id: 'noise', speaker: 'system' }),
  turn(8.5, 'The bank', { seq: 2 }),
  { type: 'call.data', ts: at(9), data: { name: 'Asha', due: 1 }, stage: 'greeting', objections: ['busy', 'price'] },
  {
    type: 'call.data',
    ts: at(10),
    data: { due: { rupees: 2 } },
    stage: 'offer',
    objections: ['price', 'trust', 'busy'],
  },
  turn(11, 'Bye', { seq: 3, speaker: 'customer' }),
  { type: 'call.disconnected', ts: at(12), source: 'ingest' },
  { type: 'call.status', ts: at(13), status: 'completed', duration_seconds: 9 },
  { type: 'call.status', ts: at(14), status: 'in-progress' },
  ended(15, { reason: 'abandoned', source: 'calltape' }),
  ended(12.5, { reason: 'hangup', outcome: 'promised', turn_count: 5, source: 'bot' }),
  { type: 'call.status', ts: at(60), recording_url: 'https://r/1', meta: { ring: 'very last' } },
  ended(12.6, { outcome: 'paid' }),
  { type: 'call.status', ts: at(50), recording_url: 'https://r/0', duration_seconds: 8 },
].map((said, i) => (said.type === 'turn' ? said : { ...said, id: `e${i}` }) as Said)

describe('the_same_row_whatever_the_order', () => {
  test('of_a_whole_call_in_any_order_any_number_of_times_and_in_any_batches', async () => {
    const expected = lasting(await rowOf(...A_WHOLE_CALL))
    expect(expected).toMatchObject({
      provider: 'exotel',
      direction: 'outbound',
      from_number: '+1',
      to_number: '+2',
      status: 'completed',
      outcome: 'paid',
      initiated_at: time(-2),
      answered_at: time(4),
      ended_at: time(12.5),
      duration_seconds: 8,
      recording_url: 'https://r/1',
      conversation_stage: 'offer',
      collected_data: { name: 'Asha', due: { rupees: 2 } },
      objections_encountered: ['busy', 'price', 'trust'],
      turn_count: 5,
      expected_turns: 5,
      complete: true,
      end_reason: 'hangup',
      meta: { queue: 'a', who: 1, ring: 'very last' },
      last_event_at: time(60),
      finalized: true,
    })
    for (let seed = 1; seed <= 30; seed++) {
      const next = random(seed)
      const events = [...A_WHOLE_CALL, ...A_WHOLE_CALL.filter(() => next() < 0.4)]
      const shuffled = events.map((event) => [next(), event] as const).sort(([a], [b]) => a - b)
      const call = new Call()
      for (let from = 0; from < shuffled.length; ) {
        const batch = shuffled.slice(from, from + 1 + Math.floor(next() * 8))
        await call.store(...batch.map(([, event]) => event))
        from += batch.length
      }
      expect(lasting(await call.row()), `seed ${seed}`).toEqual(expected)
    }
  })

  test('further_turns_of_a_live_call_move_when_it_was_last_heard_of_and_nothing_else', async () => {
    const call = await new Call().store({ type: 'call.started', ts: at(1), from: '+1' }, turn(2, 'one'))
    const before = await call.row()
    clock += 60_000
    await call.store(turn(70, 'two'))
    expect(await call.row()).toEqual({ ...before, last_event_at: time(70) })
    clock += 60_000
    await call.store(turn(3, 'belated'))
    expect(await call.row(), 'never back').toEqual({ ...before, last_event_at: time(70) })
  })

  test('a_live_call_whose_row_was_removed_has_all_of_it_again_with_its_next_turn', async () => {
    const call = await new Call().store({ type: 'call.started', ts: at(1), from: '+1' }, turn(2, 'one'))
    const before = await call.row()
    await database.pool.query('DELETE FROM call_sessions WHERE call_sid = $1', [call.sid])
    clock += 60_000
    await call.store(turn(70, 'two'))
    expect(await call.row()).toEqual({ ...before, last_event_at: time(70) })
  })

  test('of_a_live_call_in_any_order', async () => {
    const live = A_WHOLE_CALL.filter(({ type }) => type !== 'call.ended')
    const expected = lasting(await rowOf(...live))
    expect(expected).toMatchObject({ status: 'completed', initiated_at: time(-2), full_transcript: null })
    for (let seed = 1; seed <= 10; seed++) {
      const next = random(seed)
      const shuffled = live.map((event) => [next(), event] as const).sort(([a], [b]) => a - b)
      const call = new Call()
      for (const [, event] of shuffled) await call.store(event)
      // last_event_at of a live call may lag: see LAST_EVENT_GRAIN_MS.
      expect({ ...lasting(await call.row()), last_event_at: time(60) }, `seed ${seed}`).toEqual(expected)
    }
  })

  test('without_a_customers_turn_is_nothing_derived_where_the_transcript_is_incomplete', async () => {
    const expired = presumed('expired')
    const incomplete: Said = { type: 'call.data', meta: { transcript_incomplete: true } }
    expect((await rowOf(turn(1, 'Hello?'), expired)).outcome).toBe('no_answer')
    expect((await rowOf(turn(1, 'Hello?'), incomplete, expired)).outcome).toBeNull()
    expect((await rowOf(incomplete, expired)).outcome).toBeNull()
  })

  test('a_blank_outcome_hides_no_verdict', async () => {
    const row = await rowOf(ended(1, { id: 'a', outcome: 'qualified' }), ended(2, { id: 'b', outcome: ' \n' }))
    expect(row.outcome).toBe('qualified')
  })

  test('an_end_status_is_never_left_again', async () => {
    for (const end of ['completed', 'busy', 'failed', 'no-answer', 'canceled'] as const) {
      for (const other of ['queued', 'initiated', 'ringing', 'in-progress'] as const) {
        for (const [first, second] of [
          [end, other],
          [other, end],
        ] as const) {
          for (const seconds of [1, -1]) {
            const call = await new Call().store({ type: 'call.status', status: first, ts: at(0) })
            await call.store({ type: 'call.status', status: second, ts: at(seconds) })
            expect((await call.row()).status, `${first}, ${second} after ${seconds} s`).toBe(end)
          }
        }
      }
    }
  })

  test('of_two_end_statuses_the_earlier_one_counts_and_any_of_them_more_than_call_ended', async () => {
    const busy: Said = { type: 'call.status', status: 'busy', ts: at(5) }
    const completed: Said = { type: 'call.status', status: 'completed', ts: at(6) }
    for (const events of [
      [busy, completed, ended(4)],
      [ended(4), completed, busy],
    ]) {
      const call = new Call()
      for (const event of events) await call.store(event)
      expect((await call.row()).status).toBe('busy')
    }
  })

  test('of_the_statuses_before_the_end_the_furthest_counts', async () => {
    const statuses = ['in-progress', 'ringing', 'initiated', 'queued'] as const
    const call = new Call()
    const seen: unknown[] = []
    for (const [i, status] of [...statuses].reverse().entries()) {
      await call.store({ type: 'call.status', status, ts: at(-i) })
      seen.push((await call.row()).status)
    }
    expect(seen).toEqual(['queued', 'initiated', 'ringing', 'in-progress'])
    for (const status of statuses) await call.store({ type: 'call.status', status, ts: at(9) })
    expect((await call.row()).status).toBe('in-progress')
  })
})

describe('full_transcript', () => {
  test('holds_exactly_seq_speaker_text_and_timestamp_of_every_turn', async () => {
    const row = await rowOf(
      turn(0.25, 'नमस्ते 👋\n\t"\\', { seq: 0, speaker: 'agent', confidence: 0.5, language: 'hi', meta: { a: 1 } }),
      turn(1, '', { speaker: 'customer', started_at: at(1), ended_at: at(2), interrupted: true }),
      ended(2),
    )
    expect(row.full_transcript).toEqual([
      { seq: 0, speaker: 'agent', text: 'नमस्ते 👋\n\t"\\', timestamp: stamp(0.25) },
      { seq: null, speaker: 'customer', text: '', timestamp: stamp(1) },
    ])
  })

  test('is_in_order_of_seq_whenever_the_turns_were_spoken', async () => {
    const row = await rowOf(turn(3, 'b', { seq: 2 }), turn(1, 'c', { seq: 10 }), turn(2, 'a', { seq: 0 }), ended(9))
    expect(texts(row)).toEqual(['a', 'b', 'c'])
  })

  test('is_in_order_of_time_without_seq', async () => {
    expect(texts(await rowOf(turn(3, 'c'), turn(1.001, 'b'), turn(1, 'a'), ended(9)))).toEqual(['a', 'b', 'c'])
  })

  test('puts_a_turn_without_seq_behind_the_last_numbered_one_spoken_before_it', async () => {
    const row = await rowOf(
      turn(5, 'after 1'),
      turn(2, 'zero', { seq: 0 }),
      turn(1, 'before all'),
      turn(3, 'one', { seq: 1 }),
      turn(6, 'after 1, too'),
      turn(4, 'two', { seq: 2 }), // spoken before 5 and 6: they go behind it
      ended(9),
    )
    expect(texts(row)).toEqual(['before all', 'zero', 'one', 'two', 'after 1', 'after 1, too'])
  })

  test('breaks_ties_by_stream_entry_as_a_number', async () => {
    const call = new Call()
    const ids = ['1767268800000-9', '1767268800000-10', '1767268800000-100', '1767268800001-0', '1767268800001-2']
    await call.storeAs(...ids.map((id): [string, Said] => [id, turn(1, id)]), ['1767268800002-0', ended(2)])
    expect(texts(await call.row())).toEqual(ids)
  })

  test('of_a_call_without_turns_is_empty', async () => {
    expect(await rowOf(ended(1))).toMatchObject({ full_transcript: [], turn_count: 0 })
  })

  test('and_all_that_finalizing_gives_is_null_while_the_call_is_live', async () => {
    const row = await rowOf({ type: 'call.started', ts: at(0) }, turn(1, 'a', { seq: 0 }))
    expect(row).toMatchObject({
      status: 'initiated',
      full_transcript: null,
      turn_count: null,
      complete: null,
      ended_at: null,
      duration_seconds: null,
      end_reason: null,
      finalized_at: null,
    })
  })
})

describe('complete', () => {
  const cases: [claim: string, turns: Said[], end: Parameters<typeof ended>[1], complete: boolean | null][] = [
    ['as_many_turns_as_were_sent', [turn(1, 'a'), turn(2, 'b')], { turn_count: 2 }, true],
    [
      'as_many_numbered_turns_as_were_sent',
      [turn(1, 'a', { seq: 1 }), turn(2, 'b', { seq: 0 })],
      { turn_count: 2 },
      true,
    ],
    ['fewer_turns_than_were_sent', [turn(1, 'a'), turn(2, 'b')], { turn_count: 3 }, false],
    ['none_of_the_turns_that_were_sent', [], { turn_count: 1 }, false],
    ['more_turns_than_were_sent_prove_nothing', [turn(1, 'a'), turn(2, 'b')], { turn_count: 1 }, null],
    ['a_gap_in_seq', [turn(1, 'a', { seq: 0 }), turn(2, 'b', { seq: 2 })], {}, false],
    ['the_first_seq_missing', [turn(1, 'a', { seq: 1 })], {}, false],
    [
      'a_gap_in_seq_under_two_turns_of_the_same_seq',
      [turn(1, 'a', { seq: 0 }), turn(2, 'b', { seq: 2 }), turn(2, 'c', { seq: 2, id: 'c' })],
      { turn_count: 3 },
      false,
    ],
    [
      'all_seqs_prove_nothing_for_the_last_may_be_missing',
      [turn(1, 'a', { seq: 0 }), turn(2, 'b', { seq: 1 })],
      {},
      null,
    ],
    ['a_gap_in_seq_is_none_if_turns_without_seq_may_fill_it', [turn(1, 'a', { seq: 1 }), turn(2, 'b')], {}, null],
    ['no_word_and_no_numbers_prove_nothing', [turn(1, 'a')], {}, null],
    ['no_turns_and_no_word_prove_nothing', [], {}, null],
    ['no_turns_and_none_sent', [], { turn_count: 0 }, true],
  ]
  test.each(cases)('%s', async (_claim, turns, end, complete) => {
    const row = await rowOf(...turns, ended(9, end))
    expect(row).toMatchObject({ complete, turn_count: turns.length, expected_turns: end?.turn_count ?? null })
  })
})

/** What a provider says of its transcription, all of whose messages it numbers. */
const marked = (seconds: number, sequence: object): Said => ({ type: 'call.data', ts: at(seconds), meta: { sequence } })
const begins = (of: string, dense = true) => marked(0, { of, at: 1, starts: true, dense })
const ends = (seconds: number, of: string, n: number) => marked(seconds, { of, at: n, ends: true })
const transcribed = (seconds: number, of: string, n: number) => turn(seconds, `${of}${n}`, { id: `${of}-${n}`, seq: n })

describe('sequences', () => {
  const cases: [claim: string, events: Said[], end: Parameters<typeof ended>[1], complete: boolean | null][] = [
    ['whole', [begins('S'), transcribed(2, 'S', 2), transcribed(3, 'S', 3), ends(4, 'S', 4)], {}, true],
    ['a_number_missing', [begins('S'), transcribed(3, 'S', 3), ends(4, 'S', 4)], {}, false],
    ['not_dense', [begins('S', false), transcribed(3, 'S', 3), ends(4, 'S', 4)], {}, null],
    ['its_end_unknown', [begins('S'), transcribed(3, 'S', 3)], {}, null],
    ['a_turn_of_another_origin', [begins('S'), ends(4, 'S', 2), turn(1, 'of the bot')], {}, null],
    ['two_of_them', [begins('S'), ends(4, 'S', 2), begins('T'), transcribed(5, 'T', 2), ends(6, 'T', 3)], {}, null],
    ['turn_count_decides_first', [begins('S'), transcribed(3, 'S', 3), ends(4, 'S', 4)], { turn_count: 1 }, true],
    ['turn_count_decides_first', [begins('S'), transcribed(2, 'S', 2), ends(4, 'S', 3)], { turn_count: 2 }, false],
  ]
  test.each(cases)('make_gaps_between_turns_no_gaps: %s', async (_claim, events, end, complete) => {
    expect(await rowOf(...events, ended(9, end))).toMatchObject({ complete })
  })

  test('a_late_number_makes_it_whole', async () => {
    const call = await new Call().store(ends(4, 'S', 4), transcribed(3, 'S', 3), begins('S'), ended(9))
    expect(await call.row()).toMatchObject({ complete: false })
    await call.store(transcribed(2, 'S', 2))
    expect(await call.row()).toMatchObject({ complete: true, turn_count: 2 })
  })

  test('one_alone_is_in_order_of_its_numbers_and_several_in_order_of_time', async () => {
    const first = [begins('S'), transcribed(6, 'S', 2), transcribed(5, 'S', 3)]
    expect(texts(await rowOf(...first, ended(9)))).toEqual(['S2', 'S3'])
    const again = [begins('T'), transcribed(7, 'T', 2), transcribed(8, 'T', 3), turn(5.5, 'unnumbered')]
    expect(texts(await rowOf(...again, ...first, ended(9)))).toEqual(['S3', 'unnumbered', 'S2', 'T2', 'T3'])
  })

  test.each<[string, unknown]>(
    [1, 'of', null, true, [], [{ of: 'S' }], {}, { of: 1 }, { of: null, at: 1 }, { at: 1, starts: true }].map(
      (garbage) => [JSON.stringify(garbage), garbage],
    ),
  )('what_reads_otherwise_in_meta_is_nobody_s_sequence: %s', async (_json, sequence) => {
    expect(await rowOf(marked(1, sequence as object), turn(1, 'a', { seq: 1 }), ended(9))).toMatchObject({
      complete: false,
    })
  })
})

describe('outcome', () => {
  const answer: Said = { type: 'call.status', status: 'in-progress', ts: at(0) }
  const status = (status: 'completed' | 'busy' | 'failed' | 'canceled'): Said => ({
    type: 'call.status',
    status,
    ts: at(8),
  })
  const hello = turn(1, 'Hello?')
  const reply = turn(2, 'Yes?', { speaker: 'customer' })
  const cases: [claim: string, events: Said[], outcome: string | null][] = [
    ["the_bot's_verdict_wins", [hello, status('failed'), ended(9, { outcome: 'sold' })], 'sold'],
    ['busy', [status('busy'), ended(9)], 'no_answer'],
    ['failed', [hello, reply, status('failed'), ended(9)], 'error'],
    ['the_reason_tells', [hello, reply, ended(9, { reason: 'pipeline-error-x' })], 'error'],
    ['nobody_was_heard', [answer, hello, ended(9)], 'no_answer'],
    [
      'nobody_was_heard_though_there_is_a_turn',
      [hello, turn(2, ' \t\r\n', { speaker: 'customer' }), ended(9)],
      'no_answer',
    ],
    ['a_noise_is_nobody', [hello, turn(2, '(noise)', { speaker: 'system' }), ended(9)], 'no_answer'],
    ['anybody_else_is_a_customer', [hello, turn(2, '  Da', { speaker: 'Frau Müller' }), ended(9)], null],
    ['a_call_that_nobody_took', [{ type: 'call.started', ts: at(0) }, ended(9)], 'no_answer'],
    ['a_call_without_a_transcript', [answer, ended(9)], null],
    ['a_call_without_a_transcript_that_was_completed', [status('completed'), ended(9)], null],
    ['lost_before_anybody_was_heard', [answer, hello, presumed('disconnected')], 'no_answer'],
    ['lost_mid_way', [hello, reply, presumed('disconnected')], 'disconnected'],
    ['silent_mid_way', [hello, reply, presumed('abandoned')], 'disconnected'],
    ['expired', [hello, reply, presumed('expired')], null],
    ['expired_before_anybody_was_heard', [hello, presumed('expired')], 'no_answer'],
    ['the_usual_end', [answer, hello, reply, status('completed'), ended(9, { reason: 'hangup' })], null],
  ]
  test.each(cases)('%s', async (_claim, events, outcome) => {
    expect(await rowOf(...events)).toMatchObject({ outcome, finalized_at: expect.any(Date) })
  })

  test("of_a_live_call_is_only_the_bot's_verdict", async () => {
    expect((await rowOf(hello, status('busy'))).outcome).toBe(null)
    expect((await rowOf(hello, presumed(), reply)).outcome).toBe(null)
    const call = await new Call().store(
      hello,
      ended(3, { source: 'calltape', reason: 'abandoned', outcome: 'sold' }),
      reply,
    )
    expect(await call.row()).toMatchObject({ outcome: 'sold', finalized_at: null })
  })

  test('is_judged_again_when_something_comes_late', async () => {
    const call = await new Call().store(hello, ended(9))
    const seen = [(await call.row()).outcome]
    for (const late of [reply, status('failed'), ended(9.5, { outcome: 'callback' })]) {
      await call.store(late)
      seen.push((await call.row()).outcome)
    }
    expect(seen).toEqual(['no_answer', null, 'error', 'callback'])
  })
})

describe('columns', () => {
  test('whatever_comes_first_makes_the_row', async () => {
    const first: Said[] = [
      { type: 'call.started', ts: at(1) },
      { type: 'call.status', ts: at(1), status: 'ringing' },
      turn(1, 'a'),
      { type: 'call.data', ts: at(1), data: {} },
      ended(1),
      { type: 'call.connected', ts: at(1) },
    ]
    for (const event of first) {
      expect(await rowOf(event), event.type).toMatchObject({ initiated_at: time(1), last_event_at: time(1) })
    }
  })

  test('initiated_at_is_the_earliest_that_is_known_of_the_call_whatever_came_first', async () => {
    const events: Said[] = [
      turn(1, 'a'),
      { type: 'call.started', ts: at(3) },
      { type: 'call.status', ts: at(2), status: 'queued' },
    ]
    const call = new Call()
    for (const event of events) await call.store(event)
    expect(await call.row()).toMatchObject({ initiated_at: time(1) })
    await call.store(ended(5))
    expect(await call.row()).toMatchObject({ initiated_at: time(1) })
    expect(await rowOf(...events.slice(1), presumed())).toMatchObject({ initiated_at: time(2) })
  })

  test('call_ended_as_the_first_event_finalizes_and_what_comes_later_completes_the_row', async () => {
    const call = await new Call().store(ended(10, { reason: 'hangup', turn_count: 1 }))
    expect(await call.row()).toMatchObject({ status: 'completed', turn_count: 0, complete: false, duration_seconds: 0 })
    await call.store(turn(2, 'late'))
    expect(await call.row()).toMatchObject({
      initiated_at: time(2),
      turn_count: 1,
      complete: true,
      duration_seconds: 8,
    })
    await call.store({ type: 'call.started', ts: at(0), from: '+1' })
    expect(await call.row()).toMatchObject({
      from_number: '+1',
      turn_count: 1,
      complete: true,
      initiated_at: time(0),
      duration_seconds: 10,
    })
  })

  test('duration_is_what_was_said_last_else_computed_from_the_answer_else_from_the_start', async () => {
    const start: Said = { type: 'call.started', ts: at(0) }
    const answer: Said = { type: 'call.status', status: 'in-progress', ts: at(7) }
    const said = (seconds: number, ts: number): Said => ({ type: 'call.status', duration_seconds: seconds, ts: at(ts) })
    expect(await rowOf(start, ended(20.4))).toMatchObject({ duration_seconds: 20, ended_at: time(20.4) })
    expect(await rowOf(start, answer, ended(20.6))).toMatchObject({ duration_seconds: 14, answered_at: time(7) })
    expect((await rowOf(start, answer, said(5, 30), said(4, 29), ended(20))).duration_seconds).toBe(5)
    expect((await rowOf(start, answer, ended(20, { duration_seconds: 3 }))).duration_seconds).toBe(3)
    // An end that lies before the start by the producers' clocks.
    expect((await rowOf(start, ended(-3))).duration_seconds).toBe(0)
  })

  test('a_computed_duration_too_long_for_its_column_is_as_long_as_fits', async () => {
    const row = await rowOf(
      { type: 'call.started', ts: 0 },
      { type: 'call.ended', ts: Date.UTC(9999, 11, 31, 23, 59, 59, 999) },
    )
    expect(row).toMatchObject({ initiated_at: new Date(0), duration_seconds: 2 ** 31 - 1 })
  })

  test('ended_at_is_the_end_that_was_reported_else_the_end_status_else_the_disconnect_else_the_last_event', async () => {
    const status: Said = { type: 'call.status', status: 'completed', ts: at(8) }
    const lost: Said = { type: 'call.disconnected', connection: 'c', ts: at(7) }
    const link: Said = { type: 'call.connected', connection: 'c', ts: at(0) }
    const url: Said = { type: 'call.status', recording_url: 'https://r', ts: at(60) }
    expect((await rowOf(turn(1, 'a'), status, lost, ended(9), ended(9.5), presumed(), url)).ended_at).toEqual(time(9))
    expect((await rowOf(turn(1, 'a'), status, lost, presumed(), url)).ended_at).toEqual(time(8))
    expect((await rowOf(link, turn(1, 'a'), lost, presumed(), url)).ended_at).toEqual(time(7))
    expect((await rowOf(turn(1, 'a'), turn(6, 'b'), presumed())).ended_at).toEqual(time(6))
    expect((await rowOf(status)).ended_at).toEqual(time(8)) // its row is not final yet
  })

  test('a_disconnect_that_was_followed_by_more_is_not_the_end', async () => {
    const up = (connection: string, seconds: number): Said => ({ type: 'call.connected', connection, ts: at(seconds) })
    const down = (connection: string, seconds: number): Said => ({
      ...up(connection, seconds),
      type: 'call.disconnected',
    })
    const first = [up('c', 0), turn(1, 'a'), down('c', 2)]
    const back = [...first, up('d', 3), turn(4, 'b')]
    // A half-open connection's end, noticed when the call was back for long.
    const half = [up('c', 0), turn(1, 'a'), up('d', 2), turn(4, 'b'), down('c', 5), turn(6, 'c')]
    expect(await rowOf(...half, presumed())).toMatchObject({ ended_at: time(6), duration_seconds: 6 })
    expect(await rowOf(...half, down('d', 9), presumed())).toMatchObject({ ended_at: time(9), duration_seconds: 9 })
    expect(await rowOf(...back, presumed())).toMatchObject({ ended_at: time(4), duration_seconds: 4 })
    const said = await rowOf(...back, { type: 'call.data', ts: at(6), stage: 'offer' }, presumed())
    expect(said).toMatchObject({ ended_at: time(6), duration_seconds: 6 })
    const byAnotherWay = await rowOf(...first, turn(5, 'c'), presumed())
    expect(byAnotherWay).toMatchObject({ ended_at: time(5), duration_seconds: 5 })
  })

  test('presumed_over_is_not_heard_of', async () => {
    const row = await rowOf({ type: 'call.started', ts: at(0) }, turn(3, 'a'), presumed('abandoned'))
    expect(row).toMatchObject({
      end_reason: 'abandoned',
      ended_at: time(3),
      last_event_at: time(3),
      duration_seconds: 3,
    })
  })

  test('the_real_end_wins_over_the_presumed_one_before_and_after', async () => {
    for (const order of [[0, 1] as const, [1, 0] as const]) {
      const ends = [presumed(), ended(8, { reason: 'hangup', outcome: 'sold', turn_count: 1 })]
      const call = await new Call().store(turn(1, 'a'))
      for (const i of order) await call.store(ends[i]!)
      expect(await call.row()).toMatchObject({
        end_reason: 'hangup',
        outcome: 'sold',
        complete: true,
        ended_at: time(8),
      })
    }
  })

  test('a_call_that_goes_on_after_it_was_presumed_over_is_live_again', async () => {
    const live = { finalized_at: null, full_transcript: null, complete: null, end_reason: null, status: 'in-progress' }
    const goesOn: Said[] = [turn(9, 'b'), { type: 'call.connected', connection: 'c', ts: at(9) }]
    for (const next of goesOn) {
      const call = await new Call().store(turn(1, 'a'), presumed())
      expect(await call.row()).toMatchObject({ end_reason: 'abandoned', finalized_at: expect.any(Date) })
      call.finalized = false // as append.lua has it then
      clock += 10_000 // a live row is this old at most
      await call.store(next)
      expect(await call.row()).toMatchObject(live)
      for (const reason of ['disconnected', 'expired']) {
        await call.store(presumed(reason))
        expect(await call.row()).toMatchObject({ end_reason: reason, finalized_at: expect.any(Date) })
        clock += 10_000
        await call.store({ ...next, id: reason, ts: at(9) })
        expect(await call.row()).toMatchObject(live)
      }
      expect(await rowOf(turn(1, 'a'), presumed(), next)).toMatchObject(live) // in one batch, too
    }
  })

  test.each<[string, Said]>([
    ['a recording', { type: 'call.status', recording_url: 'https://r', ts: at(9) }],
    ['data', { type: 'call.data', stage: 'offer', ts: at(9) }],
    ['an end status', { type: 'call.status', status: 'busy', ts: at(9) }],
    ['a disconnect', { type: 'call.disconnected', connection: 'c', ts: at(9) }],
  ])('what_only_adds_to_a_call_does_not_bring_it_back: %s', async (_what, late) => {
    const call = await new Call().store(turn(1, 'a'), presumed())
    await call.store(late)
    expect(await call.row()).toMatchObject({ end_reason: 'abandoned', finalized_at: expect.any(Date) })
  })

  test('an_end_that_somebody_said_stays_whatever_comes_late', async () => {
    for (const end of [ended(5), presumed('completed')]) {
      const call = await new Call().store(turn(1, 'a'), end)
      await call.store(turn(9, 'b'))
      expect(await call.row()).toMatchObject({ turn_count: 2, finalized_at: expect.any(Date) })
    }
  })

  test('collected_data_and_meta_are_merged_key_by_key_in_order_of_time', async () => {
    const data = (seconds: number, given: object): Said => ({ type: 'call.data', ts: at(seconds), data: { ...given } })
    const row = await rowOf(
      data(3, { a: 3, n: null, deep: { z: 1 } }),
      data(1, { a: 1, b: 1, deep: { y: 1 } }),
      { type: 'call.data', ts: at(4), meta: { x: 'last', only: 1 } },
      { type: 'call.started', ts: at(0), meta: { x: 'first', kept: [1] } },
    )
    expect(row.collected_data).toEqual({ a: 3, b: 1, n: null, deep: { z: 1 } })
    expect(row.meta).toEqual({ x: 'last', only: 1, kept: [1] })
  })

  test('events_of_the_same_time_are_taken_in_order_of_their_entries', async () => {
    const call = new Call()
    const ids = ['1767268800000-9', '1767268800000-10', '1767268800001-0', '1767268800001-1']
    await call.storeAs(
      ...ids.map((id, i): [string, Said] => [
        id,
        { type: 'call.data', ts: at(1), data: { i }, stage: id, objections: [`${9 - i}`], meta: { i } },
      ]),
    )
    expect(await call.row()).toMatchObject({
      collected_data: { i: 3 },
      meta: { i: 3 },
      conversation_stage: ids.at(-1),
      objections_encountered: ['9', '8', '7', '6'],
    })
  })

  test('objections_are_distinct_in_the_order_in_which_they_first_came', async () => {
    const objects = (seconds: number, ...objections: string[]): Said => ({
      type: 'call.data',
      ts: at(seconds),
      objections,
    })
    const row = await rowOf(objects(2, 'c', 'b', 'd'), objects(1, 'z', 'b', 'a'), objects(3, 'a', 'z', ''))
    expect(row.objections_encountered).toEqual(['z', 'b', 'a', 'c', 'd', ''])
  })

  test('what_nobody_said_is_null', async () => {
    expect(await rowOf(turn(1, 'a'))).toMatchObject({
      provider: null,
      direction: null,
      from_number: null,
      to_number: null,
      status: 'in-progress',
      outcome: null,
      answered_at: null,
      recording_url: null,
      conversation_stage: null,
      collected_data: null,
      objections_encountered: null,
      expected_turns: null,
      end_reason: null,
      meta: null,
    })
  })

  test('an_unknown_status_is_kept_in_meta_and_is_no_status', async () => {
    const unknown = { type: 'call.status', ts: at(1), status: 'exploded' } as unknown as Said
    expect(await rowOf(unknown)).toMatchObject({ status: 'in-progress', meta: { status: 'exploded' } })
  })
})

describe('refinalizing', () => {
  test('a_late_turn_and_a_late_recording_are_added', async () => {
    const call = await new Call().store(turn(1, 'a', { seq: 0 }), ended(3, { turn_count: 2 }))
    const before = await call.row()
    expect(before).toMatchObject({ complete: false, turn_count: 1, recording_url: null })
    await call.store(turn(2, 'b', { seq: 1 }))
    await call.store({ type: 'call.status', recording_url: 'https://r/1', ts: at(90) })
    const after = await call.row()
    expect(after).toMatchObject({ complete: true, turn_count: 2, recording_url: 'https://r/1', ended_at: time(3) })
    expect(texts(after)).toEqual(['a', 'b'])
    expect((after.finalized_at as Date).getTime()).toBeGreaterThanOrEqual((before.finalized_at as Date).getTime())
  })

  test('happens_although_Redis_has_forgotten_that_the_call_ended', async () => {
    const call = await new Call().store(turn(1, 'a'), ended(3))
    call.finalized = false
    await call.store({ type: 'call.status', recording_url: 'https://r/1', ts: at(90) })
    expect(await call.row()).toMatchObject({
      finalized_at: expect.any(Date),
      turn_count: 1,
      recording_url: 'https://r/1',
    })
  })

  test('with_nothing_new_changes_nothing', async () => {
    const version = async (call: Call) =>
      (await database.pool.query('SELECT xmin::text, ctid::text FROM call_sessions WHERE call_sid = $1', [call.sid]))
        .rows
    const events = A_WHOLE_CALL.map((event, i) => ({ ...event, id: `e${i}` }))
    const call = await new Call().store(...events)
    const first = await version(call)
    await call.store(...events)
    await call.store(events.at(-1)!)
    await call.store(events.find(({ type }) => type === 'turn')!)
    const { ts: _, ...again } = events.find(({ type }) => type === 'turn')!
    await call.store(again) // then it seems to have happened when it came
    expect(await version(call)).toEqual(first)
    await call.store({ type: 'call.data', ts: at(61), stage: 'after' })
    expect(await version(call)).not.toEqual(first)

    const data: Said = { type: 'call.data', id: 'old', ts: at(1), stage: 'a' }
    const live = await new Call().store(turn(50, 'a'), data)
    const second = await version(live)
    await live.store(data)
    expect(await version(live)).toEqual(second)
  })
})

describe('plans', () => {
  const CALLS = 2000
  const TURNS = 60

  test('read_only_the_calls_of_the_batch_by_primary_key', async () => {
    const { pool } = database
    await pool.query(`
      INSERT INTO call_transcript_turns (call_sid, turn_id, seq, speaker, text, spoken_at, stream_id, ingested_at)
      SELECT 'many-' || c, t, t, 'agent', 'text', now(), '1-' || t, now()
      FROM generate_series(1, ${CALLS}) c, generate_series(1, ${TURNS}) t`)
    await pool.query(`
      INSERT INTO call_events (call_sid, event_id, type, occurred_at, event, stream_id, ingested_at)
      SELECT 'many-' || c, e, 'call.data', now(), '{"data": {"a": 1}}', '1-' || e, now()
      FROM generate_series(1, ${CALLS}) c, generate_series(1, 10) e`)
    const client = await pool.connect()
    try {
      await client.query(`PREPARE explained AS ${readPackageFile('sink/fold.sql')}`)
      for (const statistics of ['missing', 'fresh']) {
        if (statistics === 'fresh') await client.query('ANALYZE call_transcript_turns, call_events')
        for (const mode of ['force_custom_plan', 'force_generic_plan']) {
          await client.query(`SET plan_cache_mode = ${mode}`)
          for (const calls of [1, 20, 500]) {
            const fill = (value: string) => `'{${Array(calls).fill(value).join()}}'`
            const sids = `'{${Array.from({ length: calls }, (_, i) => `many-${i + 1}`).join()}}'`
            const call = `EXECUTE explained(${sids}, ${fill('now')}, ${fill('now')})`
            const { rows } = await client.query<{ 'QUERY PLAN': string }>(`EXPLAIN ${call}`)
            const plan = rows.map((row) => row['QUERY PLAN']).join('\n')
            const claim = `${statistics} statistics, ${mode}, ${calls} calls\n${plan}`
            expect(plan, claim).not.toContain('Seq Scan')
            expect(plan, claim).toContain('One-Time Filter') // by which the turns of live calls are left alone
            for (const table of ['call_events', 'call_transcript_turns']) {
              expect(plan, claim).toMatch(new RegExp(`(using|on) ${table}_pkey`))
            }
          }
        }
      }
    } finally {
      client.release(true)
    }
  })
})

describe('calls_that_nobody_ends', () => {
  let stack: TestStack
  afterEach(() => stack.end())

  const sessionOf = async (sid: string): Promise<Row | undefined> =>
    (await stack.database.pool.query<Row>('SELECT * FROM call_sessions WHERE call_sid = $1', [sid])).rows[0]
  const finalized = (sid: string) =>
    until(`${sid} is finalized`, async () => {
      const row = await sessionOf(sid)
      return row?.finalized_at ? row : undefined
    })
  const lastTurnAt = async (sid: string) =>
    (
      await stack.database.pool.query('SELECT max(spoken_at) AS at FROM call_transcript_turns WHERE call_sid = $1', [
        sid,
      ])
    ).rows[0].at

  /** A connection bound to the call. */
  async function bind(sid: string): Promise<WebSocket> {
    const socket = new WebSocket(`${stack.wsUrl}/v1/stream?call_sid=${sid}`)
    await once(socket, 'message')
    return socket
  }

  test('a_bound_connection_that_is_gone_finalizes_after_the_grace_and_one_that_resumes_does_not', async () => {
    stack = await startTestStack({ DISCONNECT_GRACE: '1' })
    const [gone, resumed] = [await bind('gone'), await bind('resumed')]
    for (const socket of [gone, resumed]) socket.send('{"type":"turn","speaker":"agent","text":"a"}')
    for (const sid of ['gone', 'resumed']) await until(`the turn of ${sid} is stored`, () => lastTurnAt(sid))
    gone.terminate()
    resumed.terminate()
    const back = await bind('resumed')
    const row = await finalized('gone')
    const lost = Number((row.ended_at as Date).getTime())
    expect(row).toMatchObject({
      end_reason: 'disconnected',
      status: 'completed',
      turn_count: 1,
      last_event_at: row.ended_at,
    })
    expect((row.finalized_at as Date).getTime()).toBeGreaterThanOrEqual(lost + 1000)
    await sleep(500)
    expect(await sessionOf('resumed')).toMatchObject({ finalized_at: null, ended_at: null })

    // Back after all, and then really ended: that is what counts.
    const late = await bind('gone')
    late.send(`[{"type":"turn","speaker":"agent","text":"b"},{"type":"call.ended","reason":"hangup","turn_count":2}]`)
    const real = await until('the real end counts', async () => {
      const found = await sessionOf('gone')
      return found?.end_reason === 'hangup' && found
    })
    expect(real).toMatchObject({ complete: true, turn_count: 2 })
    expect((real.ended_at as Date).getTime()).toBeGreaterThan(lost)
    back.terminate()
    late.terminate()
  })

  test('an_idle_call_is_finalized_as_abandoned_and_ended_when_it_was_last_heard_of', async () => {
    stack = await startTestStack({ IDLE_TIMEOUT: '1' })
    const socket = await bind('idle')
    socket.send('[{"type":"call.started","from":"+1"},{"type":"turn","speaker":"agent","text":"a"}]')
    await sleep(600)
    socket.send('{"type":"turn","speaker":"agent","text":"b"}') // alive: the time begins anew
    const row = await finalized('idle')
    const last = await lastTurnAt('idle')
    expect(row).toMatchObject({ end_reason: 'abandoned', turn_count: 2, ended_at: last, last_event_at: last })
    expect((row.finalized_at as Date).getTime()).toBeGreaterThanOrEqual(last.getTime() + 1000)
    socket.send('{"type":"call.ended","reason":"hangup"}')
    await until('the real end counts', async () => (await sessionOf('idle'))?.end_reason === 'hangup')
    socket.terminate()
  })

  test('a_call_whose_producer_presumes_it_over_is_finalized_and_live_again_when_it_goes_on', async () => {
    stack = await startTestStack()
    const producer = new Producer(stack.redis)
    const said = (text: string): CallEvent => ({ type: 'turn', call_sid: 'bot', speaker: 'agent', text })
    const expired: CallEvent = { type: 'call.ended', call_sid: 'bot', source: 'calltape', reason: 'expired' }
    await producer.store(said('a'), expired)
    expect(await finalized('bot')).toMatchObject({ end_reason: 'expired', outcome: 'no_answer', turn_count: 1 })
    await producer.store(expired, said('b'))
    await until('it is live', async () => (await sessionOf('bot'))?.finalized_at === null)
    await producer.store(said('c'), expired)
    expect(await finalized('bot')).toMatchObject({ end_reason: 'expired', turn_count: 3 })
  })

  test('a_call_with_an_end_status_is_finalized_with_it_when_no_call_ended_follows', async () => {
    stack = await startTestStack({ DISCONNECT_GRACE: '1' })
    const socket = new WebSocket(`${stack.wsUrl}/v1/stream`)
    await once(socket, 'message')
    socket.send('{"type":"call.status","call_sid":"busy","status":"busy","ts":1767268800000}')
    const row = await finalized('busy')
    expect(row).toMatchObject({ end_reason: 'busy', status: 'busy', turn_count: 0, ended_at: new Date(1767268800000) })
    socket.terminate()
  })
})
