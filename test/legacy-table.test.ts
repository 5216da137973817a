/** LEGACY_CALL_SESSIONS: another application's table that is filled when a call ends, and what must not come of it. */

import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { leaseFromStart } from '../cli/entries.js'
import { type DatabaseConfig, OperatorError, readConfig } from '../shared/config.js'
import type { CallEvent } from '../shared/events.js'
import { Partitions } from '../shared/keys.js'
import { createPool, type Pool } from '../shared/postgres.js'
import { EncodedTurns } from '../sink/copy.js'
import { decodeCall, type Entry, emptyBatch } from '../sink/decode.js'
import { Legacy, type LegacyTold } from '../sink/legacy.js'
import { startSink } from '../sink/sink.js'
import { writeBatch, writeSettings } from '../sink/write.js'
import { botDatabase, botTables } from './support/bot-database.js'
import { Calls, ended, newSid, type Row, seqs } from './support/calls.js'
import { Service } from './support/processes.js'
import { calltape } from './support/program.js'
import { type Database, freshRedis, log, startTestStack, until } from './support/stores.js'
import { turn } from './support/streams.js'

const T0 = Date.UTC(2026, 0, 1, 12)
const LATER = '2026-01-01 12:00:30'
const partitions = new Partitions(64)
let clock = Date.UTC(2026, 1, 1)

/** A table of the bot's, filled as a sink does it, without Redis between. */
class Table {
  readonly told = { rows: 0, failed: [] as [string, string][], held: [] as string[] }
  private constructor(
    readonly pool: Pool,
    readonly legacy: Legacy,
    readonly fills: string[],
    told: Table['told'],
  ) {
    this.told = told
  }

  static async open(
    { pool, config }: { pool: Pool; config: DatabaseConfig },
    table = 'call_sessions',
    timeoutMs = 60_000,
  ): Promise<Table> {
    const told: Table['told'] = { rows: 0, failed: [], held: [] }
    const tell: LegacyTold = {
      filled: (rows) => (told.rows += rows),
      failed: (...failure) => told.failed.push(failure),
      held: (callSids) => told.held.push(...callSids),
    }
    const { legacy, known } = await Legacy.open(pool, { schema: 'public', table }, config, timeoutMs, tell)
    return new Table(pool, legacy, known.fills, told)
  }

  /** One batch with all of these; its entries arrive a millisecond apart. */
  async store(...events: CallEvent[]): Promise<void> {
    const batch = emptyBatch(new EncodedTurns())
    for (const sid of new Set(events.map((event) => event.call_sid))) {
      const its = events.filter((event) => event.call_sid === sid)
      const entries = its.map((event): Entry => [`${clock++}-0`, ['e', JSON.stringify(event)]])
      decodeCall(leaseFromStart(sid, partitions.of(sid)), entries, batch)
    }
    await writeBatch(this.pool, batch, 60_000, this.legacy)
  }

  /** What is left for later. */
  async held(): Promise<string[]> {
    const { rows } = await this.pool.query<{ call_sid: string }>('SELECT call_sid FROM legacy_held ORDER BY call_sid')
    return rows.map((row) => row.call_sid)
  }

  async row(sid: string, table = 'call_sessions'): Promise<Row> {
    const { rows } = await this.pool.query<Row>(
      `SELECT *, xmin::text AS version FROM public.${table} WHERE call_sid = $1`,
      [sid],
    )
    if (rows.length !== 1) throw new Error(`${rows.length} rows of ${sid}`)
    return rows[0]!
  }
}

const insert = (pool: Pool, ...sids: string[]) =>
  pool.query(
    `INSERT INTO public.call_sessions (call_sid, lead_id, status)
     SELECT sid, 1, (enum_range(NULL::public.callstatus))[1] FROM unnest($1::text[]) sid`,
    [sids],
  )

const whole = (sid: string, more: Partial<CallEvent> = {}): CallEvent[] => [
  { type: 'call.started', call_sid: sid, ts: T0 },
  { type: 'call.status', call_sid: sid, ts: T0 + 10_000, status: 'in-progress' },
  { ...turn(sid, 0, 'नमस्ते "Asha"\\\n'), ts: T0 + 12_000 },
  { type: 'call.data', call_sid: sid, ts: T0 + 20_000, data: { budget: 5_000_000, घर: ['2 BHK'] } },
  {
    ...{ type: 'call.ended', call_sid: sid, ts: T0 + 30_000, outcome: 'callback_requested', turn_count: 1 },
    ...{ recording_url: 'https://r.example/1.mp3', ...more },
  } as CallEvent,
]

