/** What an error of PostgreSQL means for the batch that met it: the one place where errors are classified. */
import { isBug } from '../shared/config.js'
import { sqlState } from '../shared/postgres.js'

export type Verdict =
  /** PostgreSQL is away, busy, failing over: nothing is wrong with the batch. Wait until it is back. */
  | 'retry'
  /** Somebody has to mend something first. Wait as well, and say what. */
  | 'stop'
  /** The data: PostgreSQL would refuse it for ever. */
  | 'quarantine'
  /** Perhaps the data, perhaps not. Whoever fails again and again by himself while others succeed is at fault. */
  | 'unclear'

/** By SQLSTATE or, where the whole class means the same, by its first two characters (https://www.postgresql.org/docs/current/errcodes-appendix.html). */
const VERDICTS: Record<string, Verdict> = {
  '08': 'retry', // connection exception
  '25': 'retry', // invalid transaction state: 25006, read-only, is what a demoted primary says
  '26': 'retry', // no such prepared statement: a pooler gave the connection another server
  '40': 'retry', // transaction rollback: serialization, deadlock
  '53': 'retry', // insufficient resources: disk, connections
  '53200': 'unclear', // out of memory: this very batch may be too much
  '53400': 'unclear', // configuration limit exceeded: the same
  '55': 'retry', // object not in prerequisite state: locks
  '57': 'retry', // operator intervention: shutting down, starting up
  '57014': 'unclear', // cancelled: its statement_timeout, for which this very batch may be too much
  '58': 'retry', // system error: I/O
  '0A': 'stop', // feature not supported
  '28': 'stop', // invalid authorization
  '3D': 'stop', // no such database
  '3F': 'stop', // no such schema
  '42': 'stop', // no such table or column, no privilege
  XX001: 'stop', // data corrupted
  XX002: 'stop', // index corrupted
  '22': 'quarantine', // data exception
  '23': 'quarantine', // integrity constraint violation
  '44': 'quarantine', // WITH CHECK OPTION violation
  '54': 'quarantine', // program limit exceeded
  P0001: 'quarantine', // RAISE EXCEPTION: a rule of the database's owner
}

/** What an operator is told beside PostgreSQL's own words. */
const HINTS: Record<string, string> = {
  '26000': 'a pooler lends a connection for each transaction: set DATABASE_POOLER=transaction',
  '42P05': 'a pooler lends a connection for each transaction: set DATABASE_POOLER=transaction',
  '25006': 'the server is read-only: a standby, or a demoted primary',
  '28': 'the user or password in DATABASE_URL is refused',
  '3D': 'the database in DATABASE_URL does not exist',
  '42': 'the schema does not fit this calltape: run calltape migrate',
  '42501': "the user in DATABASE_URL lacks a privilege on calltape's tables",
  '53100': "the disk of PostgreSQL's data is full",
  '53300': 'PostgreSQL has no connection left: raise max_connections, or lower SINK_WORKERS',
  XX001: 'data of PostgreSQL is corrupted',
  XX002: 'an index of PostgreSQL is corrupted: REINDEX',
}

/** @param error of a transaction, or of encoding its rows */
export function verdictOn(error: unknown): Verdict {
  if (error instanceof LegacyFailure) return error.verdict
  const state = sqlState(error)
  if (state !== undefined) return VERDICTS[state] ?? VERDICTS[state.slice(0, 2)] ?? 'unclear'
  if (error instanceof WriteTimeout) return 'unclear'
  if (error instanceof RangeError && error.message === 'Invalid string length') return 'quarantine'
  return isBug(error) ? 'unclear' : 'retry' // the rest is the network's
}

/** @returns undefined when PostgreSQL's own words are all there is to say */
export function hintOn(error: unknown): string | undefined {
  if (error instanceof LegacyFailure) {
    return error.verdict === 'stop' ? 'the table of LEGACY_CALL_SESSIONS cannot be filled' : hintOn(error.cause)
  }
  const state = sqlState(error) ?? ''
  return HINTS[state] ?? HINTS[state.slice(0, 2)]
}

/** What keeps rows of LEGACY_CALL_SESSIONS from being filled, and is of none of them: the entries of the batch are not at fault. */
export class LegacyFailure extends Error {
  constructor(
    override readonly cause: Error,
    readonly verdict: Verdict,
  ) {
    super(`LEGACY_CALL_SESSIONS: ${cause.message.replace(/^LEGACY_CALL_SESSIONS: /, '')}`)
  }
}

/** A transaction whose connection was given up because PostgreSQL stayed silent. */
export class WriteTimeout extends Error {}
