/** retention: what is long stored goes from Redis, and nothing else does. */
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest'
import { dropQuarantined } from '../cli/quarantined-entries.js'
import { compareStores } from '../cli/verify.js'
import type { Pool } from '../shared/postgres.js'
import { startSink } from '../sink/sink.js'
import { Calls, ended, seqs } from './support/calls.js'
import { calltape } from './support/program.js'
import { beforePurge, comeUpAgain, finalCall, finalCalls, isFinal, retentionOf, tracesOf } from './support/retention.js'
import { log, until } from './support/stores.js'
import { placesOf, sessionOf, streamOf, turn } from './support/streams.js'

let calls: Calls
beforeAll(async () => {
  calls = await Calls.start({ STREAM_RETENTION: 'off' })
})
afterAll(() => calls.stack.end())

const recording = (sid: string) =>
  ({ type: 'call.status', call_sid: sid, recording_url: 'https://example.com/r.mp3' }) as const

test('a_final_call_leaves_no_trace_in_redis_past_its_retention_and_all_of_it_before', async () => {
  const sid = await finalCall(calls)
  expect(await retentionOf(calls, { retentionMs: 60_000 }).round()).toBe(0)
  expect(await tracesOf(calls, sid)).toEqual(['stream', 'session', 'ended'])
  const { round, metrics } = retentionOf(calls)
  expect(await round()).toBe(1)
  expect(await tracesOf(calls, sid)).toEqual([])
  expect((await metrics.purged.get()).values[0]?.value).toBe(1)
  expect(await calls.turns(sid)).toHaveLength(2)
  expect(await calls.session(sid)).toMatchObject({ turn_count: 2, complete: true })
})

test('nothing_is_removed_before_it_is_committed', async () => {
  const { client, partitions } = calls.stack.redis
  const [ready, leased, open, behind, groupless] = (await finalCalls(calls, 5)) as [
    string,
    string,
    string,
    string,
    string,
  ]
  await calls.stop()
  onTestFinished(async () => void (await calls.start()))
  await calls.producer.store(recording(ready))
  await client.zadd(partitions.of(leased).leased, Date.now() + 60_000, leased)
  await client.zadd(partitions.of(open).open, Date.now() + 60_000, open)
  await client.xadd(streamOf(calls.stack.redis, behind), '*', 'e', JSON.stringify(recording(behind)))
  await client.xgroup('DESTROY', streamOf(calls.stack.redis, groupless), 'sink')
  const sids = [ready, leased, open, behind, groupless]
  const before = await Promise.all(sids.map((sid) => tracesOf(calls, sid)))
  const { round, metrics } = retentionOf(calls)
  expect(await round()).toBe(0)
  await comeUpAgain(calls, ...sids)
  expect(await round()).toBe(0)
  const kept = (await Promise.all(sids.map((sid) => tracesOf(calls, sid)))).map((traces) =>
    traces.filter((trace) => trace !== 'kept'),
  )
  expect(kept).toEqual(before)
  expect((await metrics.shared.keptCalls.get()).values[0]?.value, 'those that nobody is at').toBe(2)
  await client.zrem(partitions.of(leased).leased, leased)
  await client.zrem(partitions.of(open).open, open)
  for (const sid of [behind, groupless]) await client.zadd(partitions.of(sid).ready, Date.now(), sid)
})

test.each([
  ['all turns', 'DELETE FROM call_transcript_turns WHERE call_sid = $1'],
  ['one turn', `DELETE FROM call_transcript_turns WHERE call_sid = $1 AND turn_id = '1'`],
  ['the row', 'DELETE FROM call_sessions WHERE call_sid = $1'],
  ['that it is final', 'UPDATE call_sessions SET finalized_at = NULL, turn_count = NULL WHERE call_sid = $1'],
  ['its events', 'DELETE FROM call_events WHERE call_sid = $1'],
])('a_truncated_table_keeps_its_streams: %s', async (_what, sql) => {
  const [lost, whole] = (await finalCalls(calls, 2)) as [string, string]
  await calls.query(sql, lost)
  const { round, metrics } = retentionOf(calls)
  expect(await round()).toBeGreaterThanOrEqual(1)
  expect(await tracesOf(calls, whole), 'those behind it go').toEqual([])
  expect(await tracesOf(calls, lost)).toEqual(['stream', 'session', 'ended', 'kept'])
  expect((await metrics.shared.keptCalls.get()).values[0]?.value).toBeGreaterThanOrEqual(1)
  await comeUpAgain(calls, lost)
  await calls.query('DELETE FROM call_transcript_turns WHERE call_sid = $1', lost)
  await calls.query('DELETE FROM call_events WHERE call_sid = $1', lost)
  await calls.stack.redis.client.del(streamOf(calls.stack.redis, lost))
  await round()
  expect(await tracesOf(calls, lost), 'lost altogether: nothing is left to keep').toEqual([])
})