describe.each(['lower', 'upper'] as const)('with_labels_in_%s_case', (as) => {
  let database: Database
  let table: Table
  beforeAll(async () => {
    database = await botDatabase(botTables(as))
    table = await Table.open(database)
  })
  afterAll(() => database.drop())
  const label = (name: string) => (as === 'upper' ? name.toUpperCase() : name)

  test('an_ended_call_fills_its_row_and_no_other', async () => {
    const [sid, other] = [newSid(), newSid()]
    await insert(database.pool, sid, other)
    const before = await table.row(other)
    await table.store(...whole(sid))
    const { full_transcript, collected_data, answered_at, ended_at, ...row } = await table.row(sid)
    expect(row).toMatchObject({
      ...{ lead_id: 1, status: label('completed'), outcome: label('callback_requested'), duration_seconds: 20 },
      recording_url: 'https://r.example/1.mp3',
    })
    expect(JSON.parse(full_transcript as string)).toEqual([
      { seq: 0, speaker: 'agent', text: 'नमस्ते "Asha"\\\n', timestamp: '2026-01-01T12:00:12+00:00' },
    ])
    expect(JSON.parse(collected_data as string)).toEqual({ budget: 5_000_000, घर: ['2 BHK'] })
    const { rows } = await database.pool.query(
      'SELECT answered_at::text, ended_at::text, initiated_at FROM public.call_sessions WHERE call_sid = $1',
      [sid],
    )
    expect(rows).toEqual([{ answered_at: '2026-01-01 12:00:10', ended_at: LATER, initiated_at: null }])
    expect([answered_at, ended_at]).not.toContain(null)
    expect(await table.row(other)).toEqual(before)
  })

  test.for([
    ['completed', 'completed'],
    ['busy', 'busy'],
    ['failed', 'failed'],
    ['no-answer', 'no_answer'],
    ['canceled', 'no_answer'],
  ] as const)('status_%s_is_%s_there', async ([status, expected]) => {
    const sid = newSid()
    await insert(database.pool, sid)
    await table.store({ type: 'call.status', call_sid: sid, status, ts: T0 }, ended(sid))
    expect((await table.row(sid)).status).toBe(label(expected))
  })

  test.for([
    ['NO-ANSWER', 'no_answer'],
    ['Not interested', 'not_interested'],
    ['qualified', 'qualified'],
    ['sold_the_house', null],
  ] as const)('outcome_%s_is_%s_there', async ([outcome, expected]) => {
    const sid = newSid()
    await insert(database.pool, sid)
    await table.store(...whole(sid, { outcome } as Partial<CallEvent>))
    expect(await table.row(sid)).toMatchObject({ outcome: expected && label(expected), status: label('completed') })
    expect(table.told.failed).toEqual([])
  })
})

