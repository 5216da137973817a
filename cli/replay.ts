/**
 * `calltape replay`: what is in the streams, or in an archive of them, into PostgreSQL. Rows are keyed, so that it may run again, and
 * beside the sinks; where it was stopped or killed, it skips what is there. It keeps no state.
 */
import { type Config, givenEnvironment, isBug, OperatorError, readConfig } from '../shared/config.js'
import { Partitions, streamKey } from '../shared/keys.js'
import { createLog, reasonOf } from '../shared/log.js'
import { createPool, type Pool } from '../shared/postgres.js'
import { connectRedis, type RedisClient, readPartitions } from '../shared/redis.js'
import { migrate, requireReachable, requireSchema } from '../shared/schema.js'
import { Backlog } from '../sink/backlog.js'
import { number } from './live-view.js'
import { openLegacy } from './quarantine.js'
import { archiveStreams } from './replay/archive.js'
import { compareSchemas } from './replay/compare.js'
import { DryRun } from './replay/dry-run.js'
import { type ReplayOptions, readScope } from './replay/options.js'
import { Pace } from './replay/pace.js'
import { ProgressLine } from './replay/progress.js'
import { ReplayReport } from './replay/report.js'
import { readStoredCalls } from './replay/rows.js'
import {
  Archives,
  archiveFiles,
  type LookUp,
  type Piece,
  placesOf,
  type Scope,
  type Source,
  Streams,
} from './replay/source.js'
import { ReplayWriter, WRITE_CONNECTIONS, WRITE_SETTINGS } from './replay/write.js'
import { runningStack } from './stack.js'
import { streamInfo } from './streams.js'

const SIGNALS = { SIGINT: 130, SIGTERM: 143 } as const
const MAIN_CONNECTIONS = 2

interface Stores {
  config: Config
  redis: RedisClient | undefined
  partitions: Partitions
}

/**
 * Prints what it did, and sets the process's exit code: 1 when the schemas compared differ, 130 or 143 when a signal stopped it.
 *
 * @throws OperatorError for a wrong option, and when a store or the archive fails under it
 */
export async function replay(options: ReplayOptions): Promise<void> {
  const scope = readScope(options)
  const config = readConfig({ ...runningStack(options.data), ...givenEnvironment() })
  if (options.schema === config.DATABASE_SCHEMA) {
    throw new OperatorError(`--schema wants another schema than DATABASE_SCHEMA, which is ${options.schema}`)
  }
  const stop = new AbortController()
  const onSignal = (signal: keyof typeof SIGNALS) => {
    process.exitCode = SIGNALS[signal]
    stop.abort()
  }
  // Not `once`: to the progress line, which gives the terminal its cursor back, it would look as if nobody handled the signal.
  for (const signal of Object.keys(SIGNALS) as (keyof typeof SIGNALS)[]) process.on(signal, onSignal)
  const progress = new ProgressLine()
  let redis: RedisClient | undefined
  try {
    redis = await openRedis(config, options)
    const partitions = redis ? await readPartitions(redis, config.PARTITIONS) : new Partitions(config.PARTITIONS)
    const run = new Run({ config, redis, partitions }, options, scope, progress, stop.signal)
    console.log(await run.run())
  } catch (error) {
    if (error instanceof OperatorError || isBug(error)) throw error
    throw new OperatorError(`stopped: ${reasonOf(error as Error)}. Run it again: it goes on where it was`, {
      cause: error,
    })
  } finally {
    progress.done()
    for (const signal of Object.keys(SIGNALS)) process.removeListener(signal, onSignal)
    redis?.disconnect()
  }
}

/** @returns undefined where there need not be one, and is none */
async function openRedis(config: Config, { fromArchive }: ReplayOptions): Promise<RedisClient | undefined> {
  const opening = connectRedis(config.REDIS_URL, createLog('replay', 'silent'), config)
  return fromArchive === undefined ? await opening : await opening.catch(() => undefined)
}

class Run {
  private readonly report: ReplayReport
  private readonly pace: Pace

  constructor(
    private readonly stores: Stores,
    private readonly options: ReplayOptions,
    private readonly scope: Scope,
    private readonly progress: ProgressLine,
    private readonly signal: AbortSignal,
  ) {
    const { redis, partitions } = stores
    const backlog = redis && new Backlog(redis, partitions)
    this.report = new ReplayReport(options.dryRun ? 'dry run' : 'replay')
    this.pace = new Pace({
      rate: options.rate,
      lagMs: backlog && (async () => (await backlog.read()).lagMs),
      say: (line) => progress.say(line),
      signal,
    })
  }

  /** @returns what is to be printed */
  async run(): Promise<string> {
    const { options, scope } = this
    const { redis, partitions } = this.stores
    if (redis && options.fromArchive === undefined) {
      if (scope.callSid !== undefined) await this.requireStream(redis, scope.callSid)
      else this.progress.total = await this.countEntries(redis, partitions)
    }
    const began = performance.now()
    this.progress.start(() => {
      this.progress.isPaused = this.pace.isWaiting
      return this.report.entries + this.report.wholeEntries
    })
    if (options.archive !== undefined) return await this.archive(redis!, options.archive, began)
    await this.intoPostgres(began)
    return options.json ? JSON.stringify(this.report.toJson(), null, 2) : this.report.describe()
  }

