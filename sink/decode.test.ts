import { describe, expect, test } from 'vitest'
import { Partitions } from '../shared/keys.js'
import { type Batch, decodeCall, type Entry, emptyBatch, entryMs, type TurnRow } from './decode.js'
import type { Lease } from './lease.js'

const SID = 'call'
const partition = new Partitions(64).of(SID)
const T = 1_767_268_800_000

const lease = (more: Partial<Lease> = {}): Lease => ({
  callSid: SID,
  partition,
  deadline: 1,
  cursor: '0-0',
  waiting: 0,
  counted: 0,
  read: 0,
  finalized: false,
  lapses: 0,
  oldestMs: 0,
  bytesAnEntry: 0,
  presumed: false,
  ...more,
})

const entry = (event: object, id = `${T}-0`): Entry => [id, ['e', JSON.stringify({ call_sid: SID, ...event })]]
const turn = { type: 'turn', speaker: 'agent', text: 'text' }

function decode(entries: Entry[], more: Partial<Lease> = {}): Batch<TurnRow[]> {
  const batch = emptyBatch<TurnRow[]>([])
  decodeCall(lease(more), entries, batch)
  return batch
}

describe('keys', () => {
  test('a_turn_is_known_by_its_id_else_its_seq_else_its_entry', () => {
    const { turns } = decode([
      entry({ ...turn, id: 'id', seq: 5 }),
      entry({ ...turn, seq: 5 }),
      entry({ ...turn, seq: 0 }),
      entry(turn, `${T}-77`),
    ])
    expect(turns.map((row) => row.turnId)).toEqual(['id', '5', '0', `${T}-77`])
  })

  test('another_event_is_known_by_its_id_else_its_entry', () => {
    const { events } = decode([
      entry({ type: 'call.started', id: 'id' }),
      entry({ type: 'call.data', seq: 5 }, `${T}-7`),
    ])
    expect(events.map((row) => row.eventId)).toEqual(['call.started id', `${T}-7`])
  })
})

describe('rows', () => {
  test('are_in_the_order_of_the_entries', () => {
    const { turns, events } = decode(
      [3, 1, 2].flatMap((n) => [entry({ ...turn, seq: n }), entry({ type: 'call.data', id: `${n}` })]),
    )
    expect(turns.map((row) => row.turn.seq)).toEqual([3, 1, 2])
    expect(events.map((row) => row.eventId)).toEqual(['call.data 3', 'call.data 1', 'call.data 2'])
  })

  test('an_event_happened_at_its_ts_else_when_it_arrived', () => {
    const { events } = decode([entry({ type: 'call.data', ts: 5 }), entry({ type: 'call.data' }, `${T + 1}-0`)])
    expect(events.map((row) => row.occurredMs)).toEqual([5, T + 1])
  })

  test('are_normalised_as_by_ingest', () => {
    const { turns, events } = decode([
      entry({ ...turn, speaker: 'BOT', ts: '2026-01-01T12:00:00.5+00:00', seq: null, extra: 1 }),
      entry({ type: 'call.status', status: 'no_answer' }),
      entry({ type: 'call.connected', call_sid: undefined }),
    ])
    expect(turns[0]).toMatchObject({ turn: { speaker: 'agent', ts: T + 500 }, meta: '{"extra":1}', turnId: `${T}-0` })
    expect(events.map((row) => JSON.parse(row.event))).toEqual([
      { type: 'call.status', call_sid: SID, status: 'no-answer' },
      { type: 'call.connected', call_sid: SID },
    ])
  })

  test('a_turn_without_meta_has_null', () => {
    expect(decode([entry(turn)]).turns[0]!.meta).toBe(null)
  })
})

