/** A replay and a sink write different turns of a call whose row is gone: neither may overwrite what the other one has seen. */
import { afterAll, beforeAll, expect, test } from 'vitest'
import { leaseFromStart } from '../cli/entries.js'
import { Pace } from '../cli/replay/pace.js'
import { ReplayReport } from '../cli/replay/report.js'
import { ReplayWriter } from '../cli/replay/write.js'
import { Partitions } from '../shared/keys.js'
import { EncodedTurns } from '../sink/copy.js'
import { decodeCall, type Entry, emptyBatch } from '../sink/decode.js'
import { writeBatch } from '../sink/write.js'
import { ended } from './support/calls.js'
import { type Database, freshDatabase, freshRedis, until } from './support/stores.js'
import { turn } from './support/streams.js'

let database: Database
beforeAll(async () => {
  database = await freshDatabase()
})
afterAll(async () => await database.drop())

const LOCK = 7
const place = { callSid: 'both', partition: new Partitions(64).of('both') }
const entry = (n: number, event: object): Entry => [`1700000000000-${n}`, ['e', JSON.stringify(event)]]

test('a_replay_and_a_sink_that_write_a_call_without_a_row_at_once_both_see_what_the_other_wrote', async () => {
  const { pool } = database
  // Whoever makes the row stops there, until both of them are there.
  await pool.query(`CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_advisory_xact_lock_shared(${LOCK}); RETURN NEW; END $$`)
  await pool.query('CREATE TRIGGER wait BEFORE INSERT ON call_sessions FOR EACH ROW EXECUTE FUNCTION wait()')
  const gate = await pool.connect()
  await gate.query(`SELECT pg_advisory_lock(${LOCK})`)
  try {
    const report = new ReplayReport('replay')
    const pace = new Pace({ say: () => undefined, signal: new AbortController().signal })
    const writer = new ReplayWriter({ pool, main: pool, redis: undefined, legacy: undefined, pace, report })
    const entries = [entry(0, turn('both', 0)), entry(1, turn('both', 1))]
    const stored = { turns: 0, rows: 0, fits: false, quarantined: 0 }
    await writer.add({ ...place, entries, first: entries[0]![0], after: '0-0', isLast: true, stored })
    const replayed = writer.finish()

    const batch = emptyBatch(new EncodedTurns())
    const lease = { ...leaseFromStart('both', place.partition), cursor: '1700000000000-1' }
    decodeCall(lease, [entry(2, turn('both', 2)), entry(3, ended('both', 3))], batch)
    const written = writeBatch(pool, batch, 30_000)

    await until('both wait', async () => {
      const sql = `SELECT count(*)::int AS n FROM pg_locks WHERE locktype = 'advisory' AND objid = ${LOCK} AND NOT granted`
      return (await gate.query<{ n: number }>(sql)).rows[0]!.n === 2
    })
    await gate.query(`SELECT pg_advisory_unlock(${LOCK})`)
    await Promise.all([replayed, written])
  } finally {
    gate.release(true)
  }
  const { rows } = await pool.query(
    'SELECT turn_count, complete, jsonb_array_length(full_transcript) AS length, finalized_at IS NOT NULL AS final FROM call_sessions',
  )
  expect(rows).toEqual([{ turn_count: 3, complete: true, length: 3, final: true }])
})

test('a_call_that_is_erased_while_its_entries_are_on_their_way_does_not_come_back', async () => {
  const { pool } = database
  const redis = await freshRedis()
  try {
    const { client } = redis
    const report = new ReplayReport('replay')
    const erase = async () => {
      await client.unlink(`${place.partition.streamPrefix}erased`)
      return 0
    }
    const pace = new Pace({ lagMs: erase, say: () => undefined, signal: new AbortController().signal })
    const writer = new ReplayWriter({ pool, main: pool, redis: client, legacy: undefined, pace, report })
    for (const callSid of ['erased', 'stays']) {
      await client.xadd(place.partition.streamPrefix + callSid, '*', 'e', '{}')
      const entries = [entry(0, turn(callSid, 0)), entry(1, ended(callSid, 1))]
      const stored = { turns: 0, rows: 0, fits: false, quarantined: 0 }
      await writer.add({ ...place, callSid, entries, first: entries[0]![0], after: '0-0', isLast: true, stored })
    }
    await writer.finish()
    expect(report.toJson()).toMatchObject({ turns: 1, events: 1, gone: { calls: 1, entries: 2 } })
    for (const table of ['call_transcript_turns', 'call_events', 'call_sessions']) {
      const { rows } = await pool.query(`SELECT call_sid FROM ${table} WHERE call_sid IN ('erased', 'stays')`)
      expect(rows).toEqual([{ call_sid: 'stays' }])
    }
  } finally {
    await redis.drop()
  }
})
