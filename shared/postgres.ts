/** The one place that constructs PostgreSQL connections. */
import pg from 'pg'

export type { Pool, PoolClient } from 'pg'

/**
 * @param url postgres://user:password@host:port/database
 * @param name what the connections are called in pg_stat_activity
 * @param max most connections at once
 * @param onError told of a connection that broke; whatever runs on it fails by itself, the pool opens another
 * @param settings of PostgreSQL, for each connection
 */
export function createPool(
  url: string,
  name: string,
  max: number,
  onError: (error: Error) => void = () => undefined,
  settings: Record<string, string> = {},
): pg.Pool {
  // Times in full_transcript are written with their zone: keep it the same everywhere.
  const all = Object.entries({ TimeZone: 'UTC', ...settings })
  const pool = new pg.Pool({
    connectionString: url,
    max,
    application_name: `calltape-${name}`,
    connectionTimeoutMillis: 10_000,
    keepAlive: true,
    options: all.map(([name, value]) => `-c ${name}=${value}`).join(' '),
  })
  pool.on('error', () => undefined) // says again of an idle connection what the connection said itself
  // On each connection, not on the pool alone: one that breaks while it is in use or being closed would end the process.
  pool.on('connect', (client) => client.on('error', onError))
  return pool
}

/** The SQLSTATE of an error of PostgreSQL, undefined for any other error. */
export function sqlState(error: unknown): string | undefined {
  return error instanceof pg.DatabaseError ? error.code : undefined
}
