/**
 * legacy: finalized calls into the table of LEGACY_CALL_SESSIONS, in the transaction that finalizes them.
 *
 * That table is another application's, with its own locks, triggers and constraints. It must cost calltape neither an entry
 * nor its pace, and must not see its own trouble grow for calltape:
 * - A row that refuses its values is left as it is, and told; the others are filled, and the call is stored all the same.
 * - A row that is locked is waited for a moment, and then left for later: its call is noted in `legacy_held`, by the transaction
 *   that finalizes it. Any process that fills the table takes it from there, in a transaction of its own, until the row is free.
 * - What the whole table fails with (it is gone, a privilege is missing) fails the batch like any other error of PostgreSQL.
 */
import { type DatabaseConfig, OperatorError } from '../shared/config.js'
import { escapeIdentifier, type Pool, type PoolClient, raisedIn, sqlState } from '../shared/postgres.js'
import { type LegacyTable, lookAtLegacyTable, type TableName } from './legacy-table.js'
import { LegacyFailure, verdictOn } from './verdict.js'

/**
 * For all locks that are waited for while others are held. Shorter than the time after which PostgreSQL would look for a deadlock,
 * and end the other's transaction.
 */
const LOCK_MS = 900
/** Once that is used up. */
const SHORT_LOCK_MS = 50
/** For the statement, as a part of what a statement may take: what takes longer, for want of an index, is left for later. */
const STATEMENT_SHARE = 1 / 4
/** Of the calls that were left for later, in one transaction; fewer, once that was too slow. */
const LATER_CALLS = 500

const LOCK_CALLS = 'SELECT FROM call_sessions WHERE call_sid = ANY($1::text[]) ORDER BY call_sid FOR UPDATE'
const LOCK_NOT_AVAILABLE = '55P03'
/** Where PostgreSQL looks for deadlocks sooner than after its usual second, ours may be the one that it ends. */
const DEADLOCK = '40P01'
const QUERY_CANCELED = '57014'

/** What came of it in one transaction; it counts once that is committed. */
export interface Filled {
  rows: number
  /** Their rows were locked, or there was no time: left for later. */
  held: string[]
  /** There was no time. */
  isSlow: boolean
  failed: { callSid: string; reason: string }[]
}

interface Part {
  callSids: string[]
  /** Nobody else has locked their rows: this transaction has. */
  isFree: boolean
}

/** For a lock, and for all of a statement. */
interface Limits {
  lockMs: number
  statementMs: number
}

interface LockedRow {
  call_sid: string
  free: boolean
}

interface Result {
  rows: LockedRow[]
  rowCount: number
  error?: unknown
}

/** Told of each transaction that is committed. */
export interface LegacyTold {
  filled(rows: number): void
  failed(callSid: string, reason: string): void
  /** Left for later. */
  held(callSids: string[]): void
}

export class Legacy {
  /** For rows that are not waited for. */
  private readonly ofTheFree: Limits
  /** By its schema: the search_path is the other table's by then. */
  private readonly heldTable: string
  private laterCalls = LATER_CALLS

  private constructor(
    private known: LegacyTable | undefined,
    private readonly table: TableName,
    private readonly database: DatabaseConfig,
    private readonly timeoutMs: number,
    private readonly tell: LegacyTold,
  ) {
    this.ofTheFree = { lockMs: SHORT_LOCK_MS, statementMs: Math.ceil(timeoutMs * STATEMENT_SHARE) }
    this.heldTable = `${escapeIdentifier(database.DATABASE_SCHEMA)}.legacy_held`
  }

  /**
   * @param timeoutMs for a statement, as in `writeSettings`
   * @throws OperatorError that names LEGACY_CALL_SESSIONS when there is no such table, or it cannot be filled
   */
  static async open(pool: Pool, table: TableName, database: DatabaseConfig, timeoutMs: number, tell: LegacyTold) {
    const known = await lookAtLegacyTable(pool, table, database).catch((error: Error) => {
      if (sqlState(error) === undefined) throw error
      throw new OperatorError(`LEGACY_CALL_SESSIONS: cannot be looked at: ${error.message}`)
    })
    return { legacy: new Legacy(known, table, database, timeoutMs, tell), known }
  }

