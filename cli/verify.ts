/** `calltape verify`: is all that is in the streams in PostgreSQL? */
import { type Config, givenEnvironment, isBug, OperatorError, readConfig } from '../shared/config.js'
import { compareIds, isEntryId } from '../shared/entry-ids.js'
import { type CallPlace, streamKey } from '../shared/keys.js'
import { createLog, reasonOf } from '../shared/log.js'
import { createPool } from '../shared/postgres.js'
import { connectRedis, type RedisClient, readPartitions } from '../shared/redis.js'
import { requireReachable, requireSchema } from '../shared/schema.js'
import { createLiveView, keepDrawing, number } from './live-view.js'
import { runningStack } from './stack.js'
import { streamInfo, type Window } from './streams.js'
import { Report } from './verify/report.js'
import { READ_SETTINGS } from './verify/rows.js'
import { Verification } from './verify/run.js'

export interface VerifyOptions {
  /** Only this call. */
  call?: string
  /** Only entries that arrived from then on: epoch ms, an entry id, or an RFC 3339 time. */
  from?: string
  /** Only entries that arrived until then: likewise. */
  to?: string
  /** Seconds to wait for what is not committed yet. */
  wait: number
  json?: boolean
  /** The folder of the `calltape up` to ask. */
  data: string
}

const CONNECTIONS = 4

/**
 * Prints what it finds, and sets the process's exit code: 1 if anything is missing or different.
 *
 * @throws OperatorError for a wrong option, and when a store cannot be asked: then nothing is known
 */
export async function verify(options: VerifyOptions): Promise<void> {
  const window = readWindow(options)
  const config = readConfig({ ...runningStack(options.data), ...givenEnvironment() })
  const report = await compareStores(config, options.call, window, options.wait * 1000)
  console.log(options.json ? JSON.stringify(report, null, 2) : report.describe())
  if (report.wrong > 0) process.exitCode = 1
}

/** @throws OperatorError when a store cannot be asked, or has nothing of `callSid` */
export async function compareStores(
  config: Config,
  callSid: string | undefined,
  window: Window,
  waitMs: number,
): Promise<Report> {
  const pool = createPool(config, 'verify', CONNECTIONS, undefined, READ_SETTINGS)
  let redis: RedisClient | undefined
  try {
    await requireReachable(pool, config)
    await requireSchema(pool, config)
    redis = await connectRedis(config.REDIS_URL, createLog('verify', 'silent'), config)
    const only = callSid === undefined ? undefined : await findCall(redis, config, callSid)
    const report = new Report()
    const run = new Verification(redis, pool, { only, window }, waitMs, report)
    const stopShowing = showProgress(run, report)
    try {
      await run.run()
    } finally {
      stopShowing()
    }
    return report
  } catch (error) {
    // Exit code 1 says that something is missing; that a store went away says nothing of the kind.
    if (error instanceof OperatorError || isBug(error)) throw error
    throw new OperatorError(`could not compare to the end: ${reasonOf(error as Error)}`, { cause: error })
  } finally {
    redis?.disconnect()
    await pool.end()
  }
}

async function findCall(redis: RedisClient, config: Config, callSid: string): Promise<CallPlace> {
  const partition = (await readPartitions(redis, config.PARTITIONS)).of(callSid)
  const name = { callSid, partition }
  if (await streamInfo(redis, name)) return name
  throw new OperatorError(
    `Redis has no stream of call ${callSid} (key ${streamKey(name)}): there is nothing to compare. ` +
      'It goes STREAM_RETENTION after the call; `calltape show` has what PostgreSQL has',
  )
}

/** @returns ends it */
function showProgress(run: Verification, report: Report): () => void {
  const started = performance.now()
  return keepDrawing(createLiveView(process.stderr), () => {
    const { calls, entries } = report.counts
    const rate = Math.round(entries / ((performance.now() - started) / 1000))
    const waiting = run.waitingCalls > 0 ? `, waiting for ${number(run.waitingCalls)} calls` : ''
    const found = report.wrong > 0 ? `, ${number(report.wrong)} findings` : ''
    return `${number(calls)} calls, ${number(entries)} entries, ${number(rate)} entries/s${waiting}${found}`
  })
}

const RFC3339 = /^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)$/
const LAST_IN_MS = '18446744073709551615'

/** @throws OperatorError that says what the option wants */
export function readWindow({ from, to }: Pick<VerifyOptions, 'from' | 'to'>): Window {
  const bound = (option: string, text: string, nth: string) => {
    if (isEntryId(text)) return text
    if (/^\d{1,15}$/.test(text)) return `${Number(text)}-${nth}`
    const ms = RFC3339.test(text) ? Date.parse(text) : Number.NaN
    if (ms >= 0) return `${ms}-${nth}`
    throw new OperatorError(
      `${option} wants epoch milliseconds, a stream entry's id, or an RFC 3339 time with its zone ` +
        `(2026-01-31T09:00:00Z), got ${text}`,
    )
  }
  const window = {
    from: from === undefined ? '-' : bound('--from', from, '0'),
    to: to === undefined ? '+' : bound('--to', to, LAST_IN_MS),
  }
  if (from !== undefined && to !== undefined && compareIds(window.from, window.to) > 0) {
    throw new OperatorError(`--from ${from} is later than --to ${to}`)
  }
  return window
}