describe('the_row', () => {
  let database: Database
  let table: Table
  beforeAll(async () => {
    database = await botDatabase()
    table = await Table.open(database)
  })
  afterAll(() => database.drop())
  const query = (sql: string, ...values: unknown[]) => database.pool.query<Row>(sql, values)

  test('of_a_call_that_has_none_is_not_made', async () => {
    await table.store(...whole(newSid()))
    const sids = (await query('SELECT call_sid FROM public.call_sessions')).rows
    expect(sids).toEqual([])
  })

  test('of_a_live_call_is_left_alone', async () => {
    const sid = newSid()
    await insert(database.pool, sid)
    const before = await table.row(sid)
    await table.store(...whole(sid).slice(0, -1))
    expect(await table.row(sid)).toEqual(before)
    await table.store({ type: 'call.ended', call_sid: sid, source: 'calltape', reason: 'disconnected' })
    const presumed = await table.row(sid)
    expect(presumed.status).toBe('completed')
    await table.store({ type: 'call.data', call_sid: sid, data: { more: 1 } }, turn(sid, 1, 'it goes on'))
    const { rows } = await query('SELECT finalized_at FROM call_sessions WHERE call_sid = $1', sid)
    expect(rows).toEqual([{ finalized_at: null }])
    expect(await table.row(sid)).toEqual(presumed)
  })

  test('keeps_what_it_has_where_the_call_has_nothing', async () => {
    const sid = newSid()
    await insert(database.pool, sid)
    await query(
      `UPDATE public.call_sessions SET full_transcript = '[1]', collected_data = '{"a":1}', outcome = 'qualified',
         recording_url = 'https://r', answered_at = '2020-01-01' WHERE call_sid = $1`,
      sid,
    )
    await table.store(
      { type: 'call.data', call_sid: sid, data: {}, ts: T0 },
      { type: 'call.status', call_sid: sid, status: 'completed', ts: T0 },
      { type: 'call.ended', call_sid: sid, ts: T0 + 1000 },
    )
    expect(
      await database.pool.query('SELECT outcome, full_transcript FROM call_sessions WHERE call_sid = $1', [sid]),
    ).toMatchObject({
      rows: [{ outcome: null, full_transcript: [] }],
    })
    expect(await table.row(sid)).toMatchObject({
      ...{ full_transcript: '[1]', collected_data: '{"a":1}', outcome: 'qualified', recording_url: 'https://r' },
      ...{ answered_at: new Date(2020, 0, 1), status: 'completed', duration_seconds: 1 },
    })
  })

  test.for([
    ['qualified', 'qualified'],
    ['disconnected', 'no_answer'],
    [null, 'no_answer'],
  ] as const)('with_outcome_%s_has_%s_when_calltape_derives_no_answer', async ([before, after]) => {
    const sid = newSid()
    await insert(database.pool, sid)
    await query('UPDATE public.call_sessions SET outcome = $2 WHERE call_sid = $1', sid, before)
    await table.store({ type: 'call.ended', call_sid: sid, ts: T0, reason: 'no-answer' }, turn(sid, 0))
    expect(await table.row(sid)).toMatchObject({ outcome: after, status: 'completed' })
  })

  test.for([
    ['busy', 'busy'],
    ['no_answer', 'no_answer'],
    ['failed', 'failed'],
    ['in_progress', 'completed'],
  ] as const)('with_status_%s_has_%s_when_a_call_is_over_and_nobody_has_said_its_status', async ([before, after]) => {
    const sid = newSid()
    await insert(database.pool, sid)
    await query('UPDATE public.call_sessions SET status = $2 WHERE call_sid = $1', sid, before)
    await table.store(turn(sid, 0), { type: 'call.ended', call_sid: sid, source: 'calltape', reason: 'expired' })
    const { status, full_transcript } = await table.row(sid)
    expect([status, full_transcript]).toEqual([after, expect.stringContaining('timestamp')])
    await table.store({ type: 'call.status', call_sid: sid, status: 'completed' }) // somebody says so
    expect((await table.row(sid)).status).toBe('completed')
  })

  const derivedEnd: CallEvent[] = [
    { type: 'call.ended', call_sid: '', ts: T0 + 30_000, source: 'calltape', reason: 'disconnected' },
  ]
  const saidEnd = { type: 'call.ended', call_sid: '', ts: T0 + 30_000 } as const
  test.for<[string, CallEvent[], duration: number, ended: string]>([
    ['keeps_what_it_has_where_calltape_derives_them', derivedEnd, 7, '2020-01-01 00:00:00'],
    ['gets_an_end_that_is_said_and_keeps_its_duration', [saidEnd], 7, LATER],
    ['gets_both_where_both_are_said', [{ ...saidEnd, duration_seconds: 21 }], 21, LATER],
    [
      'gets_the_time_of_an_end_status_and_the_duration_said_with_it',
      [{ ...saidEnd, type: 'call.status', status: 'completed', duration_seconds: 22 }, ...derivedEnd],
      ...([22, LATER] as const),
    ],
  ])('of_a_call_with_a_duration_and_an_end_%s', async ([, events, duration, end]) => {
    const [sid, empty] = [newSid(), newSid()]
    await insert(database.pool, sid, empty)
    await query(
      `UPDATE public.call_sessions SET duration_seconds = 7, ended_at = '2020-01-01' WHERE call_sid = $1`,
      sid,
    )
    for (const call_sid of [sid, empty]) {
      const its = events.map((event) => ({ ...event, call_sid }))
      await table.store(...whole(call_sid).slice(0, -1), ...its)
    }
    const { rows } = await query(
      `SELECT duration_seconds, ended_at::text, full_transcript IS NOT NULL AS filled FROM public.call_sessions
       WHERE call_sid = ANY($1) ORDER BY call_sid = $2`,
      [sid, empty],
      empty,
    )
    expect(rows[0]).toEqual({ duration_seconds: duration, ended_at: end, filled: true })
    expect(Object.values(rows[1]!), 'nulls are filled with what is derived, too').not.toContain(null)
  })

  test('is_written_again_when_something_comes_late_and_only_if_it_changes_something', async () => {
    const sid = newSid()
    await insert(database.pool, sid)
    await table.store(...whole(sid))
    const first = await table.row(sid)
    await table.store({ ...turn(sid, 0), ts: T0 }) // the same key again: nothing new
    expect(await table.row(sid)).toEqual(first)
    await table.store({ ...turn(sid, 1, 'late'), ts: T0 + 15_000 }) // Redis may not know any more that it has ended
    const late = await table.row(sid)
    expect(late.version).not.toBe(first.version)
    expect(JSON.parse(late.full_transcript as string).map((said: Row) => said.text)).toEqual([
      expect.anything(),
      'late',
    ])
    await table.store({
      type: 'call.status',
      call_sid: sid,
      status: 'completed',
      recording_url: 'https://late',
      ts: T0 + 31_000,
    })
    expect((await table.row(sid)).recording_url).toBe('https://late')
  })

  test('keeps_a_column_that_is_too_short_for_the_value_and_gets_the_others', async () => {
    const sid = newSid()
    await insert(database.pool, sid)
    await table.store(...whole(sid, { recording_url: `https://r/${'x'.repeat(500)}` } as Partial<CallEvent>))
    expect(await table.row(sid)).toMatchObject({ recording_url: null, duration_seconds: 20, status: 'completed' })
    expect(table.told.failed).toEqual([])
  })

  test('that_a_trigger_refuses_costs_neither_its_neighbours_nor_the_call', async () => {
    const sids = seqs(9).map(newSid)
    await insert(database.pool, ...sids)
    await query(`
      CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.call_sid = '${sids[3]}' THEN RAISE EXCEPTION 'said: %', NEW.full_transcript; END IF;
        IF NEW.call_sid = '${sids[5]}' THEN RAISE EXCEPTION 'own' USING ERRCODE = 'LG001'; END IF;
        IF NEW.call_sid = '${sids[6]}' THEN PERFORM * FROM not_there; END IF;
        RETURN NEW; END $$;
      CREATE TRIGGER refuse BEFORE UPDATE ON public.call_sessions FOR EACH ROW EXECUTE FUNCTION public.refuse();
      ALTER TABLE public.call_sessions ADD CONSTRAINT no_eighth CHECK (call_sid <> '${sids[8]}' OR ended_at IS NULL)`)
    await table.store(...sids.flatMap((sid) => whole(sid)))
    await query('DROP FUNCTION public.refuse CASCADE; ALTER TABLE public.call_sessions DROP CONSTRAINT no_eighth')
    const bad = [3, 5, 6, 8]
    for (const [i, sid] of sids.entries()) {
      expect((await table.row(sid)).status).toBe(bad.includes(i) ? 'initiated' : 'completed')
    }
    const { rows } = await query('SELECT FROM call_sessions WHERE call_sid = ANY($1) AND complete', sids)
    expect(rows).toHaveLength(9)
    expect(table.told.failed.splice(0)).toEqual([
      [sids[3], 'error P0001 in PL/pgSQL function refuse() line 2 at RAISE'],
      [sids[5], 'error LG001 in PL/pgSQL function refuse() line 3 at RAISE'],
      [sids[6], expect.stringMatching(/^error 42P01 in /)],
      [sids[8], expect.stringMatching(/violates check constraint "no_eighth"$/)],
    ])
  })

  test('that_is_refused_only_at_COMMIT_is_refused_by_itself', async () => {
    const [good, bad] = [newSid(), newSid()]
    await insert(database.pool, good, bad)
    await query(`
      CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN IF NEW.call_sid = '${bad}' THEN RAISE EXCEPTION 'no'; END IF; RETURN NULL; END $$;
      CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON public.call_sessions DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION public.refuse()`)
    await table.store(...whole(good), ...whole(bad))
    await query('DROP FUNCTION public.refuse CASCADE')
    expect([(await table.row(good)).status, (await table.row(bad)).status]).toEqual(['completed', 'initiated'])
    expect(table.told.failed.splice(0)).toMatchObject([[bad, expect.stringContaining('P0001')]])
  })

  test('has_triggers_that_find_their_own_tables_and_not_ours', async () => {
    const sid = newSid()
    await insert(database.pool, sid)
    await query(`
      CREATE TABLE public.call_events (said text);
      CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO call_events SELECT NEW.status || ' ' || name FROM leads WHERE id = NEW.lead_id; RETURN NEW; END $$;
      CREATE TRIGGER note BEFORE UPDATE ON public.call_sessions FOR EACH ROW EXECUTE FUNCTION public.note()`)
    await table.store(...whole(sid))
    const { rows } = await query('SELECT said FROM public.call_events')
    await query('DROP FUNCTION public.note CASCADE; DROP TABLE public.call_events')
    expect(rows).toEqual([{ said: 'completed Asha' }])
  })

  test('that_is_locked_keeps_nobody_waiting_for_long_and_is_filled_by_anybody_once_it_is_free', async () => {
    const sids = seqs(40).map(newSid)
    await insert(database.pool, ...sids)
    const client = await database.pool.connect()
    await client.query('BEGIN')
    await client.query('SELECT FROM public.call_sessions WHERE call_sid = ANY($1) FOR UPDATE', [[sids[7], sids[30]]])
    const from = performance.now()
    await table.store(...sids.flatMap((sid) => whole(sid)))
    expect(performance.now() - from).toBeLessThan(10_000)
    expect([await table.held(), table.told.held.splice(0).sort()]).toEqual([
      [sids[7], sids[30]].sort(),
      [sids[7], sids[30]].sort(),
    ])
    const filled = async () =>
      (await Promise.all(sids.map((sid) => table.row(sid)))).filter((row) => row.full_transcript)
    expect(await filled()).toHaveLength(38)
    const others = [await Table.open(database), await Table.open(database)] as const // as after the death of the first
    expect(await others[0].legacy.fillHeld(database.pool)).toBe(2)
    expect(others[0].told.held).toHaveLength(2)
    await client.query('COMMIT')
    client.release()
    await Promise.all(others.map(({ legacy }) => legacy.fillHeld(database.pool)))
    expect(await filled()).toHaveLength(40)
    expect([await table.held(), others.map(({ told }) => told.failed)]).toEqual([[], [[], []]])
    expect(others[0].told.rows + others[1].told.rows).toBe(2)
  })

  test('that_is_locked_is_not_left_for_later_when_its_call_is_not_stored', async () => {
    const sid = newSid()
    await insert(database.pool, sid)
    const client = await database.pool.connect()
    await client.query('BEGIN')
    await client.query('SELECT FROM public.call_sessions WHERE call_sid = $1 FOR UPDATE', [sid])
    await query(`
      CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$;
      CREATE TRIGGER refuse AFTER INSERT ON legacy_held FOR EACH ROW EXECUTE FUNCTION public.refuse()`)
    await expect(table.store(...whole(sid))).rejects.toThrow('not now')
    await query('DROP FUNCTION public.refuse CASCADE')
    await client.query('COMMIT')
    client.release()
    expect((await query('SELECT FROM call_sessions WHERE call_sid = $1', sid)).rows).toEqual([])
    expect(await table.held()).toEqual([])
  })

  test('that_is_left_for_later_meets_what_comes_late_without_a_deadlock_and_ends_as_the_newest', async () => {
    const sid = newSid()
    await insert(database.pool, sid)
    const client = await database.pool.connect()
    await client.query('BEGIN')
    await client.query('SELECT FROM public.call_sessions WHERE call_sid = $1 FOR UPDATE', [sid])
    await table.store(...whole(sid))
    for (const n of seqs(3, 1)) {
      const late = table.store({ ...turn(sid, n, `late ${n}`), ts: T0 + 15_000 })
      await Promise.all([late, table.legacy.fillHeld(database.pool), table.legacy.fillHeld(database.pool)])
    }
    expect(await table.held()).toEqual([sid])
    await client.query('COMMIT')
    client.release()
    expect(await table.legacy.fillHeld(database.pool)).toBe(0)
    expect((await table.row(sid)).full_transcript).toContain('late 3')
  })

  test('of_each_of_many_calls_is_filled_although_all_together_and_one_alone_take_too_long', async () => {
    const sids = seqs(8).map(newSid).toSorted()
    await insert(database.pool, ...sids)
    await query(`
      CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_sleep(CASE NEW.call_sid WHEN '${sids[0]}' THEN 1 ELSE 0.1 END); RETURN NEW; END $$;
      CREATE TRIGGER slow BEFORE UPDATE ON public.call_sessions FOR EACH ROW EXECUTE FUNCTION public.slow()`)
    const slow = await Table.open(database, 'call_sessions', 1200) // 0.3 s for those that are free
    await query(`
      CREATE FUNCTION public.slow_note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.4); RETURN NULL; END $$;
      CREATE TRIGGER slow AFTER INSERT ON legacy_held FOR EACH STATEMENT EXECUTE FUNCTION public.slow_note()`)
    await slow.store(...sids.flatMap((sid) => whole(sid)))
    await query('DROP FUNCTION public.slow_note CASCADE')
    expect(await slow.held()).toHaveLength(8)
    for (let tries = 0; (await slow.held()).length > 1 && tries < 40; tries++) await slow.legacy.fillHeld(database.pool)
    expect(await slow.held()).toEqual([sids[0]])
    await query('DROP FUNCTION public.slow CASCADE')
    expect(await slow.legacy.fillHeld(database.pool)).toBe(0)
  })

  test('that_another_one_deadlocks_with_costs_neither_anything_and_is_filled_once_it_is_free', async () => {
    const [first, second] = [newSid(), newSid()].toSorted() as [string, string]
    await insert(database.pool, first, second)
    const impatient = createPool(database.config, 'deadlocking', 1, undefined, { deadlock_timeout: '500ms' })
    const other = await database.pool.connect()
    try {
      const update = (sid: string) =>
        other.query('UPDATE public.call_sessions SET lead_id = 1 WHERE call_sid = $1', [sid])
      await other.query(`SET deadlock_timeout = '10s'; BEGIN`)
      await update(second)
      const theirs = await Table.open({ ...database, pool: impatient })
      const storing = theirs.store(...whole(first), ...whole(second))
      await until('it waits', async () => {
        const waiting = `SELECT FROM pg_stat_activity WHERE application_name = 'calltape-deadlocking' AND wait_event_type = 'Lock'`
        return (await query(waiting)).rows.length > 0
      })
      await update(first)
      await storing.finally(() => other.query('COMMIT'))
      await theirs.legacy.fillHeld(impatient)
      expect([theirs.told.failed, await table.held()]).toEqual([[], []])
      for (const sid of [first, second]) expect(await table.row(sid)).toMatchObject({ status: 'completed' })
    } finally {
      await other.query('RESET deadlock_timeout')
      other.release()
      await impatient.end()
    }
  })

  test('that_was_waited_for_behind_another_one_does_not_make_the_other_application_deadlock', async () => {
    const sids = seqs(3).map(newSid).toSorted() as [string, string, string]
    await insert(database.pool, ...sids)
    const [writer, holder] = await Promise.all([database.pool.connect(), database.pool.connect()])
    const update = (client: typeof writer, sid: string) =>
      client.query('UPDATE public.call_sessions SET lead_id = 1 WHERE call_sid = $1', [sid])
    try {
      await holder.query('BEGIN')
      await update(holder, sids[1])
      await writer.query('BEGIN')
      await update(writer, sids[2])
      const storing = table.store(...sids.flatMap((sid) => whole(sid)))
      await sleep(200)
      const updating = update(writer, sids[0]) // has to wait for ours, which waits for the holder, and then for the writer
      await sleep(500)
      await holder.query('COMMIT')
      await Promise.all([storing, updating])
    } finally {
      await writer.query('COMMIT')
      holder.release()
      writer.release()
    }
    await table.legacy.fillHeld(database.pool)
    for (const sid of sids) expect(await table.row(sid)).toMatchObject({ status: 'completed' })
  })

  test('in_a_table_that_is_locked_altogether_delays_a_batch_by_a_bounded_time_and_live_calls_not_at_all', async () => {
    const sids = seqs(200).map(newSid)
    await insert(database.pool, ...sids)
    const client = await database.pool.connect()
    await client.query('BEGIN; LOCK TABLE public.call_sessions')
    await table.store(...sids.map((sid) => turn(sid, 0)))
    expect(await table.held()).toEqual([]) // it was not even asked
    const from = performance.now()
    await table.store(...sids.map((sid) => ended(sid, 1)))
    expect(performance.now() - from).toBeLessThan(10_000)
    expect(await table.held()).toHaveLength(200)
    await client.query('COMMIT')
    client.release()
    expect(await table.legacy.fillHeld(database.pool)).toBe(0)
    for (const sid of [sids[0]!, sids[199]!]) expect((await table.row(sid)).full_transcript).toContain('turn 0')
  })

  test('gets_labels_that_were_renamed_while_we_run', async () => {
    const [first, second] = [newSid(), newSid()]
    await insert(database.pool, first, second)
    await query(`ALTER TYPE public.callstatus RENAME VALUE 'completed' TO 'COMPLETED'`)
    await table.store(...whole(first))
    await table.store(...whole(second))
    expect([(await table.row(first)).status, (await table.row(second)).status]).toEqual(['COMPLETED', 'COMPLETED'])
    await query(`ALTER TYPE public.callstatus RENAME VALUE 'COMPLETED' TO 'completed'`)
  })
})

