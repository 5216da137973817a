/**
 * deliver: what a producer that waits for one answer (an HTTP request, a provider's webhook) gave, into Redis; or, when Redis
 * does not take it and the producer cannot be trusted to send it again, into the spool.
 *
 * An event may go both ways: it waits in the appender's queue, Redis hangs, and so it is spooled, too. Therefore a spoolable
 * event gets what would make its two copies differ before anything else: a key, if it has none, and the time of its receipt.
 */
import { randomBytes } from 'node:crypto'
import type { CallEvent, Refusal } from '../shared/events.js'
import type { Origin, Sender } from './append.js'
import type { Spool, SpoolEntry } from './spool.js'

/** How long it waits for Redis before it is told to come back. */
const REDIS_TIMEOUT_MS = 5000
/** How long a spoolable one waits for Redis. */
const SPOOL_AFTER_MS = 2000
/** What a record takes on the disk beside its events, roughly. */
const RECORD_OVERHEAD_BYTES = 16

export interface Delivered {
  /** Redis has the events; the disk has them, and Redis will; or neither can be said, and they must be sent again. */
  state: 'stored' | 'spooled' | 'unavailable'
  /** Why, if unavailable. */
  reason?: string
  /** Those that Redis refused by name, by their index in what was given. */
  refused: { index: number; refusal: Refusal }[]
}

const LATE =
  'Redis did not answer in time; the events may be stored all the same, so send them again with their id or seq'

export class Deliveries {
  /** Absent: what is spoolable is like everything else. */
  spool: Spool | undefined
  /** The spoolable ones that are with the appender alone, in order. */
  private readonly direct = new Set<SpoolableDelivery>()
  private readonly idPrefix = `ingest-${randomBytes(9).toString('base64url')}-`
  private ids = 0

  constructor(readonly appender: Sender) {}

  /** Gives events to Redis, in order. */
  async deliver(events: CallEvent[]): Promise<Delivered> {
    if (events.length === 0) return { state: 'stored', refused: [] }
    const isFull = events.some(({ call_sid }) => this.appender.isFullFor(call_sid))
    if (isFull) return { state: 'unavailable', reason: 'the stores cannot take more now', refused: [] }
    const delivery = new Delivery(events)
    delivery.append(this.appender)
    return delivery.outcome
  }

  /** The same for a producer that cannot be trusted to send them again: what Redis does not take is spooled. */
  async deliverOrSpool(events: CallEvent[]): Promise<Delivered> {
    const { spool } = this
    if (!spool || spool.hasEnded || events.length === 0) return this.deliver(events)
    const now = Date.now()
    const delivery = new SpoolableDelivery(
      events.map((event) => this.identified(event, now)),
      this.appender,
      this.direct,
      () => this.spoolDirect(spool),
    )
    if (spool.isBehind || this.appender.isAway) {
      this.spoolDirect(spool)
      delivery.spool(spool)
    } else {
      delivery.passed()
    }
    return delivery.outcome
  }

  /** The appender may lose what it has, but not the spool: then what is behind it in the spool would have overtaken it. */
  private spoolDirect(spool: Spool): void {
    const direct = [...this.direct]
    this.direct.clear()
    for (const delivery of direct) delivery.spool(spool)
  }

  private identified(event: CallEvent, now: number): CallEvent {
    const hasKey = event.id !== undefined || (event.type === 'turn' && event.seq !== undefined)
    return { ...event, ...(hasKey ? {} : { id: this.idPrefix + this.ids++ }), ts: event.ts ?? now }
  }
}

/** The events of one request on their way to Redis. */
class Delivery implements Origin {
  readonly outcome: Promise<Delivered>
  protected readonly payloadOf: string[]
  protected readonly isStored: Uint8Array
  private left: number
  private readonly refused: Delivered['refused'] = []
  private resolve = (_: Delivered) => {}
  private timer: NodeJS.Timeout | undefined

  constructor(private readonly events: CallEvent[]) {
    this.payloadOf = events.map((event) => JSON.stringify(event))
    this.isStored = new Uint8Array(events.length)
    this.left = events.length
    this.outcome = new Promise((resolve) => {
      this.resolve = resolve
    })
  }

  get isSettled(): boolean {
    return this.left === 0
  }

  append(appender: Sender): void {
    this.after(REDIS_TIMEOUT_MS, () => this.finish('unavailable', LATE))
    for (const [index, event] of this.events.entries()) appender.append(event, this.payloadOf[index]!, this, index)
  }

  settle(index: number, refusal?: Refusal): void {
    this.isStored[index] = 1
    if (refusal) this.refused.push({ index, refusal })
    if (--this.left === 0) this.finish('stored')
  }

  settled(): void {}

  protected after(ms: number, act: () => void): void {
    clearTimeout(this.timer)
    this.timer = setTimeout(act, ms)
  }

  /** The first one counts. */
  protected finish(state: Delivered['state'], reason?: string): void {
    clearTimeout(this.timer)
    this.resolve({ state, ...(reason ? { reason } : {}), refused: [...this.refused] })
  }
}

class SpoolableDelivery extends Delivery implements SpoolEntry {
  readonly bytes: number
  private isAppended = false

  /**
   * @param direct where it stands while it is with the appender alone
   * @param spoolDirect puts all of these into the spool
   */
  constructor(
    events: CallEvent[],
    private readonly appender: Sender,
    private readonly direct: Set<SpoolableDelivery>,
    private readonly spoolDirect: () => void,
  ) {
    super(events)
    this.bytes = this.payloadOf.reduce((sum, payload) => sum + Buffer.byteLength(payload), RECORD_OVERHEAD_BYTES)
  }

  payloads(): string[] {
    return this.payloadOf.filter((_, index) => this.isStored[index] === 0)
  }

  /** The way to Redis is free. */
  passed(): void {
    if (this.isSettled) return
    this.direct.add(this)
    if (!this.isAppended) {
      this.isAppended = true
      this.append(this.appender)
    }
    this.after(SPOOL_AFTER_MS, this.spoolDirect)
  }

  /** Its producer is answered in time, even if the disk hangs. */
  spool(spool: Spool): void {
    this.after(REDIS_TIMEOUT_MS - SPOOL_AFTER_MS, () => this.finish('unavailable', LATE))
    spool.put(this)
  }

  spooled(): void {
    this.finish('spooled')
  }

  failed(reason: string): void {
    if (!this.isAppended) this.finish('unavailable', reason) // else Redis may still take it in time
  }

  protected override finish(state: Delivered['state'], reason?: string): void {
    this.direct.delete(this)
    super.finish(state, reason)
  }
}
