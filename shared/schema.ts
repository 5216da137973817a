/** The PostgreSQL schema: plain SQL files in migrations/, run by node-pg-migrate, and the check that a sink's code fits. */
import { readdirSync } from 'node:fs'
import { join, parse } from 'node:path'
import { runner } from 'node-pg-migrate'
import { type DatabaseConfig, OperatorError } from './config.js'
import { reasonOf } from './log.js'
import { PACKAGE_ROOT, readPackageFile } from './package-root.js'
import { createPool, escapeIdentifier, KEPT, type Pool, type PoolClient, sqlState } from './postgres.js'
import { isOfLocks, LOCK_PATIENCE, type LockPatience, retryForLocks } from './table-locks.js'

const MIGRATIONS = join(PACKAGE_ROOT, 'migrations')
const MIGRATIONS_TABLE = 'calltape_migrations'
/** Not node-pg-migrate's own: another application's migrations may use that at the same time, and fail instead of waiting. */
const LOCK = '7165902394410628403'
const UNDEFINED_COLUMN = '42703'
const NO_PRIVILEGE = '42501'

/**
 * Brings the database to this version's schema. Safe to run from several places at once: one runs, the others wait. It is
 * one transaction: what fails half way leaves nothing. It keeps sinks that write meanwhile waiting for some seconds at most.
 *
 * @returns the names of the migrations that were run, in order; none when it was up to date
 * @throws OperatorError when there is no such database, something there is not calltape's, a newer calltape migrated it, or
 *   a privilege is missing, or others do not let go of its tables
 */
export async function migrate(
  database: DatabaseConfig,
  say: (line: string) => void = () => {},
  patience: LockPatience = LOCK_PATIENCE,
): Promise<string[]> {
  const pool = createPool(database, 'migrate', 1)
  try {
    await requireReachable(pool, database)
    return await retryForLocks(pool, () => migrateOnce(pool, database, say, patience.lockMs), say, patience)
  } catch (error) {
    if (sqlState(error) !== NO_PRIVILEGE) throw error
    throw new OperatorError(`DATABASE_URL: its user lacks a privilege: ${reasonOf(error as Error)}`)
  } finally {
    await pool.end()
  }
}

async function migrateOnce(pool: Pool, database: DatabaseConfig, say: (line: string) => void, lockMs: number) {
  const client = await pool.connect()
  const complaints: string[] = []
  try {
    return await runMigrations(client, database, { say, lockMs, complain: (line) => complaints.push(line) })
  } catch (error) {
    if (!isOfLocks(error)) for (const line of complaints) say(line)
    throw error
  } finally {
    client.release(true) // with it goes the lock, and whatever was not committed
  }
}

interface Run {
  say(line: string): void
  /** Told which statement failed, and that it is rolled back. */
  complain(line: string): void
  lockMs: number
}

async function runMigrations(client: PoolClient, database: DatabaseConfig, { say, complain, lockMs }: Run) {
  // The BEGIN and COMMIT of the runner's `singleTransaction` are then this transaction's: lock, schema and migrations table are in it.
  await client.query('BEGIN')
  // The transaction's: through a pooler, one of the connection's would stay where nobody finds it again.
  await client.query(`SELECT pg_advisory_xact_lock(${LOCK})`)
  const { missing, newer, strangers } = await compareSchema(client, database)
  if (strangers.length > 0) throw new OperatorError(strangersMessage(database, strangers))
  if (newer.length > 0) throw new OperatorError(newerMessage(newer))
  if (missing.length === 0) {
    await client.query('ROLLBACK') // a pooler would close its connection, too, in the middle of a transaction
    return []
  }
  await prepareSchema(client, database.DATABASE_SCHEMA, say)
  await client.query(`SET LOCAL lock_timeout = ${lockMs}`) // of tables: those who migrate at the same time wait for each other
  const done = await runner({
    dbClient: client,
    dir: MIGRATIONS,
    schema: database.DATABASE_SCHEMA,
    migrationsTable: MIGRATIONS_TABLE,
    direction: 'up',
    singleTransaction: true,
    noLock: true,
    logger: { debug() {}, info() {}, warn: complain, error: complain },
  })
  return done.map((migration) => migration.name)
}

