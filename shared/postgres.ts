/** The one place that constructs PostgreSQL connections. */
import pg from 'pg'
import type { DatabaseConfig } from './config.js'
import { PooledClient, pooledClient } from './pooled-client.js'

export type { Pool, PoolClient } from 'pg'

/** For what SQL cannot take as a parameter. */
export const { escapeIdentifier, escapeLiteral } = pg

/**
 * Unqualified names are calltape's own schema's, and nothing else's: with `public` behind it, `call_sessions` would be another
 * application's table wherever calltape's is not there.
 *
 * @param database where it is, and whether a pooler is in between
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
  const all = { TimeZone: 'UTC', search_path: database.DATABASE_SCHEMA, ...settings }
  const common = { max, application_name: `calltape-${name}`, connectionTimeoutMillis: 10_000, keepAlive: true }
  const pool =
    database.DATABASE_POOLER === 'transaction'
      ? new pg.Pool({ ...common, connectionString: database.DATABASE_URL, Client: pooledClient(withoutSockets(all)) })
      : new pg.Pool({ ...common, ...withOptions(database.DATABASE_URL, { ...all, [KEPT]: 'true' }) })
  pool.on('error', () => undefined) // says again of an idle connection what the connection said itself
  // On each connection, not on the pool alone: one that breaks while it is in use or being closed would end the process.
  pool.on('connect', (client) => client.on('error', onError))
  return pool
}

/**
 * A setting of ours, without effect: only where it is there has a connection got what it asked for when it was made. (A custom name,
 * with a dot in it: PostgreSQL takes it from everybody.)
 */
export const KEPT = 'calltape.settings_kept'

/** Behind a pooler these would be of its own connection to PostgreSQL, which is none of a dead sink's. */
const withoutSockets = (settings: Record<string, string>) =>
  Object.fromEntries(Object.entries(settings).filter(([name]) => !name.startsWith('tcp_')))

/** In the URL, options would take the place of ours; in front of them, ours win where both set the same. */
function withOptions(databaseUrl: string, settings: Record<string, string>): pg.PoolConfig {
  const url = new URL(databaseUrl)
  const given = url.searchParams.getAll('options')
  if (given.length > 0) url.searchParams.delete('options')
  const ours = Object.entries(settings).map(([name, value]) => `-c ${name}=${value}`)
  const connectionString = given.length > 0 ? url.href : databaseUrl
  return { connectionString, options: [...given, ...ours].join(' ') }
}

/** Whether it goes through a pooler that lends it a connection for each transaction: what it leaves there is not there for the next. */
export const isPooled = (client: pg.PoolClient): boolean => client instanceof PooledClient

/** The SQLSTATE of an error of PostgreSQL, undefined for any other error. */
export function sqlState(error: unknown): string | undefined {
  return error instanceof pg.DatabaseError ? error.code : undefined
}

/** Where in a function (a trigger's, say) PostgreSQL's error was raised; undefined when it was the statement's own. */
export function raisedIn(error: unknown): string | undefined {
  return error instanceof pg.DatabaseError ? error.where?.split('\n')[0] : undefined
}
