/**
 * Migrations lock tables that sinks write to. Whoever waits for such a lock has all that come later wait behind him: a report that
 * reads a table for an hour would stop the sinks for an hour. So a lock is waited for briefly, and after a pause asked for again.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { OperatorError } from './config.js'
import { type Pool, sqlState } from './postgres.js'

export interface LockPatience {
  /** How long to wait for a lock at a time, ms: so long a sink may have to wait. */
  lockMs: number
  /** For the others, before the next try, ms. */
  pauseMs: number
  /** After so long nothing is tried again, ms. */
  forMs: number
}

export const LOCK_PATIENCE: LockPatience = { lockMs: 2000, pauseMs: 5000, forMs: 10 * 60_000 }

const NO_LOCK = '55P03'
const DEADLOCK = '40P01'

export function isOfLocks(error: unknown): boolean {
  return [NO_LOCK, DEADLOCK].includes(sqlState(error) ?? '')
}

/**
 * @param attempt a transaction with this `lock_timeout`; it is run again when it does not get its locks
 * @param say told once what is waited for
 * @throws what `attempt` throws for another reason; OperatorError when others hold the locks for too long
 */
export async function retryForLocks<T>(
  pool: Pool,
  attempt: () => Promise<T>,
  say: (line: string) => void,
  { pauseMs, forMs }: LockPatience,
): Promise<T> {
  const from = Date.now()
  for (let tries = 0; ; tries++) {
    try {
      return await attempt()
    } catch (error) {
      if (!isOfLocks(error)) throw error
      const holder = await oldestHolder(pool)
      if (Date.now() - from >= forMs) {
        throw new OperatorError(`DATABASE_URL: calltape's tables are in use, by ${holder}: end it, or try again later`)
      }
      if (tries === 0) say(`waits: calltape's tables are in use, by ${holder}; sinks go on meanwhile`)
    }
    await sleep(pauseMs)
  }
}

/** Whose transaction is probably in the way. (Who was, is not known after the fact.) */
async function oldestHolder(pool: Pool): Promise<string> {
  const { rows } = await pool.query<{ pid: number; name: string; since: string | null }>(
    `SELECT pid, application_name AS name, to_char(xact_start, 'YYYY-MM-DD HH24:MI:SS"Z"') AS since
     FROM pg_locks JOIN pg_class c ON c.oid = relation JOIN pg_stat_activity a USING (pid)
     WHERE datname = current_database() AND granted AND relnamespace = to_regnamespace(current_schema())
       AND pid <> pg_backend_pid()
     ORDER BY xact_start LIMIT 1`,
  )
  const [holder] = rows
  if (!holder) return 'a transaction that has ended since'
  const since = holder.since === null ? '' : `, since ${holder.since}` // of another user's it is not told
  return `the transaction of process ${holder.pid} (${holder.name || 'it has no application_name'}${since})`
}