/** Not by IF NOT EXISTS: that wants the privilege to create schemas even where it is there. */
async function prepareSchema(client: PoolClient, schema: string, say: (line: string) => void): Promise<void> {
  const { rows } = await client.query<{ fit: boolean }>(
    `SELECT has_schema_privilege(oid, 'CREATE') AS fit FROM pg_namespace WHERE nspname = $1`,
    [schema],
  )
  if (rows.length === 0) {
    await warnOfNamesake(client, schema, say)
    await client.query(`CREATE SCHEMA ${escapeIdentifier(schema)}`)
  } else if (!rows[0]!.fit) {
    throw new OperatorError(`DATABASE_SCHEMA: the user in DATABASE_URL lacks the privilege CREATE on schema ${schema}`)
  }
}

/** By default, a role's search_path is "$user", public: whatever is in a schema of its own name comes before what is in public. */
async function warnOfNamesake(client: PoolClient, schema: string, say: (line: string) => void): Promise<void> {
  const { rows } = await client.query('SELECT FROM pg_roles WHERE rolname = $1 AND rolcanlogin', [schema])
  if (rows.length === 0) return
  const hidden = (await findObjects(client, 'public', ownNames())).filter(({ kind }) => /table|view/.test(kind))
  if (hidden.length === 0) return
  const names = hidden.map(({ name }) => `public.${name}`).join(', ')
  say(
    `warning: DATABASE_SCHEMA: there is a role ${schema}, too. Once it may use schema ${schema}, it finds calltape's tables there before ${names}. If another application logs in as ${schema}: set DATABASE_SCHEMA to another name, migrate again, drop schema ${schema}`,
  )
}

/** @throws OperatorError when PostgreSQL does not answer, or has no such database */
export async function requireReachable(pool: Pool, { DATABASE_URL }: DatabaseConfig): Promise<void> {
  try {
    await pool.query('SELECT 1')
  } catch (error) {
    const { host, pathname } = new URL(DATABASE_URL)
    const reason = reasonOf(error as Error)
    // PgBouncer's words; PostgreSQL itself takes ours.
    const advice = /unsupported startup parameter/.test(reason) ? `, a pooler: ${POOLER_ADVICE}` : ''
    throw new OperatorError(`DATABASE_URL: no PostgreSQL answers at ${host}${pathname}: ${reason}${advice}`)
  }
}

/** @throws OperatorError when the database's schema is another application's, or older or newer than this code */
export async function requireSchema(pool: Pool, database: DatabaseConfig): Promise<void> {
  const { missing, newer, strangers } = await compareSchema(pool, database)
  if (strangers.length > 0) throw new OperatorError(strangersMessage(database, strangers))
  if (newer.length > 0) throw new OperatorError(newerMessage(newer))
  if (missing.length > 0) {
    throw new OperatorError(
      `DATABASE_URL: the database's schema is older than this calltape (missing: ${missing.join(', ')}). Run: calltape migrate`,
    )
  }
}

interface Comparison {
  /** Migrations that have not been run. */
  missing: string[]
  /** Migrations that this calltape does not know. */
  newer: string[]
  /** What is in the way of those that have not been run, each with its kind. */
  strangers: string[]
}

type Queryable = Pick<Pool, 'query'>

async function compareSchema(client: Queryable, database: DatabaseConfig): Promise<Comparison> {
  await requireSearchPath(client, database)
  const known = knownMigrations()
  // First what is there, then who made it: migrations that are committed in between must not look like a stranger's.
  const there = await findObjects(client, database.DATABASE_SCHEMA, [MIGRATIONS_TABLE, ...known.flatMap(createdBy)])
  const isNoTable = there.some(({ name, kind }) => name === MIGRATIONS_TABLE && kind !== 'table')
  const applied = isNoTable ? undefined : await appliedMigrations(client)
  const missing = known.filter((name) => !applied?.includes(name))
  const wanted = new Set([...missing.flatMap(createdBy), ...(applied ? [] : [MIGRATIONS_TABLE])])
  return {
    missing,
    newer: applied?.filter((name) => !known.includes(name)) ?? [],
    strangers: there.filter(({ name }) => wanted.has(name)).map(({ name, kind }) => `${name} (${kind})`),
  }
}

const POOLER_ADVICE = 'set DATABASE_POOLER=transaction'

