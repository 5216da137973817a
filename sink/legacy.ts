/**
 * legacy: finalized calls into the table of LEGACY_CALL_SESSIONS, in the transaction that finalizes them.
 *
 * That table is another application's, with its own locks, triggers and constraints. It must cost calltape neither an entry
 * nor its pace, and must not see its own trouble grow for calltape:
 * - A row that refuses its values is left as it is, and told; the others are filled, and the call is stored all the same.
 * - A row that is locked is waited for a moment, and then filled later, out of a transaction of its own: by this process, for
 *   as long as it lives.
 * - What the whole table fails with (it is gone, a privilege is missing) fails the batch like any other error of PostgreSQL.
 */
import { type DatabaseConfig, OperatorError } from '../shared/config.js'
import { escapeIdentifier, type Pool, type PoolClient, raisedIn, sqlState } from '../shared/postgres.js'
import { type LegacyTable, lookAtLegacyTable, type TableName } from './legacy-table.js'
import { LegacyFailure, verdictOn } from './verdict.js'

/** For one lock. Shorter than the time after which PostgreSQL would look for a deadlock, and end the other's transaction. */
const LOCK_MS = 900
/** Once one was waited for in vain. */
const SHORT_LOCK_MS = 50
/** For the statement, as a part of what a statement may take: what takes longer, for want of an index, is left for later. */
const STATEMENT_SHARE = 1 / 4
/** Of the calls that are left for later, in one transaction. */
const LATER_CALLS = 500

const LOCK_CALLS = 'SELECT FROM call_sessions WHERE call_sid = ANY($1::text[]) ORDER BY call_sid FOR UPDATE'
const LOCK_NOT_AVAILABLE = '55P03'
const QUERY_CANCELED = '57014'

/** What came of it in one transaction; it counts once that is committed. */
export interface Filled {
  rows: number
  /** Their rows were locked, or there was no time: still to be filled. */
  held: string[]
  failed: { callSid: string; reason: string }[]
}

interface Part {
  callSids: string[]
  /** Nobody else has locked their rows: this transaction has. */
  isFree: boolean
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
  /** @param calls how many wait in all */
  held(calls: number): void
}

export class Legacy {
  private readonly held = new Set<string>()

  private constructor(
    private known: LegacyTable | undefined,
    private readonly table: TableName,
    private readonly database: DatabaseConfig,
    private readonly tell: LegacyTold,
    private readonly statementMs: number,
  ) {}

  /**
   * @param timeoutMs for a statement, as in `writeSettings`
   * @throws OperatorError that names LEGACY_CALL_SESSIONS when there is no such table, or it cannot be filled
   */
  static async open(pool: Pool, table: TableName, database: DatabaseConfig, timeoutMs: number, tell: LegacyTold) {
    const known = await lookAtLegacyTable(pool, table, database).catch((error: Error) => {
      if (sqlState(error) === undefined) throw error
      throw new OperatorError(`LEGACY_CALL_SESSIONS: cannot be looked at: ${error.message}`)
    })
    return { legacy: new Legacy(known, table, database, tell, Math.ceil(timeoutMs * STATEMENT_SHARE)), known }
  }

  /** Calls that are left for later. */
  get heldCalls(): string[] {
    return [...this.held]
  }

  /**
   * Fills the rows of those of the calls that are finalized. The last thing in its transaction, whose settings it changes.
   *
   * @throws LegacyFailure for what PostgreSQL says, but not of single rows; the connection's errors
   */
  async fill(client: PoolClient, callSids: string[], lockMs = LOCK_MS): Promise<Filled> {
    const filled: Filled = { rows: 0, held: [], failed: [] }
    const queue: Part[] = [{ callSids: callSids.toSorted(), isFree: false }]
    let patienceMs = lockMs
    let isFresh = false
    for (let part = queue.pop(); part; part = queue.pop()) {
      const result = await this.attempt(client, patienceMs, 'update', part.callSids)
      const { error } = result
      const [only] = part.callSids
      if (error === undefined) filled.rows += result.rowCount
      else if (isLocked(error) && !part.isFree) {
        patienceMs = SHORT_LOCK_MS
        const free = await this.takeFree(client, part.callSids, filled)
        if (free.callSids.length > 0) queue.push(free)
      } else if (isLocked(error) || isSlow(error)) filled.held.push(...part.callSids)
      else if (!isFresh) {
        this.known = undefined // it may have changed: an enum's labels, a column's type
        isFresh = true
        queue.push(part)
      } else if (part.callSids.length === 1) filled.failed.push({ callSid: only!, reason: describe(error) })
      else queue.push(...halves(part))
    }
    return filled
  }

  /** Locks those rows that nobody else has locked. */
  private async takeFree(client: PoolClient, callSids: string[], filled: Filled): Promise<Part> {
    const { rows, error } = await this.attempt(client, SHORT_LOCK_MS, 'lock', callSids)
    const free = rows.filter((row) => row.free).map((row) => row.call_sid)
    const held = error === undefined ? rows.filter((row) => !row.free).map((row) => row.call_sid) : callSids
    filled.held.push(...held)
    return { callSids: free, isFree: true }
  }

  /** A statement under a savepoint. @returns its error, if that is for the rows, or for who holds them: then nothing was done */
  private async attempt(
    client: PoolClient,
    lockMs: number,
    what: 'update' | 'lock',
    callSids: string[],
  ): Promise<Result> {
    // Its triggers must find what they find when its own application writes, and not calltape's tables.
    const path = [...new Set([this.table.schema, 'public'])].map(escapeIdentifier).join(', ')
    // What is deferred is checked at once: at COMMIT, nobody could tell whose error it is. Calltape's own before the savepoint.
    await client.query(`SET CONSTRAINTS ALL IMMEDIATE; SAVEPOINT legacy;
      SET LOCAL lock_timeout = ${lockMs}; SET LOCAL statement_timeout = ${this.statementMs}; SET LOCAL search_path TO ${path}`)
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
    for (const callSid of held) this.held.add(callSid)
    if (held.length > 0) this.tell.held(this.held.size)
  }

  /** Fills those whose rows were locked, as far as they are not any more. @throws what PostgreSQL says */
  async fillHeld(pool: Pool): Promise<void> {
    const callSids = this.heldCalls.slice(0, LATER_CALLS)
    if (callSids.length === 0) return
    for (const callSid of callSids) this.held.delete(callSid) // a worker may put it there again meanwhile
    let client: PoolClient | undefined
    let isFit = false
    try {
      client = await pool.connect()
      await client.query('BEGIN')
      await client.query(LOCK_CALLS, [callSids]) // a worker may be about to write something newer
      const filled = await this.fill(client, callSids, SHORT_LOCK_MS)
      await client.query('COMMIT')
      isFit = true
      this.committed(filled) // what is still locked goes to the end
      this.tell.held(this.held.size)
    } finally {
      if (!isFit) for (const callSid of callSids) this.held.add(callSid)
      client?.release(!isFit)
    }
  }
}

const isSlow = (error: unknown) => sqlState(error) === QUERY_CANCELED
const isLocked = (error: unknown) => sqlState(error) === LOCK_NOT_AVAILABLE

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
