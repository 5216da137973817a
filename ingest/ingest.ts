/** The ingest process: accept → parse → append → ack. */
import { setTimeout as sleep } from 'node:timers/promises'
import { type Config, OperatorError } from '../shared/config.js'
import type { Group, Member } from '../shared/group.js'
import type { Logger } from '../shared/log.js'
import { createIngestMetrics, type IngestMetrics } from '../shared/metrics.js'
import { connectRedis } from '../shared/redis.js'
import type { Appender } from './append.js'
import { Deliveries } from './deliver.js'
import { openAppender } from './open-appender.js'
import { IngestRoutes } from './routes.js'
import { listen, type Routes, type Server } from './server.js'
import { Spool } from './spool.js'
import { type Place, takeOverSpools } from './spool-places.js'

export interface Ingest extends Member {
  /** Where it listens: http://host:port or https://host:port */
  url: string
  /** Stops accepting, stores what was accepted, acks it, closes the connections with 1001. */
  stop(): Promise<void>
}

/** What Redis has not taken by then when ingest stops is given up: no producer was told that it is stored. */
const STOP_TIMEOUT_MS = 5000
const SPOOL_CLOSE_TIMEOUT_MS = 2000
const LOOPBACK = new Set(['127.0.0.1', '::1', 'localhost'])

/**
 * @param group if this process is one of several on one port
 * @throws OperatorError when the configuration does not allow to start, or Redis cannot be used
 */
export async function startIngest(config: Config, log: Logger, group?: Group): Promise<Ingest> {
  const host = listenHost(config)
  const redis = await connectRedis(config.REDIS_URL, log, config)
  try {
    const metrics = createIngestMetrics()
    metrics.queueMaxBytes.set(config.MAX_QUEUE_BYTES)
    metrics.spoolMaxBytes.set(config.SPOOL_DIR === undefined ? 0 : config.SPOOL_MAX_BYTES)
    const { partitions, appender } = await openAppender(redis, config, metrics, log)
    const deliveries = new Deliveries(appender)
    const routes = new IngestRoutes({ config, redis, partitions, appender, deliveries, metrics, log, group })
    const server = await serve(host, config, routes, group)
    try {
      // Not before the port is ours: a second ingest on this machine, started by mistake, must not take the spool away.
      deliveries.spool = await openSpool(config, appender, metrics, log, group)
    } catch (error) {
      server.stopListening()
      server.closeConnections()
      throw error
    }
    routes.phase = 'serving'
    const scheme = config.TLS_CERT_FILE ? 'https' : 'http'
    const url = `${scheme}://${host.includes(':') ? `[${host}]` : host}:${server.port}`
    log.info({ url, partitions: partitions.all.length, durability: config.DURABILITY }, 'ingest listens')
    return {
      url,
      metrics: () => routes.ownMetrics(),
      ready: () => routes.requireReady(),
      async stop() {
        routes.phase = 'stopping'
        server.stopListening()
        deliveries.spool?.stopReplay()
        const deadline = Date.now() + STOP_TIMEOUT_MS
        const stored = await appender.drain(STOP_TIMEOUT_MS)
        server.closeConnections()
        // Closing bound connections records that they closed.
        if (!stored || !(await appender.drain(deadline - Date.now()))) {
          log.error(
            { err: appender.failure ?? 'no answer' },
            'ingest stops although Redis has not stored all it was given',
          )
        }
        // A disk that hangs would be waited for in vain; what is on it is there at the next start.
        await Promise.race([deliveries.spool?.close(), sleep(SPOOL_CLOSE_TIMEOUT_MS, undefined, { ref: false })])
        appender.abandon()
        redis.disconnect()
        log.info('ingest stopped')
      },
    }
  } catch (error) {
    redis.disconnect()
    throw error
  }
}

function serve(host: string, config: Config, routes: Routes, group: Group | undefined): Promise<Server> {
  const { TLS_CERT_FILE: cert, TLS_KEY_FILE: key } = config
  const options = {
    host,
    port: group?.port ?? config.INGEST_PORT,
    sharing: group && (group.port === undefined ? ('first' as const) : ('others' as const)),
    tokens: config.INGEST_TOKENS,
    maxMessageBytes: config.MAX_MESSAGE_BYTES,
    bodies: {
      maxBytes: config.MAX_BODY_BYTES,
      maxHeldBytes: Math.max(config.MAX_BODY_BYTES, config.MAX_QUEUE_BYTES),
    },
    ...(cert && key ? { tls: { cert, key } } : {}),
  }
  return listen(options, routes)
}

async function openSpool(
  config: Config,
  appender: Appender,
  metrics: IngestMetrics,
  log: Logger,
  place: Place = { index: 0, size: 1 },
) {
  if (config.SPOOL_DIR === undefined) return undefined
  const { directory, moved } = await takeOverSpools(config.SPOOL_DIR, place)
  if (moved > 0) log.warn({ segments: moved }, 'took over spools of processes that there are no more')
  return await Spool.open({ directory, maxBytes: config.SPOOL_MAX_BYTES }, appender, metrics, log)
}

/** Without tokens anybody who can reach the port can write calls: then only this machine may reach it. */
function listenHost(config: Config): string {
  const authenticated = config.INGEST_TOKENS.length > 0
  const host = config.INGEST_HOST ?? (authenticated ? '0.0.0.0' : '127.0.0.1')
  if (authenticated || config.ALLOW_UNAUTHENTICATED || LOOPBACK.has(host)) return host
  throw new OperatorError(
    `INGEST_HOST is ${host}, and anybody could write calls: set INGEST_TOKENS, or ALLOW_UNAUTHENTICATED=true if the network protects it`,
  )
}
