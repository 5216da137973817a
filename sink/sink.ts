/** The sink process: workers, what has to be done now and then (reclaim, reap), and what it tells of itself over HTTP. */
import { setTimeout as sleep } from 'node:timers/promises'
import { awaitPartitions } from '../shared/await-partitions.js'
import type { Config } from '../shared/config.js'
import type { Group, Member } from '../shared/group.js'
import type { CallPlace, Partitions } from '../shared/keys.js'
import { type Logger, reasonOf } from '../shared/log.js'
import { createSinkMetrics, type SinkMetrics } from '../shared/metrics.js'
import { Nagging } from '../shared/nagging.js'
import { createPool, type Pool } from '../shared/postgres.js'
import { askAtStart, connectRedis, openPartitions, type RedisClient, warnOfLoss } from '../shared/redis.js'
import { requireAccess } from '../shared/redis-access.js'
import { requireReachable, requireSchema } from '../shared/schema.js'
import { requireArchiveDir } from './archive-file.js'
import { AwayServers } from './away.js'
import { Backlog } from './backlog.js'
import { askWritable, Gate } from './gate.js'
import { requireReady, serveHealth } from './health.js'
import { closeFinal } from './late.js'
import { type LeaseLimits, Leases } from './lease.js'
import { Legacy } from './legacy.js'
import { type Listening, listen } from './listen.js'
import { observe } from './observe.js'
import { Overdue } from './overdue.js'
import { Progress } from './progress.js'
import { Retention, retentionSettings } from './retention.js'
import { LOOK_MS, Share } from './share.js'
import { endStrays } from './strays.js'
import { Sweep } from './sweep.js'
import { Wake } from './wake.js'
import { Worker, type WorkerContext } from './worker.js'
import { writeSettings } from './write.js'

export interface Sink extends Member {
  /** http://host:port of /metrics, /healthz and /readyz; empty in a group, which has them for all its processes */
  url: string
  /** Finishes the batches in hand, settles, closes. */
  stop(): Promise<void>
}

/** How often lapsed leases and calls that are presumed over are looked for, and what pub/sub lost is made up for. */
const TEND_MS = 1000
const TEND_MOST_CALLS = 500
/** Each of a page's scripts keeps Redis from others for a millisecond or two. */
const REAP_PAGE = 50
const LEASE_MOST_CALLS = 500
/** How often PostgreSQL is searched for live calls that Redis has forgotten. */
const STRAYS_MS = 60_000
/** How often calls past their retention are looked for; with archives, so that each is not for a single call. */
const RETENTION_MS = 1000
const ARCHIVE_MS = 60_000
/** How often it is seen whether a sweep is due, at most. A sink that has just started has better things to do. */
const SWEEP_LOOK_MS = 10_000
/** One delivery that came to nothing may be anybody's fault: a sink that was killed, a network that was cut. */
const SUSPECT_LAPSES = 2
/** For the batches in hand, when the sink is to stop. */
const STOP_TIMEOUT_MS = 7000
const DISCONNECT_TIMEOUT_MS = 1000
/** How often legacy rows that were locked are tried again. */
const LOCKED_MS = 2000

/**
 * @param group if this process is one of several
 * @throws OperatorError when Redis or PostgreSQL cannot be used, or the schema does not fit
 */