  /**
   * Fills the rows of those of the calls that are finalized, or notes them for later. The last thing in its transaction, whose
   * settings it changes.
   *
   * @throws LegacyFailure for what PostgreSQL says, but not of single rows; the connection's errors
   */
  async fill(client: PoolClient, callSids: string[], lockMs = LOCK_MS): Promise<Filled> {
    const filled: Filled = { rows: 0, held: [], isSlow: false, failed: [] }
    const queue: Part[] = [{ callSids: callSids.toSorted(), isFree: false }]
    const from = performance.now()
    let isFresh = false
    for (let part = queue.pop(); part; part = queue.pop()) {
      // PostgreSQL counts the time for each lock anew: so it is the statement that ends in time.
      const patienceMs = Math.ceil(Math.max(SHORT_LOCK_MS, lockMs - (performance.now() - from)))
      const limits = part.isFree ? this.ofTheFree : { lockMs: patienceMs, statementMs: patienceMs }
      const result = await this.attempt(client, limits, 'update', part.callSids)
      const { error } = result
      const [only] = part.callSids
      if (error === undefined) filled.rows += result.rowCount
      else if ((isLocked(error) || isSlow(error)) && !part.isFree) {
        const free = await this.takeFree(client, part.callSids, filled)
        if (free.callSids.length > 0) queue.push(free)
      } else if (isLocked(error) || isSlow(error)) leave(part.callSids, filled, error)
      else if (!isFresh) {
        this.known = undefined // it may have changed: an enum's labels, a column's type
        isFresh = true
        queue.push(part)
      } else if (part.callSids.length === 1) filled.failed.push({ callSid: only!, reason: describe(error) })
      else queue.push(...halves(part))
    }
    // Neither of these may fail for want of time, nor COMMIT stop waiting for its replicas.
    await client.query(`SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = ${this.timeoutMs}`)
    if (filled.held.length > 0) {
      const note = `INSERT INTO ${this.heldTable} SELECT unnest($1::text[]) ON CONFLICT DO NOTHING`
      await client.query(note, [filled.held])
    }
    return filled
  }

  /** Locks those rows that nobody else has locked. */
  private async takeFree(client: PoolClient, callSids: string[], filled: Filled): Promise<Part> {
    const { rows, error } = await this.attempt(client, this.ofTheFree, 'lock', callSids)
    const sids = (free: boolean) => rows.filter((row) => row.free === free).map((row) => row.call_sid)
    leave(error === undefined ? sids(false) : callSids, filled, error)
    return { callSids: sids(true), isFree: true }
  }

  /** A statement under a savepoint. @returns its error, if that is for the rows, or for who holds them: then nothing was done */
  private async attempt(
    client: PoolClient,
    { lockMs, statementMs }: Limits,
    what: 'update' | 'lock',
    callSids: string[],
  ): Promise<Result> {
    // Its triggers must find what they find when its own application writes, and not calltape's tables.
    const path = [...new Set([this.table.schema, 'public'])].map(escapeIdentifier).join(', ')
    // What is deferred is checked at once: at COMMIT, nobody could tell whose error it is. Calltape's own before the savepoint.
    await client.query(`SET CONSTRAINTS ALL IMMEDIATE; SAVEPOINT legacy;
      SET LOCAL lock_timeout = ${lockMs}; SET LOCAL statement_timeout = ${statementMs}; SET LOCAL search_path TO ${path}`)
    try {
      this.known ??= await lookAtLegacyTable(client, this.table, this.database)
      const { rows, rowCount } = await client.query<LockedRow>({ ...this.known[what], values: [callSids] })
      return { rows, rowCount: rowCount ?? 0 }
    } catch (error) {
      const isOthers = isLocked(error) || isSlow(error)
      if (!isOthers && !isOfARow(error)) {
        this.known = undefined
        if (error instanceof OperatorError) throw new LegacyFailure(error, 'stop')
        throw sqlState(error) === undefined ? error : new LegacyFailure(error as Error, verdictOn(error))
      }
      await client.query('ROLLBACK TO SAVEPOINT legacy; RELEASE SAVEPOINT legacy')
      return { rows: [], rowCount: 0, error }
    }
  }

