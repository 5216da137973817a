/**
 * append: group commit into Redis. What arrived since the last flush goes out in one script call per lane, a few in
 * flight; when nothing is in flight it goes at once, never on a timer alone.
 *
 * What must hold:
 *  - the events of one call reach its stream in the order they were given;
 *  - an event is settled (acked) only when Redis has executed its append;
 *  - an append that is sent again, because its reply got lost, is applied once: batches are numbered, see append.lua.
 */
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { backoffMs } from '../shared/backoff.js'
import { crashPoint } from '../shared/crash.js'
import { type CallEvent, Refusal, resumes } from '../shared/events.js'
import type { PartitionKeys, Partitions } from '../shared/keys.js'
import type { Logger } from '../shared/log.js'
import type { IngestMetrics } from '../shared/metrics.js'
import { isNoScript, type Lane, lanesOf, type RedisClient, Script } from '../shared/redis.js'
import { FairQueue, type Waiting } from './fair-queue.js'
import { sessionFields } from './session.js'

const MAX_BATCH_EVENTS = 512
const MAX_BATCH_BYTES = 1024 * 1024
/** One batch that Redis executes and one that waits for it; more would only make batches smaller. */
const MAX_IN_FLIGHT = 2
/** What an event takes in memory beside its JSON, roughly. */
const EVENT_OVERHEAD_BYTES = 256
const FIRST_RETRY_PAUSE_MS = 10
const MAX_RETRY_PAUSE_MS = 1000

const appendScript = new Script('ingest/append.lua')

/** Whoever waits for an event: a WebSocket connection, an HTTP request, or a segment of the spool. */
export interface Origin {
  /** @param refusal absent when the event is stored */
  settle(position: number, refusal?: Refusal): void
  /** Called after each flush that settled some of its events. */
  settled(): void
}

interface CallBatch {
  partition: PartitionKeys
  bytes: number
  /** One of its events would bring it back, had it been presumed over. */
  resumes: boolean
  payloads: string[]
  origins: Origin[]
  positions: number[]
  /** Field, value, field, value … */
  session: string[]
}

interface Batch {
  number: number
  /** When it was made up, ms epoch. */
  since: number
  events: number
  bytes: number
  calls: Map<string, CallBatch>
  /** It is in flight. Once it has been, Redis may have applied it: nothing may be added. */
  sent: boolean
}

export interface AppenderOptions {
  idleTimeoutMs: number
  disconnectGraceMs: number
  maxQueueBytes: number
  /** Runs right behind each append on the same connection, and must succeed before its events count as stored. */
  confirm?: (client: RedisClient) => Promise<void>
}

/** The events of one lane, in numbered batches. */
class LaneQueue {
  /** Those in flight, or to be sent again, in order. */
  private readonly batches: Batch[] = []
  /** Made up into a batch only when one can be sent: until then whoever comes next gets his turn. */
  private readonly queue = new FairQueue()
  private inFlight = 0
  private nextNumber = 1
  private failing = false
  /** In a row: a Redis that answers, but refuses to write, must not be asked all the time. */
  private failures = 0
  private readonly producerKey: string

  constructor(
    private readonly lane: Lane,
    private readonly client: RedisClient,
    private readonly appender: Appender,
    private readonly partitions: Partitions,
    producer: string,
  ) {
    this.producerKey = lane.partitions[0]!.producerPrefix + producer
  }

  push(waiting: Waiting): void {
    this.queue.push(waiting)
  }

  private nextBatch(): Batch {
    const batch = { number: this.nextNumber++, since: Date.now(), events: 0, bytes: 0, calls: new Map(), sent: false }
    this.queue.take((waiting) => {
      const { length } = waiting.payload
      if (batch.events === MAX_BATCH_EVENTS || (batch.events > 0 && batch.bytes + length > MAX_BATCH_BYTES))
        return false
      add(batch, waiting, this.partitions.of(waiting.event.call_sid))
      return true
    })
    this.batches.push(batch)
    return batch
  }

  /** Since when (ms epoch) its oldest batch has been waiting; undefined when there is none. */
  get waitingSince(): number | undefined {
    return this.batches[0]?.since
  }

  flush(): void {
    const canSend = () => !this.failing && !this.appender.isAbandoned && this.inFlight < MAX_IN_FLIGHT
    for (const batch of this.batches) if (!batch.sent && canSend()) void this.send(batch)
    while (!this.queue.isEmpty && canSend()) void this.send(this.nextBatch())
  }

  private async send(batch: Batch): Promise<void> {
    batch.sent = true
    this.inFlight++
    const started = performance.now()
    const { keys, args } = this.encode(batch)
    crashPoint('before-append')
    try {
      const [reply] = await Promise.all([
        appendScript.runLoaded(this.client, keys, args),
        this.appender.options.confirm?.(this.client),
      ])
      crashPoint('after-append')
      this.failures = 0
      this.batches.splice(this.batches.indexOf(batch), 1)
      this.appender.applied(batch, reply as [number, string][], (performance.now() - started) / 1000)
    } catch (error) {
      batch.sent = false
      if (!this.failing) {
        this.failing = true
        void this.recover(error as Error)
      }
    }
    this.inFlight--
    this.flush()
  }

