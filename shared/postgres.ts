/** The one place that constructs PostgreSQL connections. */
import pg from 'pg'

export type { Client, Pool, PoolClient } from 'pg'

/**
 * @param url postgres://user:password@host:port/database
 * @param name what the connections are called in pg_stat_activity
 * @param max most connections at once
 */
export function createPool(url: string, name: string, max: number): pg.Pool {
  return new pg.Pool({
    connectionString: url,
    max,
    application_name: `calltape-${name}`,
    connectionTimeoutMillis: 5000,
    keepAlive: true,
    options: '-c TimeZone=UTC', // times in full_transcript are written with their zone; keep it the same everywhere
  })
}

/** The SQLSTATE of an error of PostgreSQL, undefined for any other error. */
export function sqlState(error: unknown): string | undefined {
  return error instanceof pg.DatabaseError ? error.code : undefined
}