describe('a_table_of_another_shape', () => {
  let database: Database
  beforeAll(async () => {
    database = await botDatabase('')
  })
  afterAll(() => database.drop())
  let tables = 0

  /** @returns what is filled, and the row after a call that said all there is to say */
  async function filledIn(columns: string, more: Partial<CallEvent> = {}): Promise<[string[], Row]> {
    const name = `legacy_${tables++}`
    await database.pool.query(`CREATE TABLE public.${name} (${columns})`)
    const sid = newSid()
    await database.pool.query(`INSERT INTO public.${name} (call_sid) VALUES ('${sid}')`)
    const table = await Table.open(database, name)
    await table.store(...whole(sid, more))
    expect(table.told).toMatchObject({ failed: [], held: [] })
    const { version: _, ...row } = await table.row(sid, name)
    const first = await table.row(sid, name)
    await table.store({ ...turn(sid, 0) })
    expect((await table.row(sid, name)).version).toBe(first.version)
    return [table.fills, row]
  }
  const call_sid = expect.stringContaining('call-')

  test('gets_what_it_has_columns_for_with_or_without_an_index', async () => {
    const filled = { call_sid, duration_seconds: 20, status: 'completed', ended_at: new Date(T0 + 30_000) }
    const columns = 'duration_seconds int, status text, ended_at timestamptz'
    for (const key of ['call_sid text', 'call_sid varchar(50) PRIMARY KEY', 'call_sid text COLLATE "POSIX" UNIQUE']) {
      expect(await filledIn(`${key}, ${columns}`)).toEqual([['duration_seconds', 'status', 'ended_at'], filled])
    }
  })

  test('gets_JSON_where_it_has_JSON_and_nothing_where_it_does_not_fit', async () => {
    const [, row] = await filledIn(
      'call_sid text, full_transcript jsonb, collected_data json, outcome varchar(5), status char(12)',
    )
    expect(row).toEqual({
      ...{ call_sid, status: 'completed   ', outcome: null, collected_data: { budget: 5_000_000, घर: ['2 BHK'] } },
      full_transcript: [expect.objectContaining({ text: 'नमस्ते "Asha"\\\n' })],
    })
    const [, short] = await filledIn('call_sid text, full_transcript varchar(20), collected_data varchar(300)')
    expect(short).toEqual({ call_sid, full_transcript: null, collected_data: expect.stringContaining('BHK') })
  })

  test('gets_numbers_and_times_as_it_keeps_them_and_columns_of_other_types_stay', async () => {
    const [fills, row] = await filledIn(
      'call_sid text, duration_seconds smallint, answered_at timestamp(0), ended_at date, status int, outcome text GENERATED ALWAYS AS (call_sid) STORED',
      { duration_seconds: 100_000 } as Partial<CallEvent>,
    )
    expect(fills).toEqual(['duration_seconds', 'answered_at'])
    expect(row).toMatchObject({ duration_seconds: null, ended_at: null, status: null })
    expect(row.answered_at).not.toBeNull()
    const [, numeric] = await filledIn('call_sid text, duration_seconds numeric(8,1)')
    expect(numeric.duration_seconds).toBe('20.0')
  })

  test.for([
    [['canceled', 'cancelled', 'no_answer'], 'canceled'],
    [['Cancelled', 'no_answer'], 'Cancelled'],
    [['NO-ANSWER'], 'NO-ANSWER'],
    [['done'], null],
  ] as const)('with_the_labels_%s_has_%s_for_a_canceled_call', async ([labels, expected]) => {
    const type = `label_${tables}`
    await database.pool.query(`CREATE TYPE public.${type} AS ENUM (${labels.map((each) => `'${each}'`).join(', ')})`)
    const sid = newSid()
    await database.pool.query(`CREATE TABLE public.t_${type} (call_sid text, status public.${type})`)
    await database.pool.query(`INSERT INTO public.t_${type} VALUES ('${sid}')`)
    tables++
    const table = await Table.open(database, `t_${type}`)
    await table.store({ type: 'call.status', call_sid: sid, status: 'canceled' }, ended(sid))
    expect((await table.row(sid, `t_${type}`)).status).toBe(expected)
    expect(table.told.failed).toEqual([])
  })

  test('is_found_by_its_index_as_long_as_there_is_one_and_what_was_said_of_the_call_as_well', async () => {
    await database.pool.query(`
      CREATE TABLE public.large (call_sid varchar(100) UNIQUE, status text, duration_seconds int, ended_at timestamp);
      INSERT INTO public.large SELECT 'old-' || n, 'busy', 1, '2020-01-01' FROM generate_series(1, 20000) n;
      ANALYZE public.large`)
    const pool = createPool(database.config, 'test', 1, undefined, writeSettings(60_000, 60_000))
    const table = await Table.open({ pool, config: database.config }, 'large')
    const scans = async () => {
      await pool.query('SELECT pg_stat_force_next_flush()')
      const { rows } = await pool.query(
        `SELECT sum(seq_scan)::int AS seq_scan, (sum(idx_scan) FILTER (WHERE relname = 'large'))::int AS idx_scan
         FROM pg_stat_user_tables WHERE relname IN ('large', 'call_events')`,
      )
      return rows[0] as { seq_scan: number; idx_scan: number }
    }
    const before = await scans()
    await table.store(...seqs(50).flatMap((n) => whole(`old-${n + 1}`)))
    const after = await scans()
    await pool.end()
    expect(table.told.rows).toBe(50)
    expect(after.seq_scan).toBe(before.seq_scan)
    expect(after.idx_scan).toBeGreaterThan(before.idx_scan)
  })
})

