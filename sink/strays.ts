/**
 * Strays: calls whose row in PostgreSQL is live, and of which Redis knows nothing any more, because it was flushed or came
 * back without its last writes. Nobody would ever end them. They are presumed over like any other silent call.
 */
import type { Logger } from '../shared/log.js'
import type { SinkMetrics } from '../shared/metrics.js'
import type { Pool } from '../shared/postgres.js'
import type { Overdue } from './overdue.js'

const PAGE = 1000
/** A live row's last_event_at may be older than its last turn; and Redis gets the first chance to end the call. */
const MARGIN_MS = 60_000
/** A connection that hangs must not hold this up for ever. */
const ANSWER_TIMEOUT_MS = 30_000

/** By an index of the live rows alone: as many as there are calls open now, however many there have been. */
const SILENT_CALLS = `
  SELECT call_sid, last_event_at < now() - $2 * interval '1 millisecond' AS silent FROM call_sessions
  WHERE finalized_at IS NULL AND call_sid > $1 ORDER BY call_sid LIMIT ${PAGE}`

interface Context {
  pool: Pool
  overdue: Overdue
  metrics: SinkMetrics
  log: Logger
}

/** @param idleMs for how long a call may be silent */
export async function endStrays(
  { pool, overdue, metrics, log }: Context,
  idleMs: number,
  signal?: AbortSignal,
): Promise<void> {
  let ended = 0
  for (let after = ''; !signal?.aborted; ) {
    const values = [after, idleMs + MARGIN_MS]
    const question = { text: SILENT_CALLS, values, query_timeout: ANSWER_TIMEOUT_MS }
    const { rows } = await pool.query<{ call_sid: string; silent: boolean }>(question)
    const silent = rows.filter((row) => row.silent).map((row) => row.call_sid)
    const results = await Promise.all(silent.map((callSid) => overdue.end(callSid)))
    ended += results.filter(Boolean).length
    after = rows.at(-1)?.call_sid ?? ''
    if (rows.length < PAGE) break
  }
  metrics.strays.inc(ended)
  if (ended > 0)
    log.error({ calls: ended }, 'ended calls that Redis had forgotten: it was flushed, or lost its last writes')
}
