/** `calltape rescue`: the calls of a legacy bot, which keeps them in Redis until they expire, into calltape. */
import type { Appender } from '../ingest/append.js'
import { Deliveries } from '../ingest/deliver.js'
import { openAppender } from '../ingest/open-appender.js'
import { type Config, givenEnvironment, isBug, OperatorError, readConfig } from '../shared/config.js'
import type { Partitions } from '../shared/keys.js'
import { createLog, reasonOf } from '../shared/log.js'
import { createIngestMetrics } from '../shared/metrics.js'
import { createPool } from '../shared/postgres.js'
import { askAtStart, connectRedis, type RedisClient, readPartitions } from '../shared/redis.js'
import { requireReachable, requireSchema } from '../shared/schema.js'
import { createLiveView, keepDrawing, type LiveView, number } from './live-view.js'
import { Stream } from './rescue/calls.js'
import { Rescue } from './rescue/look.js'
import { type News, subscribe } from './rescue/news.js'
import { Report } from './rescue/report.js'
import { connectSource, Source } from './rescue/source.js'
import { waitUntilStored } from './rescue/stored.js'
import { Watch } from './rescue/watch.js'
import { runningStack } from './stack.js'
import { READ_SETTINGS } from './verify/rows.js'

export interface RescueOptions {
  /** The legacy bot's Redis; undefined: REDIS_URL. */
  source?: string
  /** Its sessions' keys; what they have behind its last `:` before the `*` is the call_sid. */
  match: string
  dryRun?: boolean
  watch?: boolean
  /** Seconds from one scan of all keys to the next. */
  every?: number
  /** Seconds to wait until PostgreSQL has everything. */
  wait: number
  json?: boolean
  /** The folder of the `calltape up` to ask. */
  data: string
}

const SCAN_SECONDS = 2
const SCAN_SECONDS_BESIDE_NEWS = 30
/** What has been taken by then when it stops goes into Redis. */
const STOP_TIMEOUT_MS = 5000

/**
 * Prints a report, and sets the process's exit code: 1 if something could not be read, or is not in PostgreSQL yet.
 *
 * @throws OperatorError for a wrong option, and when a Redis cannot be used
 */
export async function rescue(options: RescueOptions): Promise<void> {
  if (options.dryRun && options.watch) throw new OperatorError('--dry-run looks once: leave out --watch')
  const config = readConfig({ ...runningStack(options.data), ...givenEnvironment() })
  const stop = new AbortController()
  // Not `once`: to the progress line, which gives the terminal its cursor back, it would look as if nobody handled the signal.
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, () => stop.abort())
  const view = createLiveView(process.stderr)
  const run = await RescueRun.open(config, options, stop.signal, view)
  const print = () => {
    view.done()
    console.log(options.json ? JSON.stringify(run.report, null, 2) : run.report.describe())
  }
  try {
    await (options.watch ? run.watch(options.every) : run.once(options.wait * 1000))
  } catch (error) {
    print()
    if (error instanceof OperatorError || isBug(error)) throw error
    const reason = reasonOf(error as Error)
    throw new OperatorError(`could not rescue to the end, run it again: ${reason}`, { cause: error })
  } finally {
    await run.close()
  }
  print()
  if (!run.report.isClean) process.exitCode = 1
}

class RescueRun {
  readonly report = new Report()
  private readonly rescue: Rescue

  private constructor(
    private readonly config: Config,
    private readonly options: RescueOptions,
    private readonly signal: AbortSignal,
    private readonly view: LiveView,
    private readonly redis: RedisClient,
    private readonly source: Source,
    /** Undefined in a dry run. */
    private readonly appender: Appender | undefined,
    partitions: Partitions,
  ) {
    const { report } = this
    report.isDryRun = options.dryRun === true
    const stream = appender && new Stream(new Deliveries(appender), appender)
    const idleTimeoutMs = config.IDLE_TIMEOUT * 1000
    this.rescue = new Rescue({ source, target: redis, partitions, stream, idleTimeoutMs, report })
  }