describe('a_sink', () => {
  /** A bot's database, and what a sink on it is configured with. */
  async function botStack(more: Record<string, string> = {}, tables?: string) {
    const [redis, database] = await Promise.all([freshRedis(), botDatabase(tables)])
    const environment = { REDIS_URL: redis.url, ...database.config, LEGACY_CALL_SESSIONS: 'call_sessions', ...more }
    const drop = () => Promise.all([redis.drop(), database.drop()])
    return { redis, database, environment: { ...environment, SINK_METRICS_PORT: '0' }, drop }
  }

  test.for([
    ['nowhere.call_sessions', '', /"nowhere"."call_sessions" does not exist/],
    ['"Call Sessions"', '', /"public"."Call Sessions" does not exist/],
    ['leads', '', /"public"."leads" has no column call_sid/],
    ['numbered', 'CREATE TABLE numbered (call_sid int, status text)', /a call_sid that is no text: integer/],
    [
      'bare',
      'CREATE TABLE bare (call_sid text, ended_at date)',
      /no column that can be filled: it wants full_transcript/,
    ],
    [
      'sums',
      'CREATE VIEW sums AS SELECT call_sid, count(*) AS status FROM call_sessions GROUP BY 1',
      /cannot be updated/,
    ],
    ['calltape.call_sessions', '', /is calltape's own/],
    ['calltape.call_transcript_turns', '', /is calltape's own/],
    ['calltape.legacy_held', '', /is calltape's own/],
    [
      'older.call_sessions',
      `CREATE SCHEMA older; CREATE TABLE older.calltape_migrations (name text);
       CREATE TABLE older.call_sessions (call_sid text, status text)`,
      /"older"."call_sessions" is another calltape's/,
    ],
  ] as const)('refuses_%s', async ([name, sql, says]) => {
    const { environment, drop } = await botStack({ LEGACY_CALL_SESSIONS: name }, `${botTables()}; ${sql}`)
    const refusal = await startSink(readConfig(environment), log).catch((error: Error) => error)
    await drop()
    expect(refusal).toBeInstanceOf(OperatorError)
    expect((refusal as Error).message).toMatch(/^LEGACY_CALL_SESSIONS: /)
    expect((refusal as Error).message).toMatch(says)
  })

  test('refuses_a_table_that_it_may_not_update_and_takes_one_of_which_it_may_what_it_must', async () => {
    const role = `calltape_bot_${process.pid}`
    const { database, environment, drop } = await botStack()
    const url = new URL(database.url)
    url.username = role
    url.password = 'calltape'
    await database.pool.query(`
      CREATE ROLE ${role} LOGIN PASSWORD 'calltape'; GRANT USAGE ON SCHEMA calltape TO ${role};
      GRANT ALL ON ALL TABLES IN SCHEMA calltape TO ${role};
      GRANT SELECT, UPDATE (outcome) ON public.call_sessions TO ${role}`)
    const config = readConfig({ ...environment, DATABASE_URL: url.href })
    const refusal = (await startSink(config, log).catch((error: Error) => error)) as Error
    const grant = /GRANT .* TO \w+$/.exec(refusal.message)?.[0]
    await database.pool.query(`REVOKE ALL ON public.call_sessions FROM ${role}; ${grant}`)
    const sink = await startSink(config, log)
    await sink.stop()
    await database.pool.query(`DROP OWNED BY ${role}; DROP ROLE ${role}`)
    await drop()
    expect(refusal.message).toMatch(
      /^LEGACY_CALL_SESSIONS: "public"."call_sessions" may not be filled: GRANT SELECT \(call_sid, .*\), UPDATE/,
    )
  })

  test('killed_between_the_legacy_row_and_COMMIT_changes_nothing_and_the_next_one_does_all', {
    timeout: 60_000,
  }, async () => {
    const { redis, database, environment, drop } = await botStack({ LEASE_SECONDS: '1' })
    const folder = mkdtempSync(join(tmpdir(), 'calltape-legacy-'))
    const stack = await startTestStack(environment, 0)
    const calls = new Calls({ ...stack, redis, database })
    const sid = newSid()
    await insert(database.pool, sid)
    await calls.producer.store(turn(sid, 0), ended(sid, 1))
    const [before] = await calls.query('SELECT *, xmin::text FROM public.call_sessions')
    const options = { name: 'sink', logFile: join(folder, 'log'), environment, unsupervised: true } as const
    const sink = new Service({ ...options, environment: { ...environment, CRASH_AT: 'before-commit' } })
    await until('it has died', () => sink.deaths.length > 0, 20_000)
    expect(await calls.query('SELECT *, xmin::text FROM public.call_sessions')).toEqual([before])
    expect(await calls.session(sid)).toBeUndefined()
    const next = new Service(options)
    await until(
      'it is filled',
      async () => (await calls.query('SELECT FROM public.call_sessions WHERE full_transcript IS NOT NULL'))[0],
      20_000,
    )
    expect(await calls.session(sid)).toMatchObject({ complete: true })
    await next.stop()
    await stack.end()
    await drop()
    rmSync(folder, { recursive: true })
  })

  test('counts_what_it_fills_and_what_refuses_and_quarantines_nothing_for_it', async () => {
    const { redis, database, environment, drop } = await botStack()
    const stack = await startTestStack(environment)
    const calls = new Calls({ ...stack, redis, database })
    const sids = seqs(10).map(newSid)
    await insert(database.pool, ...sids)
    await calls.query(`ALTER TABLE public.call_sessions ADD CHECK (call_sid <> '${sids[4]}' OR ended_at IS NULL)`)
    await calls.storeSettled(...sids.flatMap((sid) => [turn(sid, 0), ended(sid, 1)]))
    expect(await calls.metric('legacy_rows_total')).toBe(9)
    expect(await calls.metric('legacy_failures_total')).toBe(1)
    await calls.storeSettled(turn(sids[0]!, 1, 'late'))
    const [late] = await calls.query(
      'SELECT full_transcript AS said FROM public.call_sessions WHERE call_sid = $1',
      sids[0],
    )
    expect(late!.said).toMatch(/turn 0.*late/)
    expect(await calls.query('SELECT FROM quarantined_events')).toEqual([])
    expect(await calls.query('SELECT FROM call_sessions WHERE complete')).toHaveLength(9)
    await stack.end()
    await drop()
  })

  test('whose_legacy_table_goes_away_stops_with_a_hint_goes_on_once_it_is_back_and_quarantines_nothing', {
    timeout: 60_000,
  }, async () => {
    const { redis, database, environment, drop } = await botStack({ MAX_DELIVERIES: '1' })
    const stack = await startTestStack(environment)
    const calls = new Calls({ ...stack, redis, database })
    const sids = seqs(5).map(newSid)
    await insert(database.pool, ...sids)
    await calls.query('ALTER TABLE public.call_sessions RENAME TO elsewhere')
    await calls.producer.store(...sids.flatMap((sid) => [turn(sid, 0), ended(sid, 1)]))
    const hint =
      /^503 PostgreSQL: the table of LEGACY_CALL_SESSIONS cannot be filled \(LEGACY_CALL_SESSIONS: .*does not exist/
    await until('it is unready with a hint', async () => hint.test(await calls.ready()))
    for (const n of seqs(4)) {
      await calls.producer.store(turn(`live-${n}`, 0)) // others are stored between
      await until('it has tried again', async () => (await calls.metric('retries_total')) > 2 * n + 2, 20_000)
    }
    expect(await calls.query('SELECT FROM public.elsewhere WHERE full_transcript IS NOT NULL')).toEqual([])
    await calls.query(
      'ALTER TABLE public.elsewhere RENAME TO call_sessions; ALTER TABLE public.call_sessions DROP COLUMN outcome',
    )
    await calls.idle(30_000)
    expect(await calls.query('SELECT FROM public.call_sessions WHERE full_transcript IS NOT NULL')).toHaveLength(5)
    expect(await calls.query('SELECT FROM quarantined_events')).toEqual([])
    expect(await calls.ready()).toBe('200 ready')
    await stack.end()
    await drop()
  })

  test('fills_a_row_that_was_locked_when_a_sink_that_is_gone_stored_its_call_and_the_quarantine_command_fills_rows_too', {
    timeout: 60_000,
  }, async () => {
    const { redis, database, environment, drop } = await botStack()
    const stack = await startTestStack(environment)
    const calls = new Calls({ ...stack, redis, database })
    const [locked, bad] = [newSid(), newSid()]
    await insert(database.pool, locked, bad)
    const client = await database.pool.connect()
    await client.query('BEGIN')
    await client.query('SELECT FROM public.call_sessions WHERE call_sid = $1 FOR UPDATE', [locked])
    await calls.storeSettled(turn(locked, 0), ended(locked, 1))
    await until('it is counted', async () => (await calls.metric('legacy_held_calls')) === 1)
    await calls.stop()
    await client.query('COMMIT')
    client.release()
    await calls.start()
    await until('it is filled', async () => (await calls.metric('legacy_rows_total')) === 1)
    await until('it is not counted', async () => (await calls.metric('legacy_held_calls')) === 0)

    await calls.query(`ALTER TABLE call_transcript_turns ADD CONSTRAINT no_bad CHECK (text <> 'bad')`)
    await calls.storeSettled(turn(bad, 0), turn(bad, 1, 'bad'), ended(bad, 2))
    const said = async () =>
      (await calls.query('SELECT full_transcript AS said FROM public.call_sessions WHERE call_sid = $1', bad))[0]!.said
    expect(await said()).not.toContain('bad')
    await calls.query('ALTER TABLE call_transcript_turns DROP CONSTRAINT no_bad')
    expect(await calltape(['quarantine', 'retry', '--all'], environment)).toMatchObject({ code: 0 })
    expect(await said()).toContain('bad')
    await stack.end()
    await drop()
  })
})
