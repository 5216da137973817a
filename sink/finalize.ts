/**
 * finalize: the calls' rows in call_sessions are locked, then folded anew from all that PostgreSQL has of each (fold.sql). Of live
 * calls with nothing but further turns, only `last_event_at` is moved.
 */
import { crashPoint } from '../shared/crash.js'
import type { Outcome } from '../shared/metrics.js'
import { readPackageFile } from '../shared/package-root.js'
import type { PoolClient } from '../shared/postgres.js'
import { type CallRow, iso } from './decode.js'

const FOLD = { name: 'fold', text: readPackageFile('sink/fold.sql') }

/**
 * A sink whose lease has lapsed may still be about to write; a replay writes what sinks wrote long ago while they write on. Whoever
 * comes second must see what the first one wrote: so the rows are locked before the fold takes its snapshot, always in the
 * same order. Gives the calls that are there, and whether they are final already.
 */
const LOCK_CALLS = {
  name: 'lock',
  text: `SELECT call_sid, CASE WHEN finalized_at IS NOT NULL THEN call_sid END AS final
         FROM call_sessions WHERE call_sid = ANY($1::text[]) ORDER BY call_sid FOR UPDATE`,
}
/**
 * Where there is no row there is nothing to lock. The first batch of a call has it to itself; for a later one the row has been
 * removed (a table was truncated, say), and others may be writing it, too: so it is made first, which locks it as well.
 */
const MAKE_CALLS = {
  name: 'make',
  text: `INSERT INTO call_sessions AS s (call_sid) SELECT * FROM unnest($1::text[]) AS c(call_sid) ORDER BY call_sid COLLATE "C"
         ON CONFLICT (call_sid) DO UPDATE SET call_sid = excluded.call_sid
         RETURNING call_sid, CASE WHEN finalized_at IS NOT NULL THEN call_sid END AS final`,
}

/**
 * The fold would come to the same, for more: with 20,000 calls at 5,000 turns/s, 15 µs a turn. Where many calls are live, a turn of
 * each comes seldom enough that nearly every turn moves its call's `last_event_at`.
 */
const TOUCH = {
  name: 'touch',
  text: `INSERT INTO call_sessions AS s (call_sid, last_event_at) SELECT * FROM unnest($1::text[], $2::timestamptz[])
         ON CONFLICT (call_sid) DO UPDATE SET last_event_at = excluded.last_event_at WHERE s.last_event_at < excluded.last_event_at`,
}

export interface FinalCall {
  outcome: Outcome
  /** A turn is known to be missing. */
  incomplete: boolean
  /** It was presumed over: nobody ended it. */
  abandoned: boolean
}

export interface Finalized {
  /** Calls that are final for the first time. */
  finalized: FinalCall[]
  /** Calls that were final before. */
  refinalized: number
  /** The call_sids of those that end with this batch, or had ended before: only these can be final now. */
  ended: string[]
  /** Of the fold. */
  finalizeSeconds: number
}

/** Within the transaction that stores what the calls are folded from. */
export async function finalizeCalls(client: PoolClient, calls: CallRow[]): Promise<Finalized> {
  const before = await lockCalls(client, calls)
  crashPoint('before-finalize')
  const started = performance.now()
  const live = new Set(before.flatMap(({ call_sid, final, made }) => (final === null && !made ? [call_sid] : [])))
  const [touched, folded] = [[] as CallRow[], [] as CallRow[]]
  for (const call of calls) (call.turnsOnly && live.has(call.callSid) ? touched : folded).push(call)
  const after = folded.length > 0 ? (await client.query<FoldedCall>({ ...FOLD, values: callColumns(folded) })).rows : []
  if (touched.length > 0) await client.query({ ...TOUCH, values: touchColumns(touched) })
  const finalizeSeconds = (performance.now() - started) / 1000
  crashPoint('after-finalize')
  const wasFinal = new Set(before.flatMap((row) => row.final ?? []))
  const ending = calls.filter((call) => call.finalize).map((call) => call.callSid)
  const finalized = firstFinal(calls, wasFinal, after)
  return { finalized, refinalized: wasFinal.size, ended: [...new Set([...ending, ...wasFinal])], finalizeSeconds }
}

interface LockedCall {
  call_sid: string
  final: string | null
  /** There was no row: it has nothing but the call_sid yet. */
  made?: true
}

async function lockCalls(client: PoolClient, calls: CallRow[]): Promise<LockedCall[]> {
  const { rows } = await client.query<LockedCall>({ ...LOCK_CALLS, values: [calls.map((call) => call.callSid)] })
  if (rows.length === calls.length) return rows
  const there = new Set(rows.map((row) => row.call_sid))
  const missing = new Set(calls.filter((call) => call.begun && !there.has(call.callSid)).map((call) => call.callSid))
  if (missing.size === 0) return rows
  const { rows: made } = await client.query<LockedCall>({ ...MAKE_CALLS, values: [[...missing]] })
  return [...rows, ...made.map((row) => ({ ...row, made: true as const }))]
}

/** What the fold gives of a call. */
interface FoldedCall {
  final: string | null
  outcome: Outcome
  incomplete: boolean
}

/** @param after what the fold gives: of calls whose rows have not changed, nothing */
function firstFinal(calls: CallRow[], wasFinal: Set<string>, after: FoldedCall[]): FinalCall[] {
  const presumed = new Set(calls.filter((call) => call.presumed).map((call) => call.callSid))
  return after.flatMap(({ final, outcome, incomplete }) =>
    final === null || wasFinal.has(final) ? [] : [{ outcome, incomplete, abandoned: presumed.has(final) }],
  )
}

function callColumns(rows: CallRow[]): unknown[] {
  const sorted = rows.toSorted((a, b) => (a.callSid < b.callSid ? -1 : 1))
  return [sorted.map((r) => r.callSid), sorted.map((r) => iso(r.firstMs)), sorted.map(lastAt)]
}

const touchColumns = (rows: CallRow[]) => [rows.map((r) => r.callSid), rows.map(lastAt)]

const lastAt = ({ lastMs }: CallRow) => (lastMs === null ? null : iso(lastMs))
