/** The PostgreSQL schema: plain SQL files in migrations/, run by node-pg-migrate, and the check that a sink's code fits. */
import { readdirSync } from 'node:fs'
import { join, parse } from 'node:path'
import { runner } from 'node-pg-migrate'
import { OperatorError } from './config.js'
import { reasonOf } from './log.js'
import { PACKAGE_ROOT } from './package-root.js'
import { createPool, type Pool, sqlState } from './postgres.js'

const MIGRATIONS = join(PACKAGE_ROOT, 'migrations')
const MIGRATIONS_TABLE = 'calltape_migrations'
const UNDEFINED_TABLE = '42P01'

/**
 * Brings the database to this version's schema. Safe to run from several places at once: one runs, the others wait.
 *
 * @returns the names of the migrations that were run, in order; none when it was up to date
 * @throws OperatorError when there is no such database, or a newer calltape migrated it
 */
export async function migrate(databaseUrl: string, say: (line: string) => void = () => {}): Promise<string[]> {
  const pool = createPool(databaseUrl, 'migrate', 1)
  try {
    await requireReachable(pool, databaseUrl)
    const { newer } = await compareSchema(pool)
    if (newer.length > 0) throw new OperatorError(newerMessage(newer))
    const client = await pool.connect()
    try {
      const done = await runner({
        dbClient: client,
        dir: MIGRATIONS,
        migrationsTable: MIGRATIONS_TABLE,
        direction: 'up',
        advisoryLockMode: 'wait',
        logger: { debug() {}, info() {}, warn: say, error: say },
      })
      return done.map((migration) => migration.name)
    } finally {
      client.release()
    }
  } finally {
    await pool.end()
  }
}

/** @throws OperatorError when PostgreSQL does not answer, or has no such database */
export async function requireReachable(pool: Pool, url: string): Promise<void> {
  try {
    await pool.query('SELECT 1')
  } catch (error) {
    const { host, pathname } = new URL(url)
    throw new OperatorError(`DATABASE_URL: no PostgreSQL answers at ${host}${pathname}: ${reasonOf(error as Error)}`)
  }
}

/** @throws OperatorError when the database's schema is older or newer than this code */
export async function requireSchema(pool: Pool): Promise<void> {
  const { missing, newer } = await compareSchema(pool)
  if (newer.length > 0) throw new OperatorError(newerMessage(newer))
  if (missing.length > 0) {
    throw new OperatorError(
      `DATABASE_URL: the database's schema is older than this calltape (missing: ${missing.join(', ')}). Run: calltape migrate`,
    )
  }
}

async function compareSchema(pool: Pool): Promise<{ missing: string[]; newer: string[] }> {
  const known = readdirSync(MIGRATIONS)
    .filter((file) => file.endsWith('.sql'))
    .map((file) => parse(file).name)
    .sort()
  const applied = await appliedMigrations(pool)
  return {
    missing: known.filter((name) => !applied.includes(name)),
    newer: applied.filter((name) => !known.includes(name)),
  }
}

async function appliedMigrations(pool: Pool): Promise<string[]> {
  try {
    const { rows } = await pool.query<{ name: string }>(`SELECT name FROM ${MIGRATIONS_TABLE} ORDER BY run_on, name`)
    return rows.map((row) => row.name)
  } catch (error) {
    if (sqlState(error) === UNDEFINED_TABLE) return []
    throw error
  }
}

function newerMessage(newer: string[]): string {
  return `DATABASE_URL: the database's schema is newer than this calltape (it has ${newer.join(', ')}). Update calltape.`
}
