/** What Redis and PostgreSQL have of a call, and its removal from each of them. */
import { callSidInSql, type Partitions, sessionKey, streamKey } from '../../shared/keys.js'
import { escapeIdentifier, type Pool } from '../../shared/postgres.js'
import type { RedisClient } from '../../shared/redis.js'
import { Script } from '../../shared/script.js'
import { storable } from '../../sink/decode.js'

const eraseScript = new Script('cli/erase/erase.lua')

export interface InRedis {
  /** It is open, waits for a sink, or is with one. */
  live: boolean
  /** For how long a sink may work on it, ms; undefined: none does. 0: it has given no sign of life in time. */
  leaseMs: number | undefined
  entries: number
  sessions: number
  /** In how many of its partition's lists it is. */
  lists: number
  removed: boolean
}

/** @param how see erase.lua */
export async function eraseInRedis(
  client: RedisClient,
  partitions: Partitions,
  callSid: string,
  how: 'look' | 'ended' | 'any',
): Promise<InRedis> {
  const partition = partitions.of(callSid)
  const place = { callSid, partition }
  const { ready, leased, open, ended, kept } = partition
  const keys = [ready, leased, open, ended, kept, streamKey(place), sessionKey(place)]
  const reply = (await eraseScript.run(client, keys, [callSid, how])) as number[]
  const [live, leaseMs, entries, sessions, lists, removed] = reply as [number, number, number, number, number, number]
  return {
    live: live === 1,
    leaseMs: leaseMs < 0 ? undefined : leaseMs,
    entries,
    sessions,
    lists,
    removed: removed === 1,
  }
}

/** Where it is, by the column that says of which call a row is. */
const TABLES: readonly { table: string; callSid: string }[] = [
  { table: 'call_transcript_turns', callSid: 'call_sid' },
  { table: 'call_events', callSid: 'call_sid' },
  { table: 'call_sessions', callSid: 'call_sid' },
  { table: 'quarantined_events', callSid: callSidInSql('stream_key') }, // dropped ones, too: their reason may quote
  { table: 'legacy_held', callSid: 'call_sid' },
]

export type Rows = { table: string; rows: number }[]

export async function countInPostgres(pool: Pool, callSid: string): Promise<Rows> {
  const counts = TABLES.map(
    ({ table, callSid }) => `(SELECT count(*)::int FROM ${table} WHERE ${callSid} = $1) AS ${table}`,
  )
  const { rows } = await pool.query<Record<string, number>>(`SELECT ${counts.join(', ')}`, [storable(callSid)])
  return TABLES.map(({ table }) => ({ table, rows: rows[0]![table]! }))
}

/**
 * In one transaction. Its row in call_sessions is locked before all else, as whoever folds the call does it: neither waits for the
 * other while that waits for it.
 */
export async function eraseInPostgres(pool: Pool, callSid: string): Promise<Rows> {
  const client = await pool.connect()
  let isFit = false
  try {
    await client.query('BEGIN')
    await client.query('SELECT FROM call_sessions WHERE call_sid = $1 FOR UPDATE', [storable(callSid)])
    const erased: Rows = []
    for (const { table, callSid: column } of TABLES) {
      const { rowCount } = await client.query(`DELETE FROM ${table} WHERE ${column} = $1`, [storable(callSid)])
      erased.push({ table, rows: rowCount ?? 0 })
    }
    await client.query('COMMIT')
    isFit = true
    return erased
  } finally {
    client.release(!isFit)
  }
}

/**
 * @param table of LEGACY_CALL_SESSIONS
 * @returns how many rows the other application has of the call; undefined when that cannot be asked
 */
export async function countLegacyRows(
  pool: Pool,
  table: { schema: string; table: string },
  callSid: string,
): Promise<number | undefined> {
  const name = `${escapeIdentifier(table.schema)}.${escapeIdentifier(table.table)}`
  const sql = `SELECT count(*)::int AS rows FROM ${name} WHERE call_sid::text = $1`
  const found = await pool.query<{ rows: number }>(sql, [storable(callSid)]).catch(() => undefined)
  return found?.rows[0]?.rows
}