export async function startSink(config: Config, log: Logger, group?: Group): Promise<Sink> {
  const leaseMs = config.LEASE_SECONDS * 1000
  const writeTimeoutMs = config.DATABASE_TIMEOUT * 1000
  const pool = createSinkPool(config, log, writeSettings(writeTimeoutMs, leaseMs))
  const clients: RedisClient[] = []
  const connect = async () => {
    const client = await connectRedis(config.REDIS_URL, log, config)
    clients.push(client)
    return client
  }
  const disconnect = async () => {
    for (const client of clients) client.disconnect()
    await pool.end()
  }
  try {
    const redis = await connect()
    const partitions = await requireStores(redis, pool, config, log)
    const leases = new Leases(redis, partitions, leaseMs)
    const overdue = new Overdue(redis, partitions)
    const backlog = new Backlog(redis, partitions)
    const wake = new Wake(config.PARTITIONS)
    leases.onBack = (partitions) => wake.news(partitions)
    const share = new Share(redis, partitions, wake)
    const listening = await askAtStart(config.REDIS_URL, () => listen(redis, partitions, wake, connect, log))

    const metrics = createSinkMetrics()
    const legacy = await openLegacy(config, pool, metrics, log)
    const progress = new Progress()
    const stopped = new AbortController()
    const gate = new Gate(() => askWritable(pool), log, stopped.signal)
    const parts = { redis, pool, backlog, gate, leases, progress, metrics }
    const ready = async () => void (await requireReady(parts, stopped.signal))
    const text = () => observe(parts).then(() => metrics.registry.metrics())
    const server = group ? undefined : await serveHealth(config, { ready, metrics: text })

    const settings = { limits: limitsOf(config), maxDeliveries: config.MAX_DELIVERIES, writeTimeoutMs }
    const tools = { progress, metrics, wake, gate, log, suspects: { isTried: false } }
    const context: WorkerContext = { redis, pool, leases, legacy, ...settings, ...tools }
    const workers = Array.from({ length: config.SINK_WORKERS }, () => new Worker(context))
    const running = workers.map((worker) => worker.run())
    tend(context, { share, listening, overdue }, partitions, config, stopped.signal)
    cleanUp(context, partitions, config, stopped.signal)
    const url = server ? `http://${config.SINK_METRICS_HOST}:${(server.address() as { port: number }).port}` : ''
    log.info({ url, workers: workers.length, partitions: config.PARTITIONS }, 'sink runs')
    return {
      url,
      ready,
      metrics: () => observe(parts).then(() => metrics.registry.getMetricsAsJSON()),
      async stop() {
        stopped.abort()
        for (const worker of workers) worker.stop()
        wake.ring()
        share.leave().catch(() => undefined) // it lapses
        await finish(workers, running, log)
        server?.close()
        server?.closeAllConnections()
        listening.stop()
        await atMost(DISCONNECT_TIMEOUT_MS, disconnect())
        log.info('sink stopped')
      },
    }
  } catch (error) {
    await disconnect()
    throw error
  }
}

/** @throws OperatorError when one of them, or the folder for archives, cannot be used; see `startSink` */
async function requireStores(redis: RedisClient, pool: Pool, config: Config, log: Logger): Promise<Partitions> {
  await requireReachable(pool, config)
  await requireSchema(pool, config)
  if (config.ARCHIVE_DIR !== undefined) await requireArchiveDir(config.ARCHIVE_DIR)
  return askAtStart(config.REDIS_URL, async () => {
    await requireAccess(redis, 'sink')
    await warnOfLoss(redis, log)
    return awaitPartitions(redis, config.PARTITIONS, log)
  })
}

/** A connection for each worker, one to ask whether PostgreSQL is there, and one for legacy rows that were locked. */
function createSinkPool(config: Config, log: Logger, settings: Record<string, string>): Pool {
  const connections = config.SINK_WORKERS + (config.LEGACY_CALL_SESSIONS ? 2 : 1)
  const onError = (error: Error) => log.warn({ err: error }, 'postgres connection')
  return createPool(config, 'sink', connections, onError, settings)
}

function limitsOf(config: Config): LeaseLimits {
  return {
    calls: LEASE_MOST_CALLS,
    entries: config.BATCH_MAX_ROWS,
    bytes: config.BATCH_MAX_BYTES,
    leaseMs: config.LEASE_SECONDS * 1000,
    suspectLapses: Math.min(SUSPECT_LAPSES, config.MAX_DELIVERIES),
  }
}

/** The batches in hand; what does not come to its end in time is given back. */
async function finish(workers: Worker[], running: Promise<void>[], log: Logger): Promise<void> {
  const finished = Promise.all(running).then(() => true)
  if (await Promise.race([finished, sleep(STOP_TIMEOUT_MS, false, { ref: false })])) return
  log.error('a batch in hand does not come to its end; it is given back, so another sink takes it over')
  await atMost(DISCONNECT_TIMEOUT_MS, Promise.all(workers.map((worker) => worker.giveUp())))
}

/** What is to be done besides batches, now and then. */
function tend(
  context: WorkerContext,
  { share, listening, overdue }: { share: Share; listening: Listening; overdue: Overdue },
  partitions: Partitions,
  config: Config,
  signal: AbortSignal,
): void {
  const { redis, pool, legacy, gate, metrics, log } = context
  const again = (what: string, everyMs: number, work: () => Promise<unknown>) =>
    repeat(what, everyMs, log, signal, work)
  again('sharing the partitions', TEND_MS, async () => {
    await share.announce(gate.isOpen)
    metrics.ownedPartitions.set(share.owned)
    metrics.shared.sinks.set(share.sinks)
  })
  again('stealing what other sinks leave', LOOK_MS, async () => gate.isOpen && share.steal())
  again('reclaiming', TEND_MS, () => reclaim(overdue, context))
  again('reaping', TEND_MS, async () => {
    await gate.pass()
    for (let left = TEND_MOST_CALLS; left > 0 && !signal.aborted; left -= REAP_PAGE) {
      const { calls, due } = await closeFinal(redis, pool, partitions, REAP_PAGE)
      await reap(overdue, context, calls)
      if (due < REAP_PAGE) break
    }
  })
  again('listening', TEND_MS, async () => {
    AwayServers.of(redis).tell(log)
    listening.tend()
  })
  // A Redis that was flushed does not know the count any more.
  again('claiming the partitions', TEND_MS, () => openPartitions(redis, config.PARTITIONS))
  again('looking for strays', STRAYS_MS, () => endStrays({ ...context, overdue }, config.IDLE_TIMEOUT * 1000, signal))
  if (!legacy) return
  again('filling legacy rows that were locked', LOCKED_MS, async () => {
    await gate.pass()
    metrics.shared.legacyHeld.set(await legacy.fillHeld(pool))
  })
}

