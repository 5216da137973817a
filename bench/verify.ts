/** A figure counts only if every row is there and right. */
import { setTimeout as sleep } from 'node:timers/promises'
import { type ExpectedCall, KINDS, type Report, verifyCalls } from '../cli/compare.js'
import type { Pool } from '../shared/postgres.js'
import type { Bench } from './context.js'
import type { Load, OpenCalls } from './load.js'
import type { Latency } from './report.js'

const POLL_MS = 20
/** Without any progress for so long, nothing more will come. */
const STALL_MS = 60_000

/** Waits until a query's count reaches what is expected. @throws when it stops growing before that */
export async function untilCount(bench: Bench, expected: number, count: () => Promise<number>): Promise<void> {
  let [seen, sinceMs] = [-1, Date.now()]
  for (;;) {
    bench.requireAlive()
    const now = await count()
    bench.progress.at(now)
    if (now >= expected) return
    if (now !== seen) [seen, sinceMs] = [now, Date.now()]
    if (Date.now() - sinceMs > STALL_MS)
      throw new Error(`${now} of ${expected} after ${STALL_MS / 1000} s without any more`)
    await sleep(POLL_MS)
  }
}

const range = (prefix: string) => [prefix, `${prefix}~`]

/** Until all calls are final. Looks at the calls only: counting the turns again and again would be a load of its own. */
export function untilFinalized(bench: Bench, { run }: Load, pool = bench.stores.pool): Promise<void> {
  const sql = 'SELECT count(finalized_at)::int AS n FROM call_sessions WHERE call_sid >= $1 AND call_sid < $2'
  return untilCount(bench, run.calls, async () => (await pool.query<{ n: number }>(sql, range(run.prefix))).rows[0]!.n)
}

export async function untilStored(
  bench: Bench,
  prefix: string,
  turns: number,
  pool = bench.stores.pool,
): Promise<void> {
  const sql = 'SELECT count(*)::int AS n FROM call_transcript_turns WHERE call_sid >= $1 AND call_sid < $2'
  await untilCount(bench, turns, async () => (await pool.query<{ n: number }>(sql, range(prefix))).rows[0]!.n)
}

/** Every turn and every call's row, transcript and all. @returns how many rows were compared */
export async function verify(bench: Bench, load: Load, pool = bench.stores.pool): Promise<number> {
  const report = await compare(bench, pool, load.run.prefix, load.expected(), load.run.calls)
  requireNone(report, KINDS)
  return report.rows
}

/** Every turn; the calls are still open, each of them. @returns how many rows were compared */
export async function verifyOpen(bench: Bench, open: OpenCalls): Promise<number> {
  const report = await compare(bench, bench.stores.pool, open.run.prefix, open.expected(), open.calls)
  if (report.counts['call row'] !== report.calls) {
    throw new Error(`${report.calls - report.counts['call row']} calls are final that have not ended`)
  }
  return requireTurns(report)
}

/** Every turn; whatever there is of the calls' rows. @returns how many rows were compared */
export async function verifyTurns(bench: Bench, pool: Pool, load: Load): Promise<number> {
  return requireTurns(await compare(bench, pool, load.run.prefix, load.expected(), load.run.calls))
}

function requireTurns(report: Report): number {
  requireNone(
    report,
    KINDS.filter((kind) => kind !== 'call row'),
  )
  return report.rows
}

async function compare(
  bench: Bench,
  pool: Pool,
  prefix: string,
  expected: Iterable<ExpectedCall>,
  calls: number,
): Promise<Report> {
  bench.progress.step('reading back every row', calls)
  return await verifyCalls(pool, prefix, counted(bench, expected))
}

function* counted(bench: Bench, calls: Iterable<ExpectedCall>): Generator<ExpectedCall> {
  let count = 0
  for (const call of calls) {
    yield call
    bench.progress.at(++count)
  }
}

function requireNone({ counts, differences }: Report, kinds: readonly (typeof KINDS)[number][]): void {
  if (kinds.every((kind) => counts[kind] === 0)) return
  const first = differences.find(({ kind }) => kinds.includes(kind))
  throw new Error(`rows are wrong: ${JSON.stringify(counts)}, first: ${JSON.stringify(first)}`)
}

/**
 * Of the turns that `talk` sent; waits until all are there. The COMMIT's time is PostgreSQL's own, to the microsecond; when a turn was
 * sent is known to the millisecond, rounded down. One machine, one clock.
 */
export async function readLatency(bench: Bench, open: OpenCalls): Promise<Latency> {
  const { prefix } = open.run
  bench.progress.step('waiting until all is stored', open.turns)
  await untilStored(bench, prefix, open.turns)
  const { rows } = await bench.stores.pool.query<{ ms: [number, number, number] }>(
    `SELECT percentile_cont(ARRAY[0.5, 0.99, 0.999]) WITHIN GROUP (
       ORDER BY extract(epoch FROM pg_xact_commit_timestamp(xmin) - spoken_at)::float8 * 1000) AS ms
     FROM call_transcript_turns WHERE call_sid >= $1 AND call_sid < $2 AND seq >= $3`,
    [...range(prefix), open.firstTimedSeq],
  )
  const [p50, p99, p999] = rows[0]!.ms
  return { p50, p99, p999 }
}