describe('what_PostgreSQL_cannot_hold', () => {
  const original = (meta: string | null) =>
    JSON.parse((JSON.parse(meta!) as { calltape_original: string }).calltape_original)

  test.each([
    ['text', { text: 'a\0\ud800b' }, { text: 'a\ufffd\ufffdb' }],
    ['speaker', { speaker: '\udfff' }, { speaker: '\ufffd' }],
    ['language', { language: '\0' }, { language: '\ufffd' }],
  ])('in_%s_is_replaced_and_flagged_and_kept', (_name, given, stored) => {
    const [row] = decode([entry({ ...turn, ...given, meta: { kept: 1 } })]).turns
    expect(row!.turn).toMatchObject(stored)
    expect(JSON.parse(row!.meta!)).toMatchObject({ kept: 1, calltape_replaced: true })
    expect(original(row!.meta)).toEqual({ text: 'text', speaker: 'agent', meta: { kept: 1 }, ...given })
  })

  test('in_meta_is_replaced_in_names_and_values_at_any_depth', () => {
    const meta = { a: [{ 'k\0': '\ud83d' }], 'x\udc00': 1, fine: '😀\\u0000' }
    const [row] = decode([entry({ ...turn, meta })]).turns
    expect(JSON.parse(row!.meta!)).toEqual({
      a: [{ 'k\ufffd': '\ufffd' }],
      'x\ufffd': 1,
      fine: '😀\\u0000',
      calltape_replaced: true,
      calltape_original: expect.any(String),
    })
    expect(original(row!.meta).meta).toEqual(meta)
    expect(row!.turn.text).toBe('text')
  })

  test('in_another_event_is_replaced_and_its_meta_says_so', () => {
    const event = { type: 'call.data', call_sid: SID, data: { 'k\0': '\ud800' }, stage: '\0', meta: { m: 1 } }
    const [row] = decode([entry(event)]).events
    const stored = JSON.parse(row!.event)
    expect(stored).toMatchObject({
      data: { 'k\ufffd': '\ufffd' },
      stage: '\ufffd',
      meta: { m: 1, calltape_replaced: true },
    })
    expect(original(JSON.stringify(stored.meta))).toEqual(event)
    expect(row!.event).not.toMatch(/(?<!\\)(\\\\)*\\u(0000|d[89a-f])/i)
  })

  test('is_not_seen_in_what_only_looks_like_it', () => {
    const text = '\\u0000 \\ud800 \u0001 \u2028 😀 \ufffd'
    const { turns, events } = decode([
      entry({ ...turn, text, meta: { text } }),
      entry({ type: 'call.data', data: { text } }),
    ])
    expect(turns[0]!.turn.text).toBe(text)
    expect(JSON.parse(turns[0]!.meta!)).toEqual({ text })
    expect(JSON.parse(events[0]!.event)).toEqual({ type: 'call.data', call_sid: SID, data: { text } })
  })

  test('a_name_that_JavaScript_treats_specially_is_data', () => {
    const json = `{"type":"turn","speaker":"agent","text":"\\u0000","meta":{"__proto__":{"x":"\\u0000"},"toString":1}}`
    const [row] = decode([[`${T}-0`, ['e', json]]]).turns
    expect(row!.meta).toContain('"__proto__":{"x":"\ufffd"},"toString":1')
  })
})

describe('quarantine', () => {
  test('holds_the_entry_as_it_was_and_the_neighbours_are_decoded', () => {
    const bad: Entry = [`${T}-1`, ['other', 'fi\0eld', 'x', '']]
    const batch = decode([entry(turn), bad, entry({ ...turn, seq: 1 }, `${T}-2`)])
    expect(batch.quarantine).toEqual([
      {
        streamKey: `${partition.streamPrefix}${SID}`,
        entryId: `${T}-1`,
        reason: 'missing_field: the entry has no field e',
        raw: JSON.stringify(bad[1]),
      },
    ])
    expect(batch.turns.length).toBe(2)
    expect(batch.settlements).toMatchObject([{ last: `${T}-2`, count: 3 }])
  })

  test('the_field_of_the_event_is_found_among_others', () => {
    const [id, fields] = entry(turn)
    expect(decode([[id, ['v', 'e', ...fields, 'z', '1']]]).turns.length).toBe(1)
  })

  test('takes_what_belongs_to_another_call', () => {
    const { quarantine, turns } = decode([entry({ ...turn, call_sid: 'another' })])
    expect([quarantine[0]!.reason, turns]).toEqual([expect.stringMatching(/^call_sid_mismatch: .*another/), []])
  })
})

