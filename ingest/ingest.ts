/** The ingest process: accept → parse → append → ack. */
import { type Config, OperatorError } from '../shared/config.js'
import { parseEvent, Refusal } from '../shared/events.js'
import type { Partitions } from '../shared/keys.js'
import type { Logger } from '../shared/log.js'
import { createIngestMetrics, type IngestMetrics } from '../shared/metrics.js'
import { connectRedis, openPartitions, type RedisClient, warnOfLoss } from '../shared/redis.js'
import { Appender } from './append.js'
import { listOpenCalls, readLiveCall } from './calls.js'
import { Deliveries } from './deliver.js'
import { durabilityCheck } from './durability.js'
import { type Answer, badQuery, overloaded, postEvents, problem } from './http.js'
import { listen, type Routes } from './server.js'
import { Spool } from './spool.js'
import { StreamConnection } from './stream.js'

export interface Ingest {
  /** Where it listens: http://host:port or https://host:port */
  url: string
  /** Stops accepting, stores what was accepted, acks it, closes the connections with 1001. */
  stop(): Promise<void>
}

/** Events that wait for Redis for longer make the process unready, so that a balancer sends producers elsewhere. */
const UNREADY_AFTER_MS = 5000
/** What Redis has not taken by then when ingest stops is given up: no producer was told that it is stored. */
const STOP_TIMEOUT_MS = 5000
const LOOPBACK = new Set(['127.0.0.1', '::1', 'localhost'])

/** @throws OperatorError when the configuration does not allow to start, or Redis cannot be used */
export async function startIngest(config: Config, log: Logger): Promise<Ingest> {
  const host = listenHost(config)
  const redis = await connectRedis(config.REDIS_URL, log)
  try {
    const partitions = await openPartitions(redis, config.PARTITIONS)
    await warnOfLoss(redis, log)
    const confirm = await durabilityCheck(redis, config.DURABILITY)
    const metrics = createIngestMetrics()
    const appender = new Appender(
      redis,
      partitions,
      {
        idleTimeoutMs: config.IDLE_TIMEOUT * 1000,
        disconnectGraceMs: config.DISCONNECT_GRACE * 1000,
        maxQueueBytes: config.MAX_QUEUE_BYTES,
        ...(confirm ? { confirm } : {}),
      },
      metrics,
      log,
    )
    const deliveries = new Deliveries(appender)
    let starting = true
    let stopping = false

    const routes: Routes = {
      stream(socket, query) {
        const boundTo = query.get('call_sid') ?? undefined
        if (boundTo !== undefined) {
          const check = parseEvent({ type: 'call.ended', call_sid: boundTo })
          if (check instanceof Refusal) return check
        }
        if (stopping) return new Refusal('stopping', 'the process is stopping')
        metrics.connections.inc()
        const options = { window: config.WINDOW, maxMessageBytes: config.MAX_MESSAGE_BYTES }
        const connection = new StreamConnection(socket, boundTo, appender, options, metrics)
        return {
          opened: () => connection.opened(),
          // What is not taken is not acked: its producer sends it to whoever comes next.
          accept: (text) => stopping || connection.accept(text),
          closed: (code) => {
            metrics.connections.dec()
            connection.closed(code)
          },
        }
      },
      async postEvents(contentType, query, body) {
        if (starting) return overloaded('the process is starting')
        if (stopping) return overloaded('the process is stopping')
        return postEvents(contentType, query, body, deliveries, metrics)
      },
      listCalls: (query) => listCalls(redis, partitions, query),
      getCall: (callSid) => getCall(redis, partitions, callSid),
      async metrics() {
        appender.observe()
        deliveries.spool?.observe()
        const { registry } = metrics
        return { status: '200 OK', headers: { 'Content-Type': registry.contentType }, body: await registry.metrics() }
      },
      ready() {
        if (starting) return problem('503 Service Unavailable', 'starting', 'the process is starting')
        if (stopping) return problem('503 Service Unavailable', 'stopping', 'the process is stopping')
        if (redis.status !== 'ready') return problem('503 Service Unavailable', 'redis', `Redis: ${redis.status}`)
        if (appender.waitingMs > UNREADY_AFTER_MS) {
          const why = appender.failure ?? 'it does not answer'
          return problem('503 Service Unavailable', 'no_progress', `Redis stores nothing: ${why}`)
        }
        return { status: '200 OK', body: { status: 'ready' } }
      },
    }

    const tls = config.TLS_CERT_FILE && config.TLS_KEY_FILE
    const server = await listen(
      {
        host,
        port: config.INGEST_PORT,
        tokens: config.INGEST_TOKENS,
        maxMessageBytes: config.MAX_MESSAGE_BYTES,
        maxBodyBytes: config.MAX_BODY_BYTES,
        ...(tls ? { tls: { cert: config.TLS_CERT_FILE!, key: config.TLS_KEY_FILE! } } : {}),
      },
      routes,
    )
    try {
      // Not before the port is ours: a second ingest on this machine, started by mistake, must not take the spool away.
      deliveries.spool = await openSpool(config, appender, metrics, log)
    } catch (error) {
      server.stopListening()
      server.closeConnections()
      throw error
    }
    starting = false
    const url = `${tls ? 'https' : 'http'}://${host.includes(':') ? `[${host}]` : host}:${server.port}`
    log.info({ url, partitions: partitions.all.length, durability: config.DURABILITY }, 'ingest listens')
    return {
      url,
      async stop() {
        stopping = true
        server.stopListening()
        deliveries.spool?.stopReplay()
        const stored = await appender.drain(STOP_TIMEOUT_MS)
        server.closeConnections()
        // Closing bound connections records that they closed.
        if (!stored || !(await appender.drain(STOP_TIMEOUT_MS))) {
          log.error(
            { err: appender.failure ?? 'no answer' },
            'ingest stops although Redis has not stored all it was given',
          )
        }
        await deliveries.spool?.close()
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

async function openSpool(config: Config, appender: Appender, metrics: IngestMetrics, log: Logger) {
  if (config.SPOOL_DIR === undefined) return undefined
  return await Spool.open({ directory: config.SPOOL_DIR, maxBytes: config.SPOOL_MAX_BYTES }, appender, metrics, log)
}

async function listCalls(redis: RedisClient, partitions: Partitions, query: URLSearchParams): Promise<Answer> {
  const limit = Number(query.get('limit') ?? 100)
  if ((query.get('state') ?? 'active') !== 'active') return badQuery('state wants active')
  if (!Number.isInteger(limit) || limit < 1 || limit > 1000) return badQuery('limit wants an integer from 1 to 1000')
  const page = await listOpenCalls(redis, partitions, query.get('cursor') ?? '', limit)
  return page ? { status: '200 OK', body: page } : badQuery('cursor wants what `next` of the page before was')
}

async function getCall(redis: RedisClient, partitions: Partitions, callSid: string): Promise<Answer> {
  const call = await readLiveCall(redis, partitions, callSid)
  return call ? { status: '200 OK', body: call } : problem('404 Not Found', 'unknown_call', 'Redis has no such call')
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