/** What is done, slowly, to what has long been stored. */
function cleanUp(context: WorkerContext, partitions: Partitions, config: Config, signal: AbortSignal): void {
  const { gate, log } = context
  const { STREAM_RETENTION: seconds, ARCHIVE_DIR, SWEEP_INTERVAL } = config
  if (seconds !== undefined) {
    const retention = new Retention(context, partitions, retentionSettings(seconds, ARCHIVE_DIR))
    const everyMs = ARCHIVE_DIR === undefined ? RETENTION_MS : ARCHIVE_MS
    void repeat('removing what is past its retention', everyMs, log, signal, async () => {
      await gate.pass()
      await retention.round(signal)
    })
  }
  const sweep = new Sweep(context, partitions, SWEEP_INTERVAL * 1000)
  const lookMs = Math.min(SWEEP_LOOK_MS, SWEEP_INTERVAL * 1000)
  sleep(lookMs, undefined, { signal }).then(
    () => repeat('sweeping', lookMs, log, signal, () => sweep.tend(signal)),
    () => undefined, // stopped before that
  )
}

/** A connection that hangs would be waited for in vain. */
async function atMost(ms: number, work: Promise<unknown>): Promise<void> {
  await Promise.race([work, sleep(ms, undefined, { ref: false })])
}

async function openLegacy(config: Config, pool: Pool, metrics: SinkMetrics, log: Logger) {
  const { LEGACY_CALL_SESSIONS: table, DATABASE_TIMEOUT } = config
  if (!table) return undefined
  const { legacy, known } = await Legacy.open(pool, table, config, DATABASE_TIMEOUT * 1000, {
    filled: (rows) => metrics.legacyRows.inc(rows),
    failed(callSid, reason) {
      metrics.legacyFailures.inc()
      log.error({ callSid, reason }, 'its row in LEGACY_CALL_SESSIONS refuses what it is to be filled with')
    },
    held: ({ length: calls }) =>
      log.warn({ calls }, 'rows in LEGACY_CALL_SESSIONS are locked, or too slow: they are filled later'),
  })
  const { name, fills, leaves, isIndexed } = known
  log.info({ table: name, fills, leaves }, 'ended calls are filled in there, too')
  if (!isIndexed) log.warn({ table: name }, 'no index on call_sid: all of it is read for each batch with an ended call')
  return legacy
}

async function reclaim(overdue: Overdue, { wake, metrics, log }: WorkerContext): Promise<void> {
  const reclaimed = await overdue.reclaim(TEND_MOST_CALLS)
  if (reclaimed.length > 0) log.warn({ calls: reclaimed.length }, 'took over calls whose lease had lapsed')
  metrics.reclaimed.inc(reclaimed.length)
  wake.all() // for what was published and got lost, too
}

async function reap(overdue: Overdue, { wake, metrics }: WorkerContext, calls: CallPlace[]): Promise<void> {
  if (calls.length === 0) return
  const reaped = await overdue.reap(REAP_PAGE, calls)
  metrics.reaped.inc(reaped.length)
  if (reaped.length > 0) wake.all()
}

/** Again and again until the sink stops; what fails is tried again the next time. */
async function repeat(
  what: string,
  everyMs: number,
  log: Logger,
  signal: AbortSignal,
  work: () => Promise<unknown>,
): Promise<void> {
  const nagging = new Nagging()
  while (!signal.aborted) {
    try {
      await work()
      nagging.allOver()
    } catch (error) {
      const isNews = nagging.isDue(reasonOf(error as Error))
      if (isNews && !signal.aborted) log.warn({ err: error }, `${what} failed, will retry`)
    }
    await sleep(everyMs * (0.75 + Math.random() / 2), undefined, { signal }).catch(() => undefined) // aborted: the loop ends
  }
}
