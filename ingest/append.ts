/**
 * append: group commit into Redis. What arrived since the last flush goes out in one script call per lane (see lane-queue.ts);
 * when nothing is in flight it goes at once, never on a timer alone. An event is settled (acked) only when Redis has executed
 * its append.
 */
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { type CallEvent, Refusal } from '../shared/events.js'
import type { Partitions } from '../shared/keys.js'
import { type Lane, lanesOf } from '../shared/lanes.js'
import type { Logger } from '../shared/log.js'
import type { IngestMetrics } from '../shared/metrics.js'
import { Nagging } from '../shared/nagging.js'
import type { RedisClient } from '../shared/redis.js'
import { isNoScript } from '../shared/script.js'
import type { Batch } from './batch.js'
import type { Confirm } from './durability.js'
import { AWAY_AFTER_MS, EVENT_OVERHEAD_BYTES, LaneQueue } from './lane-queue.js'
import type { ScriptCall } from './script-call.js'

/** Whoever waits for an event: a WebSocket connection, an HTTP request, or a segment of the spool. */
export interface Origin {
  /** @param refusal absent when the event is stored */
  settle(position: number, refusal?: Refusal): void
  /** Called after each flush that settled some of its events. */
  settled(): void
}

export interface AppenderOptions {
  idleTimeoutMs: number
  disconnectGraceMs: number
  maxQueueBytes: number
  /** Runs behind each append on the same connection, and must succeed before its events count as stored. */
  confirm?: Confirm
}

/** What those who hand events over need of it. */
export type Sender = Pick<Appender, 'append' | 'isFull' | 'isFullFor' | 'isAway'>

export class Appender {
  private readonly queues: LaneQueue[]
  private flushScheduled = false
  private queuedBytes = 0
  private queuedEvents = 0
  /** Why the last append failed; undefined when it succeeded. */
  failure: string | undefined
  /** Nothing is sent any more. */
  isAbandoned = false
  private readonly nagging = new Nagging()
  /** Free for the next batches of any lane: their buffers are worth keeping. */
  readonly scriptCalls: ScriptCall[] = []

  constructor(
    client: RedisClient,
    private readonly partitions: Partitions,
    readonly options: AppenderOptions,
    private readonly metrics: IngestMetrics,
    private readonly log: Logger,
  ) {
    const producer = randomUUID()
    this.queues = lanesOf(client, partitions).map((lane) => new LaneQueue(lane, this, partitions, producer))
  }

  /** True when no more should be taken in until Redis has caught up. */
  get isFull(): boolean {
    return this.queuedBytes > this.options.maxQueueBytes
  }

  /**
   * True when no more of that call should be. What a Cluster's dead server does not take must not fill the queue for the calls of
   * others: a lane that is away has its equal part of the limit and no more, so all the lanes of a third of the servers have a third.
   */
  isFullFor(callSid: string): boolean {
    if (this.isFull) return true
    const part = this.options.maxQueueBytes / this.queues.length
    if (this.queuedBytes <= part) return false // asked for every event: as a rule it is known without looking for its lane
    const queue = this.queueOf(callSid)
    return queue.queuedBytes > part && queue.isAway(Date.now())
  }

  /** What is given to it now would wait, and nobody knows for how long. */
  get isAway(): boolean {
    return this.failure !== undefined || this.isFull || this.waitingMs > AWAY_AFTER_MS
  }

  /** For how long the oldest event has been waiting for Redis. */
  get waitingMs(): number {
    const now = Date.now()
    return Math.max(...this.queues.map(({ waitingSince }) => now - (waitingSince ?? now)))
  }

  /** Whose oldest event has been waiting for longer. */
  lanesWaiting(ms: number): Lane[] {
    const before = Date.now() - ms
    return this.queues
      .filter(({ waitingSince }) => waitingSince !== undefined && waitingSince < before)
      .map(({ lane }) => lane)
  }

  /**
   * Takes one event; `origin.settle(position)` is called once it is stored.
   *
   * @param payload the event's JSON, as it goes into the stream
   */
  append(event: CallEvent, payload: string, origin: Origin, position: number): void {
    this.queueOf(event.call_sid).push(event, payload, origin, position)
    this.queuedBytes += payload.length + EVENT_OVERHEAD_BYTES
    this.queuedEvents++
    if (!this.flushScheduled) {
      this.flushScheduled = true
      // After this turn of the event loop: whatever else its sockets brought goes into the same flush.
      setImmediate(() => {
        this.flushScheduled = false
        for (const queue of this.queues) queue.flush()
      })
    }
  }

  private queueOf(callSid: string): LaneQueue {
    return this.queues.length === 1 ? this.queues[0]! : this.queues[this.partitions.of(callSid).partition]!
  }

  applied(batch: Batch, refused: [number, string][], seconds: number): void {
    this.failure = undefined
    const refusals = new Map(refused)
    const waiting = new Set<Origin>()
    let index = 0
    for (const call of batch.calls) {
      index++
      const error = refusals.get(index)
      const refusal = error === undefined ? undefined : new Refusal('not_stored', `Redis refused the event: ${error}`)
      if (refusal) this.metrics.refused.inc({ code: refusal.code }, call.payloads.length)
      else this.metrics.accepted.inc(call.payloads.length)
      for (let i = 0; i < call.origins.length; i++) {
        const origin = call.origins[i]!
        origin.settle(call.positions[i]!, refusal)
        waiting.add(origin)
      }
    }
    this.queuedBytes -= batch.bytes + batch.events * EVENT_OVERHEAD_BYTES
    this.queuedEvents -= batch.events
    this.metrics.flushEvents.observe(batch.events)
    this.metrics.flushSeconds.observe(seconds)
    for (const origin of waiting) origin.settled()
  }

  /** Of a Cluster's server that is down all lanes fail, again and again: it is said once, and now and then. */
  failed(error: Error, { address = 'no server' }: Lane): void {
    this.failure = error.message
    this.metrics.flushFailures.inc()
    if (isNoScript(error) || !this.nagging.isDue(address)) return
    this.log.warn({ redis: address, err: error, queued: this.queuedEvents }, 'append failed, will retry')
  }

  recovered({ address = 'no server' }: Lane): void {
    if (this.nagging.isOver(address)) this.log.info({ redis: address }, 'Redis takes events again')
  }

  /** @returns true as soon as all that was taken is stored; false if it is not by then */
  async drain(timeoutMs = Number.POSITIVE_INFINITY): Promise<boolean> {
    const deadline = Date.now() + timeoutMs
    while (this.queuedEvents > 0) {
      if (Date.now() > deadline) return false
      await sleep(2)
    }
    return true
  }

  /** Gives up what is not stored; Redis is not asked any more. */
  abandon(): void {
    this.isAbandoned = true
  }

  observe(): void {
    this.metrics.queuedEvents.set(this.queuedEvents)
    this.metrics.queuedBytes.set(this.queuedBytes)
    this.metrics.inFlight.set(this.queues.reduce((sum, { inFlight }) => sum + inFlight, 0))
    const now = Date.now()
    const away = this.queues.filter((queue) => queue.isAway(now))
    this.metrics.partitionsAway.set(away.reduce((sum, { lane }) => sum + lane.partitions.length, 0))
  }
}