describe('calls', () => {
  test('a_new_call_gets_its_row_with_its_first_and_last_time', () => {
    const { calls, oldestMs } = decode([
      entry({ ...turn, ts: 50 }, `${T}-0`),
      entry({ ...turn, ts: 20 }, `${T + 1}-0`),
      entry({ ...turn, ts: 30 }, `${T + 2}-0`),
    ])
    expect(calls).toEqual([{ callSid: SID, firstMs: 20, lastMs: 50, finalize: false }])
    expect(oldestMs).toBe(T)
  })

  test('turns_of_a_known_live_call_leave_its_row_alone_for_ten_seconds', () => {
    const cursor = `${T}-0`
    expect(decode([entry(turn, `${T + 9999}-0`)], { cursor }).calls).toEqual([])
    expect(decode([entry(turn, `${T + 10_000}-0`)], { cursor }).calls.length).toBe(1)
    expect(decode([entry({ type: 'call.data' }, `${T + 1}-0`)], { cursor }).calls.length).toBe(1)
  })

  test('call_ended_finalizes_and_whatever_comes_after_it_refinalizes', () => {
    const cursor = `${T}-0`
    const ended = decode([entry(turn, `${T}-1`), entry({ type: 'call.ended' }, `${T}-2`), entry(turn, `${T}-3`)], {
      cursor,
    })
    expect([ended.calls[0]!.finalize, ended.settlements[0]!.finalized]).toEqual([true, true])
    const late = decode([entry(turn, `${T}-1`)], { cursor, finalized: true })
    expect([late.calls[0]!.finalize, late.settlements[0]!.finalized]).toEqual([true, true])
    const live = decode([entry({ type: 'call.status', status: 'completed' }, `${T}-1`)], { cursor })
    expect([live.calls[0]!.finalize, live.settlements[0]!.finalized]).toEqual([false, false])
  })

  test('a_presumed_end_is_not_a_sign_of_life', () => {
    const presumed = entry({ type: 'call.ended', source: 'calltape', reason: 'abandoned' }, `${T + 5}-0`)
    const alone = decode([presumed])
    expect(alone.calls).toMatchObject([{ firstMs: T + 5, lastMs: null, finalize: true }])
    expect(alone.settlements).toMatchObject([{ finalized: true, presumed: true }])
    expect(decode([entry({ ...turn, ts: 7 }), presumed]).calls).toMatchObject([{ firstMs: 7, lastMs: 7 }])
  })

  test('quarantined_entries_alone_make_a_row_for_the_turns_behind_them', () => {
    const { calls, settlements } = decode([[`${T}-0`, ['x', 'y']]])
    expect(calls).toEqual([{ callSid: SID, firstMs: T, lastMs: null, finalize: false }])
    expect(settlements).toMatchObject([{ last: `${T}-0`, count: 1, finalized: false }])
    expect(decode([[`${T}-1`, ['x', 'y']]], { cursor: `${T}-0` }).calls).toEqual([])
  })
})

describe('batches', () => {
  test('a_lease_without_entries_is_only_given_back', () => {
    const batch = decode([])
    expect(batch).toEqual({ ...emptyBatch([]), settlements: [expect.objectContaining({ last: undefined, count: 0 })] })
  })

  test('one_call_that_may_have_been_committed_makes_the_batch_a_redelivery', () => {
    const batch = decode([entry(turn)])
    expect(batch.redelivered).toBe(false)
    decodeCall(lease({ lapses: 1 }), [entry(turn, `${T - 1}-0`)], batch)
    decodeCall(lease(), [entry(turn)], batch)
    expect(batch).toMatchObject({ redelivered: true, oldestMs: T - 1 })
    expect([batch.turns.length, batch.calls.length, batch.settlements.length]).toEqual([3, 3, 3])
  })
})

test('the_time_of_an_entry_is_one_that_every_calendar_has', () => {
  expect(entryMs(`${T}-5`)).toBe(T)
  expect(new Date(entryMs(`${2n ** 64n - 1n}-1`)).toISOString()).toBe('9999-12-31T23:59:59.999Z')
})