test.each([
  ['before its last event', `DELETE FROM call_events WHERE call_sid = $1 AND type = 'call.status'`],
  [
    'before its last turn',
    `WITH turns AS (DELETE FROM call_transcript_turns WHERE call_sid = $1 AND turn_id = '2')
                            UPDATE call_sessions SET turn_count = 2 WHERE call_sid = $1`,
  ],
  ['before what is unreadable', 'DELETE FROM quarantined_events WHERE stream_key = $1'],
])('a_backup_from_after_the_end_of_a_call_but_%s_keeps_its_stream', async (_when, sql) => {
  const sid = await finalCall(calls)
  await calls.storeSettled(recording(sid), turn(sid, 2))
  await calls.foreign(sid, [['e', 'unreadable']])
  await isFinal(calls, sid)
  await calls.query(sql, sql.includes('stream_key') ? streamOf(calls.stack.redis, sid) : sid)
  const { round } = retentionOf(calls)
  expect(await round()).toBe(0)
  expect(await tracesOf(calls, sid)).toEqual(['stream', 'session', 'ended', 'kept'])
  await calls.stack.redis.client.del(streamOf(calls.stack.redis, sid))
  await comeUpAgain(calls, sid)
  await round()
})

test('rows_of_a_stream_that_has_gone_do_not_stand_for_those_of_the_next_one', async () => {
  const sid = await finalCall(calls) // three entries
  await retentionOf(calls).round()
  const late = ['a', 'b', 'c'].map((id) => ({ ...recording(sid), id }))
  await calls.storeSettled(...late)
  await calls.stack.redis.client.zadd(calls.stack.redis.partitions.of(sid).open, 'XX', 1, sid)
  await isFinal(calls, sid)
  await calls.query(`DELETE FROM call_events WHERE call_sid = $1 AND type = 'call.status'`, sid)
  expect(await retentionOf(calls).round()).toBe(0)
  expect(await tracesOf(calls, sid)).toContain('stream')
  await calls.stack.redis.client.del(streamOf(calls.stack.redis, sid))
  await comeUpAgain(calls, sid)
  await retentionOf(calls).round()
})

test('a_call_with_repetitions_and_with_entries_in_quarantine_or_dropped_from_it_goes_too', async () => {
  const sid = await finalCall(calls, 1200)
  await calls.storeSettled(
    turn(sid, 0),
    turn(sid, 1199),
    { ...recording(sid), id: 'r' },
    { ...recording(sid), id: 'r' },
  )
  await calls.foreign(sid, [
    ['e', 'unreadable'],
    ['e', '{"type":"turn"}'],
    ['no', 'event'],
  ])
  await isFinal(calls, sid)
  const [first] = await calls.quarantined(sid)
  expect(await dropQuarantined(calls.stack.database.pool, { ids: [String(first!.id)] })).toBe(1)
  expect(await calls.stack.redis.client.xlen(streamOf(calls.stack.redis, sid))).toBe(1208)
  expect(await retentionOf(calls).round()).toBe(1)
  expect(await tracesOf(calls, sid)).toEqual([])
})

test('what_has_to_stay_is_not_asked_for_again_until_its_time_comes_and_goes_once_it_is_stored', async () => {
  const sid = await finalCall(calls)
  await calls.query('CREATE TABLE saved AS SELECT * FROM call_transcript_turns WHERE call_sid = $1', sid)
  await calls.query('DELETE FROM call_transcript_turns WHERE call_sid = $1', sid)
  let asked = 0
  const query = (question: never) => {
    asked++
    return calls.stack.database.pool.query(question)
  }
  const pool = { query } as unknown as Pool
  const { round, metrics } = retentionOf(calls, {}, { pool })
  for (let i = 0; i < 3; i++) await round()
  expect(asked).toBe(1)
  await calls.query('INSERT INTO call_transcript_turns SELECT * FROM saved')
  await comeUpAgain(calls, sid)
  expect(await round()).toBe(1)
  expect(await tracesOf(calls, sid)).toEqual([])
  await round()
  expect((await metrics.shared.keptCalls.get()).values[0]?.value).toBe(0)
})

test('two_sinks_purge_together', async () => {
  const sids = await finalCalls(calls, 230)
  const sinks = [retentionOf(calls), retentionOf(calls), retentionOf(calls)]
  const purged = await Promise.all(sinks.map(({ round }) => round()))
  expect(purged.reduce((sum, n) => sum + n)).toBe(sids.length)
  expect(purged.filter((n) => n > 0).length, 'they share the work').toBeGreaterThan(1)
  for (const sid of sids) expect(await tracesOf(calls, sid)).toEqual([])
})

test('what_comes_between_the_look_and_the_purge_keeps_its_call_whose_retention_begins_anew', async () => {
  const sid = await finalCall(calls)
  await comeUpAgain(calls, sid)
  const late = async () => void (await calls.storeSettled(recording(sid)))
  const redis = beforePurge(calls.stack.redis.client, late)
  const retentionMs = 60_000
  expect(await retentionOf(calls, { retentionMs }, { redis }).round()).toBe(0)
  expect(await tracesOf(calls, sid)).toEqual(['stream', 'session', 'ended'])
  expect(await calls.session(sid)).toMatchObject({ recording_url: 'https://example.com/r.mp3' })
  expect(await retentionOf(calls, { retentionMs }).round()).toBe(0)
  expect(await retentionOf(calls).round()).toBe(1)
})

