/** The schema in shards: hash-partitioned as the README has it, with all of calltape on it; and what Citus asks of a schema. */
import { expect, onTestFinished, test } from 'vitest'
import { readPackageFile } from '../shared/package-root.js'
import { createPool } from '../shared/postgres.js'
import { migrate } from '../shared/schema.js'
import { writeSettings } from '../sink/write.js'
import { Calls, ended, newSid, seqs } from './support/calls.js'
import { calltape } from './support/program.js'
import { freshDatabase, startTestStack } from './support/stores.js'
import { turn } from './support/streams.js'

const DISTRIBUTED = ['call_events', 'call_sessions', 'call_transcript_turns']

/** The block of the README that begins with this comment or statement. */
function sqlOfReadme(beginning: string): string {
  const [, sql] = readPackageFile('README.md').split(`\`\`\`sql\n${beginning}`)
  if (sql === undefined) throw new Error(`README.md has no SQL that begins with ${beginning}`)
  return beginning + sql.split('```')[0]
}

test('all_works_on_partitioned_tables_and_what_was_there_before_is_there_afterwards', async () => {
  const database = await freshDatabase()
  const stack = await startTestStack({ DATABASE_URL: database.url })
  onTestFinished(async () => {
    await stack.end()
    await database.drop()
  })
  const calls = new Calls({ ...stack, database })
  const [before, across, after, late] = [newSid(), newSid(), newSid(), newSid()]
  const whole = (sid: string) => [...seqs(20).map((seq) => turn(sid, seq)), { ...ended(sid, 20), id: 'end' }]
  await calls.storeSettled(...whole(before), ...seqs(10).map((seq) => turn(across, seq)))
  const indexes = `SELECT c.relname AS name FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid
    JOIN pg_class t ON t.oid = i.indrelid WHERE t.relname = ANY($1) ORDER BY name`
  const names = await calls.query(indexes, DISTRIBUTED)

  await calls.stop()
  await database.pool.query(sqlOfReadme('-- 16 partitions each'))
  await calls.start()

  expect(await calls.query(indexes, DISTRIBUTED)).toEqual(names)
  const [parts] = await calls.query(
    `SELECT count(*)::int AS n FROM pg_inherits WHERE inhparent = 'call_transcript_turns'::regclass`,
  )
  expect(parts).toEqual({ n: 16 })
  expect(await migrate(database.config)).toEqual([])
  expect((await calls.turns(before)).length).toBe(20)
  await calls.storeSettled(...whole(across), ...whole(after), ...whole(late).slice(1))
  await calls.storeSettled(...whole(after), ...whole(late)) // again: through staging; and what came late
  for (const sid of [before, across, after, late]) {
    expect(await calls.session(sid)).toMatchObject({ complete: true, turn_count: 20 })
    expect((await calls.turns(sid)).map((row) => row.seq)).toEqual(seqs(20))
  }
  expect(await calls.metric('staged_batches_total')).toBeGreaterThan(0)
  expect(await calls.metric('retries_total')).toBe(0)

  // Of each call, its own partition alone is looked into, by its key; also by the plan that is made once for all batches.
  const pool = createPool(database.config, 'test', 1, undefined, writeSettings(10_000, 10_000))
  const client = await pool.connect()
  await client.query(`PREPARE fold AS ${readPackageFile('sink/fold.sql')}`)
  const now = new Date().toISOString()
  const explained = await client.query<{ 'QUERY PLAN': string }>(
    `EXPLAIN (ANALYZE, COSTS OFF) EXECUTE fold('{${across}}', '{${now}}', '{${now}}')`,
  )
  client.release()
  await pool.end()
  const scans = explained.rows
    .map((row) => row['QUERY PLAN'])
    .filter((line) => / Scan .*\bcall_(events|transcript_turns)_\d+/.test(line))
  expect(scans.filter((line) => line.includes('Seq Scan'))).toEqual([])
  expect(scans.filter((line) => line.includes('never executed')).length).toBeGreaterThanOrEqual(30)
  expect(scans.filter((line) => !line.includes('never executed')).length).toBeLessThanOrEqual(4) // a bitmap's scan has two lines

  await calls.query('DELETE FROM call_transcript_turns WHERE call_sid = $1', before)
  const environment = { REDIS_URL: stack.redis.url, DATABASE_URL: database.url }
  for (const [args, said] of [
    [['replay', '--call', before], /20/],
    [['replay', '--all', '--schema', 'rebuilt'], /./], // not partitioned; exit code 0 says that they are the same
    [['verify'], /Everything is there/],
    [['export', after, '--format', 'json'], /"turns"/],
    [['erase', after], /./],
  ] as const) {
    const { code, out, err } = await calltape([...args], environment)
    expect({ args, code, err }).toMatchObject({ args, code: 0 })
    expect(out).toMatch(said)
  }
  expect(await calls.turns(after)).toEqual([])
})

test('the_schema_allows_for_distribution_by_call_sid', async () => {
  const database = await freshDatabase()
  onTestFinished(() => database.drop())
  const query = async (sql: string) => (await database.pool.query<Record<string, unknown>>(sql, [DISTRIBUTED])).rows
  // Every table with a call_sid of its own is distributed, but for the one that is searched by time.
  expect(
    await query(`SELECT relname AS name FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND attname = 'call_sid'
      WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> ALL($1)`),
  ).toEqual([{ name: 'legacy_held' }])
  // A unique key can only be held within a shard: it has the distribution column. That is never null.
  expect(
    await query(`SELECT indexrelid::regclass AS name FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
      JOIN pg_attribute a ON a.attrelid = c.oid AND attname = 'call_sid'
      WHERE relname = ANY($1) AND indisunique AND NOT a.attnum = ANY(indkey) OR relname = ANY($1) AND NOT attnotnull`),
  ).toEqual([])
  expect(
    await query(`SELECT conname FROM pg_constraint WHERE contype = 'f' AND conrelid = ANY($1::regclass[])`),
  ).toEqual([])
  expect(await query(`SELECT tgname FROM pg_trigger WHERE tgrelid = ANY($1::regclass[]) AND NOT tgisinternal`)).toEqual(
    [],
  )
  // Of one type and collation: then a call's rows are in shards of the same number.
  expect(
    await query(`SELECT DISTINCT atttypid::regtype::text AS type, collname AS collation FROM pg_attribute a JOIN pg_collation l ON l.oid = attcollation
      WHERE attrelid = ANY($1::regclass[]) AND attname = 'call_sid'`),
  ).toEqual([{ type: 'text', collation: 'C' }])
  // Functions run where the rows are, and give the same everywhere.
  expect(
    (
      await database.pool.query(
        `SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND provolatile <> 'i'`,
      )
    ).rows,
  ).toEqual([])
})

test('each_call_is_folded_from_its_own_rows_alone', () => {
  const sql = readPackageFile('sink/fold.sql').replaceAll(/--.*$/gm, '').replaceAll(/\s+/g, ' ')
  const reads = [...sql.matchAll(/FROM (call_\w+)( \w+)? WHERE ([\w.]+) = ([\w.]+)/g)].map(
    ([, table, , left, right]) => [table, left, right],
  )
  expect(reads.length).toBe([...sql.matchAll(/FROM call_/g)].length)
  for (const [, left, right] of reads) {
    expect(left).toMatch(/^(o\.)?call_sid$/)
    expect(right).toMatch(/^(b|timed)\.call_sid$/)
  }
})
