/**
 * The events of one lane on their way to Redis, in numbered batches, a few in flight.
 *
 * What must hold:
 *  - the events of one call reach its stream in the order they were given;
 *  - an append that is sent again, because its reply got lost, is applied once: batches are numbered, see append.lua.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { backoffMs } from '../shared/backoff.js'
import { crashPoint } from '../shared/crash.js'
import type { CallEvent } from '../shared/events.js'
import type { Partitions } from '../shared/keys.js'
import type { Lane } from '../shared/lanes.js'
import { isNoScript, Script } from '../shared/script.js'
import type { Appender, Origin } from './append.js'
import { Batch } from './batch.js'
import { FairQueue } from './fair-queue.js'
import { ScriptCall } from './script-call.js'
import { sessionNote } from './session.js'

/** One batch that Redis executes and one that waits for it; more would only make batches smaller. */
const MAX_IN_FLIGHT = 2
const MAX_FREE_CALLS = 8
/** What an event takes in memory beside its JSON, roughly. */
export const EVENT_OVERHEAD_BYTES = 256
const FIRST_RETRY_PAUSE_MS = 10
const MAX_RETRY_PAUSE_MS = 1000
/** Redis has taken nothing for so long: it hangs. */
export const AWAY_AFTER_MS = 1500

const appendScript = new Script('ingest/append.lua')

export class LaneQueue {
  /** Those in flight, or to be sent again, in order. */
  private readonly batches: Batch[] = []
  /** Made up into a batch only when one can be sent: until then whoever comes next gets his turn. */
  private readonly queue = new FairQueue()
  /** Appends that are sent and not answered. */
  inFlight = 0
  queuedBytes = 0
  private nextNumber = 1
  private failing = false
  /** In a row: a Redis that answers, but refuses to write, must not be asked all the time. */
  private failures = 0
  private readonly producerKey: string

  constructor(
    readonly lane: Lane,
    private readonly appender: Appender,
    private readonly partitions: Partitions,
    producer: string,
  ) {
    this.producerKey = lane.partitions[0]!.producerPrefix + producer
  }

  push(event: CallEvent, payload: string, origin: Origin, position: number): void {
    this.queuedBytes += payload.length + EVENT_OVERHEAD_BYTES
    this.queue.push(event.call_sid, payload, sessionNote(event), origin, position)
  }

  /** Since when (ms epoch) its oldest batch has been waiting; undefined when there is none. */
  get waitingSince(): number | undefined {
    return this.batches[0]?.since
  }

  /** Its last append failed, or hangs. */
  isAway(now: number): boolean {
    return this.failures > 0 || now - (this.waitingSince ?? now) > AWAY_AFTER_MS
  }

  private nextBatch(): Batch {
    const batch = new Batch(this.nextNumber++)
    this.queue.take((waiting) => {
      if (!batch.hasRoomFor(waiting.payload)) return false
      batch.add(waiting, this.partitions)
      return true
    })
    this.batches.push(batch)
    return batch
  }

  flush(): void {
    // What confirms an append blocks the connection meanwhile: a batch behind it would have to wait for two confirmations.
    const most = this.appender.options.confirm ? 1 : MAX_IN_FLIGHT
    const canSend = () => !this.failing && !this.appender.isAbandoned && this.inFlight < most
    for (const batch of this.batches) if (!batch.isSent && canSend()) void this.send(batch)
    while (!this.queue.isEmpty && canSend()) void this.send(this.nextBatch())
  }

  /** Once it has been in flight, Redis may have applied it: what is sent again is exactly what was sent before. */
  private async send(batch: Batch): Promise<void> {
    batch.isSent = true
    this.inFlight++
    const started = performance.now()
    const { idleTimeoutMs, disconnectGraceMs, confirm } = this.appender.options
    const knownApplied = this.batches[0]!.number - 1
    const call = this.appender.scriptCalls.pop() ?? new ScriptCall()
    batch.encode(call, this.producerKey, this.lane.wake, knownApplied, idleTimeoutMs, disconnectGraceMs)
    crashPoint('before-append')
    let reply: unknown
    try {
      const connection = this.lane.connection()
      ;[reply] = await Promise.all([call.run(connection, appendScript), confirm?.(connection)])
    } catch (error) {
      this.inFlight--
      batch.isSent = false
      if (!this.failing) {
        this.failing = true
        void this.recover(error as Error)
      }
      return
    }
    crashPoint('after-append')
    call.reset() // of one that failed, nobody knows what the socket still holds
    if (this.appender.scriptCalls.length < MAX_FREE_CALLS) this.appender.scriptCalls.push(call)
    this.inFlight--
    if (this.failures > 0) this.appender.recovered(this.lane)
    this.failures = 0
    this.queuedBytes -= batch.bytes + batch.events * EVENT_OVERHEAD_BYTES
    this.batches.splice(this.batches.indexOf(batch), 1)
    // Not within the `try`: an origin that throws is a bug, not an append that failed, and this batch must not be sent again.
    this.appender.applied(batch, reply as [number, string][], (performance.now() - started) / 1000)
    this.flush()
  }

  /**
   * Nothing is known of a failed batch, and those behind it may have failed or not. Once none is in flight, all that are
   * left are sent again in order; those that had been applied are recognised by their number.
   */
  private async recover(error: Error): Promise<void> {
    let lastError: Error = error
    for (;;) {
      this.appender.failed(lastError, this.lane)
      this.failures++
      if (!isNoScript(lastError)) await sleep(backoffMs(this.failures, FIRST_RETRY_PAUSE_MS, MAX_RETRY_PAUSE_MS))
      while (this.inFlight > 0) await sleep(1)
      if (this.appender.isAbandoned) return
      try {
        await appendScript.load(await this.lane.find())
        break
      } catch (loadError) {
        lastError = loadError as Error
      }
    }
    this.failing = false
    this.flush()
  }
}
