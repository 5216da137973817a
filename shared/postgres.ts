/** The one place that constructs PostgreSQL connections. */
import pg from 'pg'
import type { DatabaseConfig } from './config.js'

export type { Pool, PoolClient } from 'pg'

/** For what SQL cannot take as a parameter. */
export const { escapeIdentifier, escapeLiteral } = pg

/**
 * Unqualified names are calltape's own schema's, and nothing else's: with `public` behind it, `call_sessions` would be another
 * application's table wherever calltape's is not there.
 *
 * @param database DATABASE_URL: postgres://user:password@host:port/database
 * @param name what the connections are called in pg_stat_activity
 * @param max most connections at once
 * @param onError told of a connection that broke; whatever runs on it fails by itself, the pool opens another
 * @param settings of PostgreSQL, for each connection
 */
export function createPool(
  database: DatabaseConfig,
  name: string,
  max: number,
  onError: (error: Error) => void = () => undefined,
  settings: Record<string, string> = {},
): pg.Pool {
  // Times in full_transcript are written with their zone: keep it the same everywhere.
  const all = Object.entries({ TimeZone: 'UTC', search_path: database.DATABASE_SCHEMA, ...settings })
  const { url, options } = withoutOptions(database.DATABASE_URL)
  const pool = new pg.Pool({
    connectionString: url,
    max,
    application_name: `calltape-${name}`,
    connectionTimeoutMillis: 10_000,
    keepAlive: true,
    options: [...options, ...all.map(([name, value]) => `-c ${name}=${value}`)].join(' '),
  })
  pool.on('error', () => undefined) // says again of an idle connection what the connection said itself
  // On each connection, not on the pool alone: one that breaks while it is in use or being closed would end the process.
  pool.on('connect', (client) => client.on('error', onError))
  return pool
}

/** In the URL they would take the place of ours; in front of them, ours win where both set the same. */
function withoutOptions(databaseUrl: string): { url: string; options: string[] } {
  const url = new URL(databaseUrl)
  const options = url.searchParams.getAll('options')
  if (options.length === 0) return { url: databaseUrl, options }
  url.searchParams.delete('options')
  return { url: url.href, options }
}

/** The SQLSTATE of an error of PostgreSQL, undefined for any other error. */
export function sqlState(error: unknown): string | undefined {
  return error instanceof pg.DatabaseError ? error.code : undefined
}

/** Where in a function (a trigger's, say) PostgreSQL's error was raised; undefined when it was the statement's own. */
export function raisedIn(error: unknown): string | undefined {
  return error instanceof pg.DatabaseError ? error.where?.split('\n')[0] : undefined
}
