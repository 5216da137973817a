/** The sink process: workers, and what has to be done now and then (reclaim, reap, measure the lag). */
import { createServer, type Server } from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Config, OperatorError } from '../shared/config.js'
import type { Logger } from '../shared/log.js'
import { createSinkMetrics } from '../shared/metrics.js'
import { createPool, type Pool, reasonOf } from '../shared/postgres.js'
import { connectRedis, openPartitions, type RedisClient } from '../shared/redis.js'
import { requireReachable, requireSchema } from '../shared/schema.js'
import { Leases } from './lease.js'
import { Wake } from './wake.js'
import { Progress, Worker, type WorkerContext } from './worker.js'
import { WRITE_SETTINGS } from './write.js'

export interface Sink {
  /** http://host:port of /metrics, /healthz and /readyz */
  url: string
  /** Finishes the batches in hand, settles, closes. */
  stop(): Promise<void>
}

/** How often lapsed leases and calls that are presumed over are looked for, and what pub/sub lost is made up for. */
const TEND_MS = 1000
const TEND_MOST_CALLS = 500
const LEASE_MOST_CALLS = 500
const UNREADY_AFTER_MS = 5000
const POSTGRES_TIMEOUT_MS = 2000
/** For the batches in hand, when the sink is to stop. */
const STOP_TIMEOUT_MS = 7000

/** @throws OperatorError when Redis or PostgreSQL cannot be used, or the schema does not fit */
export async function startSink(config: Config, log: Logger): Promise<Sink> {
  const onError = (error: Error) => log.warn({ err: error.message }, 'postgres connection')
  // A connection for each worker, and one that readiness asks whether PostgreSQL is there.
  const pool = createPool(config.DATABASE_URL, 'sink', config.SINK_WORKERS + 1, onError, WRITE_SETTINGS)
  const clients: RedisClient[] = []
  const connect = async () => {
    const client = await connectRedis(config.REDIS_URL, log)
    clients.push(client)
    return client
  }
  const disconnect = async () => {
    for (const client of clients) client.disconnect()
    await pool.end()
  }
  try {
    const redis = await connect()
    const subscriber = await connect()
    await requireReachable(pool, config.DATABASE_URL)
    await requireSchema(pool)
    const partitions = await openPartitions(redis, config.PARTITIONS)
    const leaseMs = config.LEASE_SECONDS * 1000
    const leases = new Leases(redis, partitions, leaseMs)
    const wake = new Wake(config.PARTITIONS)
    subscriber.on('smessage', (_channel: string, message: string) => wake.add(message.split(',').map(Number)))
    subscriber.on('ready', () => wake.all()) // what was published while it was away is lost
    for (const channel of leases.wakeChannels) await subscriber.ssubscribe(channel)

    const metrics = createSinkMetrics()
    const progress = new Progress()
    const stopped = new AbortController()
    const observe = async () => {
      const { readyCalls, openCalls, lagMs } = await leases.backlog()
      metrics.readyCalls.set(readyCalls)
      metrics.openCalls.set(openCalls)
      metrics.lagSeconds.set(lagMs / 1000)
      return metrics.registry.metrics()
    }
    const unready = async () => {
      if (stopped.signal.aborted) return 'stopping'
      if (redis.status !== 'ready') return `Redis: ${redis.status}`
      return progress.stalled(UNREADY_AFTER_MS) ?? (await postgresFailure(pool))
    }
    const server = await serve(config, metrics.registry.contentType, observe, unready)

    const limits = { calls: LEASE_MOST_CALLS, entries: config.BATCH_MAX_ROWS, bytes: config.BATCH_MAX_BYTES, leaseMs }
    const context: WorkerContext = { redis, pool, leases, wake, limits, metrics, log, progress }
    const workers = Array.from({ length: config.SINK_WORKERS }, () => new Worker(context))
    const running = workers.map((worker) => worker.run())
    const tending = tend(context, stopped.signal)
    const { port } = server.address() as { port: number }
    const url = `http://${config.SINK_METRICS_HOST}:${port}`
    log.info({ url, workers: workers.length, partitions: config.PARTITIONS }, 'sink runs')
    return {
      url,
      async stop() {
        stopped.abort()
        for (const worker of workers) worker.stop()
        wake.ring()
        const finished = Promise.all([...running, tending]).then(() => true)
        const isFinished = await Promise.race([finished, sleep(STOP_TIMEOUT_MS, false, { ref: false })])
        server.close()
        server.closeAllConnections()
        // A connection that hangs would be waited for in vain.
        const disconnected = disconnect()
        if (isFinished) await disconnected
        else log.error('a batch in hand does not come to its end; it is not settled, so another sink takes it over')
        log.info('sink stopped')
      },
    }
  } catch (error) {
    await disconnect()
    throw error
  }
}

async function tend({ leases, wake, metrics, log, progress }: WorkerContext, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    try {
      const reclaimed = await leases.reclaim(TEND_MOST_CALLS)
      if (reclaimed.length > 0) log.warn({ calls: reclaimed.length }, 'took over calls whose lease had lapsed')
      metrics.reclaimed.inc(reclaimed.length)
      const reaped = await leases.reap(TEND_MOST_CALLS)
      metrics.reaped.inc(reaped.length)
    } catch (error) {
      progress.failed(error as Error)
      log.warn({ err: (error as Error).message }, 'tending failed, will retry')
    }
    wake.all()
    await sleep(TEND_MS * (0.75 + Math.random() / 2), undefined, { signal }).catch(() => undefined) // aborted: the loop ends
  }
}

/** An idle sink learns of a PostgreSQL that is gone only by asking. */
async function postgresFailure(pool: Pool): Promise<string | undefined> {
  const late = sleep(POSTGRES_TIMEOUT_MS, `it does not answer within ${POSTGRES_TIMEOUT_MS} ms`, { ref: false })
  const asked = pool.query('SELECT 1').then(
    () => undefined,
    (error: Error) => reasonOf(error),
  )
  const failure = await Promise.race([asked, late])
  return failure && `PostgreSQL: ${failure}`
}

function serve(
  config: Config,
  contentType: string,
  observe: () => Promise<string>,
  unready: () => Promise<string | undefined>,
): Promise<Server> {
  const server = createServer((request, response) => {
    const send = (status: number, body: string, type = 'text/plain; charset=utf-8') =>
      response.writeHead(status, { 'Content-Type': type }).end(body)
    if (request.url === '/healthz') send(200, 'ok\n')
    else if (request.url === '/readyz') unready().then((why) => send(why ? 503 : 200, `${why ?? 'ready'}\n`))
    else if (request.url === '/metrics') {
      observe().then(
        (text) => send(200, text, contentType),
        (error: Error) => send(503, `${error.message}\n`),
      )
    } else send(404, 'there is /metrics, /healthz and /readyz\n')
  })
  return new Promise((resolve, reject) => {
    server.once('error', (error) => {
      const where = `${config.SINK_METRICS_HOST}:${config.SINK_METRICS_PORT}`
      reject(new OperatorError(`SINK_METRICS_PORT: cannot listen on ${where}: ${error.message}`))
    })
    server.listen(config.SINK_METRICS_PORT, config.SINK_METRICS_HOST, () => resolve(server))
  })
}