test('a_late_event_folds_into_the_row_of_a_purged_call_which_goes_again', async () => {
  const sid = await finalCall(calls)
  await retentionOf(calls).round()
  const before = await calls.session(sid)
  await calls.storeSettled(recording(sid), turn(sid, 1)) // the turn was stored before the purge: the same key
  const after = await until('it is folded', async () => {
    const row = await calls.session(sid)
    return row?.recording_url ? row : undefined
  })
  expect({ ...after, finalized_at: null, last_event_at: null }).toEqual({
    ...before,
    recording_url: 'https://example.com/r.mp3',
    finalized_at: null,
    last_event_at: null,
  })
  expect(after.finalized_at).not.toBeNull()
  expect(await calls.turns(sid)).toHaveLength(2)

  const report = await compareStores(calls.stack.config, sid, { from: '-', to: '+' }, 0)
  expect(report).toMatchObject({ wrong: 0, counts: { duplicates: 1, events: 1, rows_without_entry: 3 } })
  const environment = { REDIS_URL: calls.stack.redis.url, DATABASE_URL: calls.stack.database.url }
  const shown = JSON.parse((await calltape(['show', sid, '--json'], environment)).out) as { turns: object[] }
  expect(shown.turns).toMatchObject(seqs(2).map((seq) => ({ seq, inPostgres: true, inRedis: seq === 1 })))

  // Redis does not remember that it had ended; PostgreSQL does, so nobody presumes anything.
  await calls.stack.redis.client.zadd(calls.stack.redis.partitions.of(sid).open, 'XX', 1, sid)
  await isFinal(calls, sid)
  expect(await calls.session(sid)).toEqual(after)
  expect(await calls.query('SELECT FROM call_events WHERE call_sid = $1', sid)).toHaveLength(2)
  expect(await retentionOf(calls).round()).toBe(1)
  expect(await tracesOf(calls, sid)).toEqual([])
})

test('a_session_whose_stream_is_lost_goes_with_its_retention', async () => {
  const sid = await finalCall(calls)
  await calls.stack.redis.client.del(streamOf(calls.stack.redis, sid))
  expect(await retentionOf(calls).round()).toBe(1)
  expect(await tracesOf(calls, sid)).toEqual([])
})

test('keys_of_others_and_names_that_postgresql_cannot_hold_stop_nobody', async () => {
  const { client, partitions } = calls.stack.redis
  const [foreign, whole] = (await finalCalls(calls, 2)) as [string, string]
  await client.set(streamOf(calls.stack.redis, foreign), 'of somebody else')
  const odd = 'a\0b'
  await client.xadd(streamOf(calls.stack.redis, odd), '*', 'e', 'x')
  await client.xgroup('CREATE', streamOf(calls.stack.redis, odd), 'sink', '$')
  await client.zadd(partitions.of(odd).ended, 1, odd)
  await client.set(sessionOf(calls.stack.redis, odd), 'of somebody else')
  expect(await retentionOf(calls).round()).toBe(1)
  expect(await tracesOf(calls, whole)).toEqual([])
  expect(await tracesOf(calls, foreign)).toContain('stream')
  expect(await tracesOf(calls, odd)).toContain('stream')
  for (const sid of [foreign, odd]) {
    await client.del(streamOf(calls.stack.redis, sid), sessionOf(calls.stack.redis, sid))
    for (const list of ['ended', 'kept'] as const) await client.zrem(partitions.of(sid)[list], sid)
  }
})

test('a_sink_removes_what_is_past_its_retention_and_with_off_it_keeps_all', async () => {
  const sid = await finalCall(calls)
  await comeUpAgain(calls, sid)
  const [keeping] = calls.stack.sinks
  // A round a second: the sink that keeps all has had its chance when another call has come and gone.
  expect(await calls.metric('purged_calls_total', keeping)).toBe(0)
  const removing = await startSink({ ...calls.stack.config, STREAM_RETENTION: 0 }, log)
  onTestFinished(() => removing.stop())
  await until('it is gone', async () => (await tracesOf(calls, sid)).length === 0)
  const next = await finalCallIn(calls)
  await until('the next one, too', async () => (await tracesOf(calls, next)).length === 0)
  expect(await calls.metric('purged_calls_total', keeping)).toBe(0)
  expect(await calls.metric('purged_calls_total', removing)).toBe(2)
})

/** It may be gone before it is seen to be final. */
async function finalCallIn({ producer }: Calls): Promise<string> {
  const sid = `short-${Date.now()}`
  await producer.store(turn(sid, 0), ended(sid, 1))
  await until('it is settled', async () => {
    const places = await placesOf(calls.stack.redis, sid)
    return !('ready' in places || 'leased' in places)
  })
  return sid
}
