/** What ingest answers on each of its routes, whatever serves them. */
import type { Config } from '../shared/config.js'
import { parseEvent, Refusal } from '../shared/events.js'
import type { Group, MetricValues, Waiting } from '../shared/group.js'
import type { Partitions } from '../shared/keys.js'
import { type Logger, reasonOf } from '../shared/log.js'
import { closeCodeLabel, type IngestMetrics } from '../shared/metrics.js'
import type { RedisClient } from '../shared/redis.js'
import type { Appender } from './append.js'
import { listOpenCalls, readLiveCall } from './calls.js'
import type { Deliveries } from './deliver.js'
import type { RequestHead } from './exchange.js'
import { type Answer, badQuery, notServing, postEvents, problem } from './http.js'
import { ProviderRoutes } from './provider-routes.js'
import { othersGoOn } from './readiness.js'
import type { Connection, Routes } from './server.js'
import { OVERLOADED, type Socket, StreamConnection } from './stream.js'

/** Events that wait for Redis for longer make the process unready, so that a balancer sends producers elsewhere. */
const UNREADY_AFTER_MS = 5000

export interface IngestParts {
  config: Config
  redis: RedisClient
  partitions: Partitions
  appender: Appender
  deliveries: Deliveries
  metrics: IngestMetrics
  log: Logger
  /** Absent: this process is the whole ingest. */
  group?: Group | undefined
}

export class IngestRoutes implements Routes {
  phase: 'starting' | 'serving' | 'stopping' = 'starting'

  private readonly providers: ProviderRoutes

  constructor(private readonly parts: IngestParts) {
    this.providers = new ProviderRoutes(parts)
  }

  stream(socket: Socket, query: URLSearchParams): Connection | Refusal {
    const { config, appender, metrics } = this.parts
    const boundTo = query.get('call_sid') ?? undefined
    if (boundTo !== undefined) {
      const check = parseEvent({ type: 'call.ended', call_sid: boundTo })
      if (check instanceof Refusal) return check
    }
    if (this.phase === 'stopping') return new Refusal('stopping', 'the process is stopping')
    // Before it is greeted: a bound connection is an event, its end another one, and who is turned away comes back for more.
    const isFull = boundTo === undefined ? appender.isFull : appender.isFullFor(boundTo)
    if (isFull) return new Refusal('overloaded', OVERLOADED)
    metrics.connections.inc()
    const options = { window: config.WINDOW, maxMessageBytes: config.MAX_MESSAGE_BYTES }
    const connection = new StreamConnection(socket, boundTo, appender, options, metrics)
    return {
      opened: () => connection.opened(),
      accept: (text) => {
        // What is not taken is not acked: its producer sends it to whoever comes next.
        if (this.phase !== 'stopping') connection.accept(text)
      },
      closed: (code) => {
        metrics.connections.dec()
        connection.closed(code)
      },
    }
  }

  async postEvents(contentType: string, query: URLSearchParams, body: Buffer): Promise<Answer> {
    if (this.phase !== 'serving') return notServing(this.phase)
    return postEvents(contentType, query, body, this.parts.deliveries, this.parts.metrics)
  }

  postAnswered({ status }: Answer): void {
    this.parts.metrics.requests.inc({ status: status.slice(0, 3) })
  }

  webSocketClosed(code: number): void {
    this.parts.metrics.closed.inc({ code: closeCodeLabel(code) })
  }

  denyWebhook(head: RequestHead): Answer | undefined {
    return this.phase === 'serving' ? this.providers.denyUnread(head) : notServing(this.phase)
  }

  async webhook(head: RequestHead, body: Buffer): Promise<Answer> {
    return this.phase === 'serving' ? this.providers.webhook(head, body) : notServing(this.phase)
  }

  providerStream(head: RequestHead): Connection | Answer {
    return this.phase === 'serving' ? this.providers.stream(head) : notServing(this.phase)
  }

  async listCalls(query: URLSearchParams): Promise<Answer> {
    const limit = Number(query.get('limit') ?? 100)
    if ((query.get('state') ?? 'active') !== 'active') return badQuery('state wants active')
    if (!Number.isInteger(limit) || limit < 1 || limit > 1000) return badQuery('limit wants an integer from 1 to 1000')
    const page = await listOpenCalls(this.parts.redis, this.parts.partitions, query.get('cursor') ?? '', limit)
    return page ? { status: '200 OK', body: page } : badQuery('cursor wants what `next` of the page before was')
  }

  async getCall(callSid: string): Promise<Answer> {
    const call = await readLiveCall(this.parts.redis, this.parts.partitions, callSid)
    return call ? { status: '200 OK', body: call } : problem('404 Not Found', 'unknown_call', 'Redis has no such call')
  }

  async metrics(): Promise<Answer> {
    const { group, metrics } = this.parts
    const headers = { 'Content-Type': metrics.registry.contentType }
    try {
      // Of one process alone they would look as if all had been counted anew.
      const body = group ? await group.metrics() : await this.observed().metrics()
      return { status: '200 OK', headers, body }
    } catch (error) {
      return problem('503 Service Unavailable', 'no_metrics', reasonOf(error as Error))
    }
  }

  ownMetrics(): Promise<MetricValues> {
    return this.observed().getMetricsAsJSON()
  }

  private observed(): IngestMetrics['registry'] {
    const { appender, deliveries, metrics, redis } = this.parts
    appender.observe()
    deliveries.spool?.observe()
    metrics.redisUp.set(redis.status === 'ready' ? 1 : 0)
    return metrics.registry
  }

  async ready(): Promise<Answer> {
    if (this.phase !== 'serving') return notServing(this.phase)
    try {
      const waiting = this.parts.group ? await this.parts.group.ready() : await this.requireReady()
      return { status: '200 OK', body: { status: 'ready', ...(waiting && { waiting }) } }
    } catch (error) {
      const code = error instanceof Unready ? error.code : 'not_ready'
      return problem('503 Service Unavailable', code, (error as Error).message)
    }
  }

  /**
   * @returns undefined when nothing waits
   * @throws why this process cannot do its job
   */
  async requireReady(): Promise<Waiting | undefined> {
    const { redis, appender } = this.parts
    if (this.phase !== 'serving') throw new Unready(this.phase, `the process is ${this.phase}`)
    if (redis.status !== 'ready') throw new Unready('redis', `Redis: ${redis.status}`)
    const waiting = appender.lanesWaiting(UNREADY_AFTER_MS)
    if (waiting.length === 0) return undefined
    const reason = appender.failure ?? 'it does not answer'
    if (!(await othersGoOn(redis, waiting))) throw new Unready('no_progress', `Redis stores nothing: ${reason}`)
    return { partitions: waiting.flatMap(({ partitions }) => partitions.map(({ partition }) => partition)), reason }
  }
}

class Unready extends Error {
  constructor(
    readonly code: string,
    message: string,
  ) {
    super(message)
  }
}