  /** @throws OperatorError when one of the two Redis cannot be used */
  static async open(config: Config, options: RescueOptions, signal: AbortSignal, view: LiveView): Promise<RescueRun> {
    const log = createLog('rescue', 'silent')
    const redis = await connectRedis(config.REDIS_URL, log, config)
    let source: RedisClient | undefined
    try {
      source = await connectSource(options.source ?? config.REDIS_URL, log, config)
      const { partitions, appender } = options.dryRun
        ? {
            partitions: await askAtStart(config.REDIS_URL, () => readPartitions(redis, config.PARTITIONS)),
            appender: undefined,
          }
        : await openAppender(redis, config, createIngestMetrics(), log)
      const from = new Source(source, options.match)
      return new RescueRun(config, options, signal, view, redis, from, appender, partitions)
    } catch (error) {
      redis.disconnect()
      source?.disconnect()
      throw error
    }
  }

  /** Every key that is there, and waits until PostgreSQL has what was found. */
  async once(waitMs: number): Promise<void> {
    const stopShowing = this.showProgress()
    try {
      for await (const keys of this.source.scan()) {
        if (this.signal.aborted) break
        await this.rescue.look(keys)
      }
      await this.rescue.endSilent()
      this.report.isInterrupted = this.signal.aborted
      if (!this.report.isDryRun && this.report.counts.turns > 0) await this.waitForDatabase(waitMs)
    } finally {
      stopShowing()
    }
  }

  /** Until it is told to stop. @param every seconds from one scan of all keys to the next */
  async watch(every: number | undefined): Promise<void> {
    const { source, signal, view, config, options } = this
    const log = createLog('rescue', 'silent')
    const found = await subscribe(source, options.source ?? config.REDIS_URL, log, config)
    const news: News | undefined = typeof found === 'string' ? undefined : found
    const seconds = every ?? (news ? SCAN_SECONDS_BESIDE_NEWS : SCAN_SECONDS)
    view.say(
      typeof found === 'string'
        ? `watching: all keys are read every ${seconds} s. Without keyspace notifications: ${found}`
        : `watching: keyspace notifications, and all keys are read every ${seconds} s`,
    )
    const say = (line: string) => view.say(line)
    const stopShowing = this.showProgress()
    try {
      const watch = new Watch(this.rescue, { news, scanMs: seconds * 1000, signal, say })
      this.report.isInterrupted = !(await watch.run())
    } finally {
      stopShowing()
      news?.close()
    }
  }

  async close(): Promise<void> {
    await this.appender?.drain(STOP_TIMEOUT_MS)
    this.appender?.abandon()
    this.source.client.disconnect()
    this.redis.disconnect()
  }

  /** That PostgreSQL cannot be asked is an answer, too: what was appended is safe, and the sinks wait for PostgreSQL. */
  private async waitForDatabase(waitMs: number): Promise<void> {
    const pool = createPool(this.config, 'rescue', 1, undefined, READ_SETTINGS)
    try {
      await requireReachable(pool, this.config)
      await requireSchema(pool, this.config)
      const onLook = (missing: number) => {
        this.report.missing = missing
      }
      await waitUntilStored(pool, this.rescue.savedTurns(), waitMs, this.signal, onLook)
    } catch (error) {
      if (isBug(error)) throw error
      this.report.databaseFailure = reasonOf(error as Error)
    } finally {
      await pool.end()
    }
  }

  /** @returns ends it */
  private showProgress(): () => void {
    return keepDrawing(this.view, () => {
      const { sessions, turns, new: appended, truncated, unreadable, unreadable_turns, ended } = this.report.counts
      const wrong = truncated + unreadable + unreadable_turns
      const parts = [
        `${number(sessions)} sessions`,
        `${number(turns)} turns (${number(appended)} new)`,
        ...(ended > 0 ? [`${number(ended)} ended`] : []),
        ...(wrong > 0 ? [`${number(wrong)} findings`] : []),
        ...(this.report.missing ? [`waiting for ${number(this.report.missing)} turns in PostgreSQL`] : []),
        ...(this.appender?.isAway ? ['waiting for Redis to take them'] : []),
      ]
      return parts.join(', ')
    })
  }
}