  private async archive(redis: RedisClient, path: string, began: number): Promise<string> {
    const { report, scope, pace, signal } = this
    const { partitions } = this.stores
    const bytes = await archiveStreams(path, { redis, partitions, scope, report, pace, signal })
    this.progress.done()
    const { calls, entries } = report
    const gone = report.goneCalls.size
    const seconds = (performance.now() - began) / 1000
    if (this.options.json)
      return JSON.stringify({ calls, entries, gone, bytes: bytes ?? null, seconds, stopped: bytes === undefined })
    if (bytes === undefined) return 'Stopped before the end: there is no archive.'
    const cutOff = gone === 0 ? '' : ` (${number(gone)} calls went from Redis meanwhile, and may be cut off there)`
    return `${number(calls)} calls, ${number(entries)} entries, ${number(bytes)} bytes: ${path}${cutOff}`
  }

  private async intoPostgres(began: number): Promise<void> {
    const { options, report } = this
    const { config } = this.stores
    const target = { ...config, DATABASE_SCHEMA: options.schema ?? config.DATABASE_SCHEMA }
    const sinceMs = Date.now()
    const main = createPool(config, 'replay', MAIN_CONNECTIONS, undefined, WRITE_SETTINGS)
    const pool = createPool(target, 'replay', WRITE_CONNECTIONS, undefined, WRITE_SETTINGS)
    try {
      await requireReachable(main, config)
      await requireSchema(main, config)
      if (options.schema !== undefined) await migrate(target, (line) => this.progress.say(line))
      await this.store(main, pool)
      report.seconds = (performance.now() - began) / 1000
      this.progress.done()
      if (options.schema === undefined || report.stopped) return
      report.comparison = await this.compare(target.DATABASE_SCHEMA, sinceMs)
      if (report.comparison.missing + report.comparison.extra + report.comparison.different > 0) process.exitCode = 1
    } finally {
      await Promise.all([main.end(), pool.end()])
    }
  }

  private async store(main: Pool, pool: Pool): Promise<void> {
    const { options, report, pace, signal } = this
    const { config } = this.stores
    // The other application's rows are made of calltape's own tables, not of a copy of them.
    const legacy = options.schema === undefined && !options.dryRun ? await openLegacy(main, config) : undefined
    // Of an archive, bytes come with the entries.
    const redis = options.fromArchive === undefined ? this.stores.redis : undefined
    const taker = options.dryRun
      ? new DryRun(main, report)
      : new ReplayWriter({ pool, main, redis, legacy, pace, report })
    const source = await this.source((calls) => readStoredCalls(pool, main, calls))
    try {
      for await (const piece of source.pieces()) {
        if (signal.aborted) break
        await taker.add(piece satisfies Piece)
      }
    } catch (error) {
      // Of a damaged archive, what could be read is stored.
      if (error instanceof OperatorError) await taker.finish()
      throw error
    }
    report.stopped = signal.aborted
    if (this.scope.callSid !== undefined && report.calls === 0 && !report.stopped) {
      throw new OperatorError(`there is no entry of call ${this.scope.callSid}: there is nothing to replay`)
    }
    await (signal.aborted ? taker.inHand() : taker.finish())
  }

  private async source(lookUp: LookUp): Promise<Source> {
    const { options, report, scope, progress } = this
    const { redis, partitions } = this.stores
    if (options.fromArchive === undefined) {
      return new Streams(redis!, partitions, scope, lookUp, options.schema === undefined, report)
    }
    const files = await archiveFiles(options.fromArchive)
    const total = files.reduce((sum, file) => sum + file.bytes, 0)
    return new Archives(
      files,
      partitions,
      scope,
      lookUp,
      report,
      (bytes) => (progress.share = bytes / Math.max(1, total)),
    )
  }

  private async compare(other: string, sinceMs: number) {
    const { config, redis, partitions } = this.stores
    const { callSid } = this.scope
    const pool = createPool(config, 'replay', 1)
    try {
      return await compareSchemas({ pool, main: config.DATABASE_SCHEMA, other, callSid, redis, partitions, sinceMs })
    } finally {
      await pool.end()
    }
  }

  private async requireStream(redis: RedisClient, callSid: string): Promise<void> {
    const place = { callSid, partition: this.stores.partitions.of(callSid) }
    if (await streamInfo(redis, place)) return
    throw new OperatorError(
      `Redis has no stream of call ${callSid} (key ${streamKey(place)}): there is nothing to replay. ` +
        'It goes STREAM_RETENTION after the call, into ARCHIVE_DIR if there is one: see --from-archive',
    )
  }

  /** @returns undefined when only a part of them is meant */
  private async countEntries(redis: RedisClient, partitions: Partitions): Promise<number | undefined> {
    const { window } = this.scope
    if (window.from !== '-' || window.to !== '+') return undefined
    let total = 0
    for await (const places of placesOf(redis, partitions, this.scope)) {
      const lengths = await Promise.all(places.map((place) => redis.xlen(streamKey(place))))
      total += lengths.reduce((sum, length) => sum + length, 0)
    }
    return total
  }
}
