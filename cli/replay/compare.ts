/** `replay --schema`: is what was rebuilt the same as what DATABASE_SCHEMA has? Found out by PostgreSQL; no text leaves it. */
import type { Partitions } from '../../shared/keys.js'
import { escapeIdentifier, escapeLiteral, type Pool } from '../../shared/postgres.js'
import type { RedisClient } from '../../shared/redis.js'
import { entryMs } from '../../sink/decode.js'
import { readProgress, streamInfo } from '../streams.js'
import type { Comparison, Difference } from './report.js'

const TABLES = [
  { name: 'call_transcript_turns', key: 'turn_id' },
  { name: 'call_events', key: 'event_id' },
  { name: 'call_sessions', key: undefined },
] as const
/** When a row was written is not what was said. */
const NOT_COMPARED = ['persisted_at']
const EXAMPLES = 10
const PAGE = 10_000

interface Compared {
  pool: Pool
  /** DATABASE_SCHEMA. */
  main: string
  /** The one that was rebuilt. */
  other: string
  /** Only this call. */
  callSid: string | undefined
  /** Where it can be asked which calls went on meanwhile. */
  redis: RedisClient | undefined
  partitions: Partitions
  /** When the replay began, epoch ms. */
  sinceMs: number
}

/**
 * Of the calls that the other schema has: what retention has taken out of Redis cannot have been rebuilt. A call that differs and
 * has had news since the replay began, or has entries that are not committed, is live: it is not judged.
 */
export async function compareSchemas(compared: Compared): Promise<Comparison> {
  const { pool, other, callSid } = compared
  const { rows } = await pool.query<{ calls: number }>(
    `SELECT count(*)::int AS calls FROM ${escapeIdentifier(other)}.call_sessions WHERE $1::text IS NULL OR call_sid = $1`,
    [callSid ?? null],
  )
  const found: Comparison = { calls: rows[0]!.calls, missing: 0, extra: 0, different: 0, live: 0, examples: [] }
  const live = new Map<string, boolean>()
  for (const table of TABLES) {
    for await (const difference of differences(compared, table)) {
      const { call_sid: differing } = difference
      if (!live.has(differing)) live.set(differing, await isLive(compared, differing))
      if (live.get(differing)) continue
      found[difference.kind]++
      if (found.examples.length < EXAMPLES) found.examples.push(difference)
    }
  }
  found.live = [...live.values()].filter(Boolean).length
  return found
}

async function isLive({ redis, partitions, sinceMs }: Compared, callSid: string): Promise<boolean> {
  if (!redis) return false
  const place = { callSid, partition: partitions.of(callSid) }
  const info = await streamInfo(redis, place)
  if (!info) return false
  return entryMs(info.last) >= sinceMs || (await readProgress(redis, place)).cursor !== info.last
}

async function* differences(compared: Compared, { name, key }: (typeof TABLES)[number]): AsyncGenerator<Difference> {
  const { pool, main, other, callSid } = compared
  const columns = await columnsOf(pool, other, name)
  const row = (alias: string) => `(${columns.map((column) => comparedValue(alias, column)).join(', ')})`
  const ofTheCall = callSid === undefined ? '' : `call_sid = ${escapeLiteral(callSid)} AND`
  const ofTheCalls = (schema: string) =>
    `(SELECT * FROM ${escapeIdentifier(schema)}.${name} o WHERE ${ofTheCall}
      EXISTS (SELECT FROM ${escapeIdentifier(other)}.call_sessions s WHERE s.call_sid = o.call_sid))`
  const sql = `
    SELECT call_sid, ${key ?? 'NULL::text'} AS key,
      CASE WHEN b.call_sid IS NULL THEN 'missing' WHEN a.call_sid IS NULL THEN 'extra' ELSE 'different' END AS kind
    FROM ${ofTheCalls(main)} a FULL JOIN ${ofTheCalls(other)} b USING (call_sid${key ? `, ${key}` : ''})
    WHERE a.call_sid IS NULL OR b.call_sid IS NULL OR ${row('a')} IS DISTINCT FROM ${row('b')}`
  const client = await pool.connect()
  try {
    await client.query('BEGIN READ ONLY')
    await client.query(`DECLARE differences NO SCROLL CURSOR FOR ${sql}`)
    for (;;) {
      const { rows } = await client.query<Omit<Difference, 'table'> & { key: string | null }>(
        `FETCH ${PAGE} FROM differences`,
      )
      for (const { call_sid, kind, key: its } of rows) {
        yield { call_sid, kind, table: name, ...(its === null ? {} : { key: its }) }
      }
      if (rows.length < PAGE) break
    }
    await client.query('COMMIT')
  } finally {
    client.release(true)
  }
}

async function columnsOf(pool: Pool, schema: string, table: string): Promise<string[]> {
  const { rows } = await pool.query<{ name: string }>(
    `SELECT column_name AS name FROM information_schema.columns
     WHERE table_schema = $1 AND table_name = $2 AND column_name <> ALL($3) ORDER BY ordinal_position`,
    [schema, table, NOT_COMPARED],
  )
  return rows.map((row) => row.name)
}

/** When a call was finalized is not compared, but whether it is; and while it is live, last_event_at may be some seconds old. */
function comparedValue(alias: string, column: string): string {
  if (column === 'finalized_at') return `${alias}.finalized_at IS NULL`
  if (column === 'last_event_at') return `CASE WHEN ${alias}.finalized_at IS NOT NULL THEN ${alias}.last_event_at END`
  return `${alias}.${escapeIdentifier(column)}`
}