/** @throws OperatorError when unqualified names would be another schema's: some poolers ignore what a connection asks for */
async function requireSearchPath(
  client: Queryable,
  { DATABASE_SCHEMA, DATABASE_POOLER }: DatabaseConfig,
): Promise<void> {
  const { rows } = await client.query<{ path: string; kept: string | null; usable: boolean | null }>(
    `SELECT current_setting('search_path') AS path, current_setting('${KEPT}', true) AS kept,
       (SELECT has_schema_privilege(oid, 'USAGE') FROM pg_namespace WHERE nspname = $1) AS usable`,
    [DATABASE_SCHEMA],
  )
  const { path, kept, usable } = rows[0]!
  if (path !== DATABASE_SCHEMA) {
    throw new OperatorError(
      `DATABASE_SCHEMA: connections ask for the search_path ${DATABASE_SCHEMA} and get ${path}: a pooler in DATABASE_URL drops what they ask for, ${POOLER_ADVICE}`,
    )
  }
  if (DATABASE_POOLER !== 'transaction' && kept !== 'true') {
    throw new OperatorError(
      `DATABASE_URL: connections do not get the settings they ask for: a pooler drops them, ${POOLER_ADVICE}`,
    )
  }
  if (usable === false) {
    throw new OperatorError(`DATABASE_SCHEMA: the user in DATABASE_URL lacks the privilege USAGE on schema ${path}`)
  }
}

function knownMigrations(): string[] {
  return readdirSync(MIGRATIONS)
    .filter((file) => file.endsWith('.sql'))
    .map((file) => parse(file).name)
    .sort()
}

const CREATED =
  /^CREATE (?:OR REPLACE )?(?:UNIQUE )?(?:UNLOGGED )?(?:TABLE|INDEX|VIEW|SEQUENCE|TYPE|DOMAIN|FUNCTION) (\w+)/gim

/** The names of what a migration creates: such a statement begins its line there. */
function createdBy(migration: string): string[] {
  const [up = ''] = readPackageFile(`migrations/${migration}.sql`).split('-- Down Migration')
  return [...up.matchAll(CREATED)].map(([, name]) => name!.toLowerCase())
}

/** All names that are calltape's own in its schema. */
export function ownNames(): string[] {
  return [MIGRATIONS_TABLE, ...knownMigrations().flatMap(createdBy)]
}

/** Whatever has one of these names: tables, views and types share them, and a function would be replaced. */
async function findObjects(client: Queryable, schema: string, names: string[]) {
  const { rows } = await client.query<{ name: string; kind: string }>(
    `SELECT relname AS name, CASE relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' WHEN 'v' THEN 'view'
         WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' WHEN 'S' THEN 'sequence' WHEN 'c' THEN 'type'
         ELSE 'index' END AS kind
       FROM pg_class WHERE relnamespace = to_regnamespace($1) AND relname = ANY($2)
     UNION ALL SELECT typname, 'type' FROM pg_type
       WHERE typnamespace = to_regnamespace($1) AND typname = ANY($2) AND typrelid = 0
     UNION ALL SELECT DISTINCT proname, 'function' FROM pg_proc
       WHERE pronamespace = to_regnamespace($1) AND proname = ANY($2)
     ORDER BY name`,
    [escapeIdentifier(schema), names],
  )
  return rows
}

/** @returns undefined when the table of that name is not calltape's */
async function appliedMigrations(client: Queryable): Promise<string[] | undefined> {
  // Not by the error that it is not there: within a transaction, nothing would be answered after one.
  const { rows: found } = await client.query<{ there: boolean }>(
    `SELECT to_regclass('${MIGRATIONS_TABLE}') IS NOT NULL AS there`,
  )
  if (!found[0]!.there) return []
  try {
    const { rows } = await client.query<{ name: string }>(`SELECT name FROM ${MIGRATIONS_TABLE} ORDER BY run_on, name`)
    return rows.map((row) => row.name)
  } catch (error) {
    if (sqlState(error) === UNDEFINED_COLUMN) return undefined
    if (sqlState(error) !== NO_PRIVILEGE) throw error
    throw new OperatorError(`DATABASE_URL: its user may not read calltape's tables: ${reasonOf(error as Error)}`)
  }
}

function newerMessage(newer: string[]): string {
  return `DATABASE_URL: the database's schema is newer than this calltape (it has ${newer.join(', ')}). Update calltape.`
}

function strangersMessage({ DATABASE_SCHEMA }: DatabaseConfig, strangers: string[]): string {
  const what = `${strangers.join(', ')}, ${strangers.length === 1 ? 'which is' : 'which are'} not calltape's`
  const setting = DATABASE_SCHEMA === 'calltape' ? 'DATABASE_SCHEMA to another name' : 'DATABASE_SCHEMA=calltape'
  const advice = `set ${setting} to put calltape's tables into a schema of their own`
  return `DATABASE_SCHEMA: schema ${DATABASE_SCHEMA} has ${what}. Nothing is touched there: ${advice}`
}