  /**
   * Nothing is known of a failed batch, and those behind it may have failed or not. Once none is in flight, all that are
   * left are sent again in order; those that had been applied are recognised by their number.
   */
  private async recover(error: Error): Promise<void> {
    let lastError: Error = error
    for (;;) {
      this.appender.failed(lastError)
      this.failures++
      if (!isNoScript(lastError)) await sleep(backoffMs(this.failures, FIRST_RETRY_PAUSE_MS, MAX_RETRY_PAUSE_MS))
      while (this.inFlight > 0) await sleep(1)
      if (this.appender.isAbandoned) return
      try {
        await appendScript.load(this.client)
        break
      } catch (loadError) {
        lastError = loadError as Error
      }
    }
    this.failing = false
    this.flush()
  }

  /** KEYS and ARGV of append.lua. */
  private encode(batch: Batch): { keys: string[]; args: (string | number)[] } {
    const keys = [this.producerKey, this.lane.wake]
    const callKeys: string[] = []
    const calls: (string | number)[] = []
    const partitions = new Map<PartitionKeys, number>()
    for (const [sid, call] of batch.calls) {
      let index = partitions.get(call.partition)
      if (index === undefined) {
        index = partitions.size + 1
        partitions.set(call.partition, index)
        keys.push(call.partition.ready, call.partition.leased, call.partition.open, call.partition.ended)
      }
      callKeys.push(call.partition.streamPrefix + sid, call.partition.sessionPrefix + sid)
      calls.push(sid, index, call.bytes, call.resumes ? 1 : 0, call.payloads.length)
      for (const payload of call.payloads) calls.push(payload)
      calls.push(call.session.length)
      for (const field of call.session) calls.push(field)
    }
    for (const key of callKeys) keys.push(key)
    const applied = this.batches[0]!.number - 1
    const { idleTimeoutMs, disconnectGraceMs } = this.appender.options
    const args: (string | number)[] = [batch.number, applied, idleTimeoutMs, disconnectGraceMs, partitions.size]
    for (const arg of calls) args.push(arg)
    return { keys, args }
  }
}

function add(batch: Batch, { event, payload, origin, position }: Waiting, partition: PartitionKeys): void {
  let call = batch.calls.get(event.call_sid)
  if (!call) {
    call = { partition, bytes: 0, resumes: false, payloads: [], origins: [], positions: [], session: [] }
    batch.calls.set(event.call_sid, call)
  }
  // A UTF-16 unit takes one to three bytes; an estimate is good enough for limits, and cheaper than measuring.
  const bytes = payload.length
  call.payloads.push(payload)
  call.origins.push(origin)
  call.positions.push(position)
  call.bytes += bytes
  if (resumes(event)) call.resumes = true
  batch.bytes += bytes
  batch.events++
  for (const field of sessionFields(event)) call.session.push(field)
}

export class Appender {
  private readonly lanes: LaneQueue[]
  private flushScheduled = false
  private queuedBytes = 0
  private queuedEvents = 0
  /** Why the last append failed; undefined when it succeeded. */
  failure: string | undefined
  /** Nothing is sent any more. */
  isAbandoned = false

  constructor(
    client: RedisClient,
    private readonly partitions: Partitions,
    readonly options: AppenderOptions,
    private readonly metrics: IngestMetrics,
    private readonly log: Logger,
  ) {
    const producer = randomUUID()
    this.lanes = lanesOf(client, partitions).map((lane) => new LaneQueue(lane, client, this, partitions, producer))
  }

  /** True when no more should be taken in until Redis has caught up. */
  get isFull(): boolean {
    return this.queuedBytes > this.options.maxQueueBytes
  }

  /** For how long the oldest event has been waiting for Redis. */
  get waitingMs(): number {
    const now = Date.now()
    return Math.max(...this.lanes.map((lane) => now - (lane.waitingSince ?? now)))
  }

  /**
   * Takes one event; `origin.settle(position)` is called once it is stored.
   *
   * @param payload the event's JSON, as it goes into the stream
   */
  append(event: CallEvent, payload: string, origin: Origin, position: number): void {
    const lane = this.lanes.length === 1 ? this.lanes[0]! : this.lanes[this.partitions.of(event.call_sid).partition]!
    const bytes = payload.length
    lane.push({ event, payload, origin, position })
    this.queuedBytes += bytes + EVENT_OVERHEAD_BYTES
    this.queuedEvents++
    if (!this.flushScheduled) {
      this.flushScheduled = true
      // After this turn of the event loop: whatever else its sockets brought goes into the same flush.
      setImmediate(() => {
        this.flushScheduled = false
        for (const each of this.lanes) each.flush()
      })
    }
  }

  applied(batch: Batch, refused: [number, string][], seconds: number): void {
    this.failure = undefined
    const refusals = new Map(refused)
    const waiting = new Set<Origin>()
    let index = 0
    for (const call of batch.calls.values()) {
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

  failed(error: Error): void {
    this.failure = error.message
    this.metrics.flushFailures.inc()
    if (!isNoScript(error))
      this.log.warn({ err: error.message, queued: this.queuedEvents }, 'append failed, will retry')
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
  }
}