  /** Once what `fill` did is committed. */
  committed({ rows, held, failed }: Filled): void {
    if (rows > 0) this.tell.filled(rows)
    for (const { callSid, reason } of failed) this.tell.failed(callSid, reason)
    if (held.length > 0) this.tell.held(held)
  }

  /**
   * Fills rows of calls that were left for later, whoever left them, as far as they are free by now.
   *
   * @returns how many are left in all @throws what PostgreSQL says, LegacyFailure
   */
  async fillHeld(pool: Pool): Promise<number> {
    const client = await pool.connect()
    let isFit = false
    try {
      await client.query('BEGIN')
      const filled = await this.fillLongestHeld(client)
      const { rows } = await client.query<{ calls: number }>(`SELECT count(*)::int AS calls FROM ${this.heldTable}`)
      await client.query('COMMIT')
      isFit = true
      this.committed(filled)
      return rows[0]!.calls
    } finally {
      client.release(!isFit)
    }
  }

  /** What it takes and cannot fill goes to the end: whoever keeps a row locked for long keeps up nobody else's. */
  private async fillLongestHeld(client: PoolClient): Promise<Filled> {
    const take = `SELECT call_sid FROM ${this.heldTable} ORDER BY held_at LIMIT $1 FOR UPDATE SKIP LOCKED`
    const { rows } = await client.query<{ call_sid: string }>(take, [this.laterCalls])
    if (rows.length === 0) return { rows: 0, held: [], isSlow: false, failed: [] }
    const callSids = rows.map((row) => row.call_sid)
    // A worker may be about to write something newer. Only then deleted: it would wait for that, to note the call again.
    await client.query(LOCK_CALLS, [callSids])
    await client.query(`DELETE FROM ${this.heldTable} WHERE call_sid = ANY($1::text[])`, [callSids])
    const filled = await this.fill(client, callSids, SHORT_LOCK_MS)
    this.laterCalls = filled.isSlow ? Math.max(1, rows.length >> 1) : Math.min(LATER_CALLS, this.laterCalls * 2)
    return filled
  }
}

const isSlow = (error: unknown) => sqlState(error) === QUERY_CANCELED
const isLocked = (error: unknown) => [LOCK_NOT_AVAILABLE, DEADLOCK].includes(sqlState(error) ?? '')

function leave(callSids: string[], filled: Filled, error: unknown): void {
  filled.held.push(...callSids)
  filled.isSlow ||= isSlow(error)
}

function halves({ callSids, isFree }: Part): Part[] {
  const middle = callSids.length >> 1
  return [callSids.slice(middle), callSids.slice(0, middle)].map((half) => ({ callSids: half, isFree }))
}

/** What a trigger says, in whatever words, is of the row that it was called for. */
function isOfARow(error: unknown): boolean {
  const verdict = verdictOn(error)
  return verdict === 'quarantine' || (raisedIn(error) !== undefined && verdict !== 'retry')
}

/** PostgreSQL's own words name constraints; others' words, and those on values, may have in them what was said in the call. */
function describe(error: unknown): string {
  const state = sqlState(error) ?? ''
  const { message } = error as Error
  if (state.startsWith('23')) return message
  const where = raisedIn(error)
  return where === undefined ? `error ${state}` : `error ${state} in ${where}`
}
