/**
 * One `/v1/stream` connection: numbers its events, hands the good ones to the appender, refuses the bad ones by name, and
 * acks cumulatively. Knows nothing of the WebSocket library: it is given a socket that can send and close.
 */
import { randomUUID } from 'node:crypto'
import { type CallEvent, type ConnectionChanged, parseEvent, parseJson, Refusal } from '../shared/events.js'
import type { IngestMetrics } from '../shared/metrics.js'
import type { Appender, Origin } from './append.js'
import { splitMessage } from './split-message.js'

export interface Socket {
  send(message: string): void
  close(code: number, reason: string): void
}

export interface StreamOptions {
  window: number
  maxMessageBytes: number
}

export const CLOSE_GOING_AWAY = 1001
export const CLOSE_REFUSED = 1008
export const CLOSE_OVERLOADED = 1013
const CLOSE_WINDOW_EXCEEDED = 4008

export const OVERLOADED = 'the stores cannot take more now: reconnect later and resend what was not acked'

export class StreamConnection implements Origin {
  private received = 0
  /** Every event up to here is settled. */
  private through = 0
  private acked = 0
  /** Of the events between `acked` and `through`, those that are stored. */
  private storedUnacked = 0
  /** Settled events beyond `through`, and whether they are stored: only while lanes finish in another order than events came. */
  private readonly ahead = new Map<number, boolean>()
  private open = true
  private ended = false
  /** It has been told to come back later: what comes behind the event that was not taken is not taken, either. */
  private isTurnedAway = false
  private readonly id = randomUUID()

  constructor(
    private readonly socket: Socket,
    private readonly boundTo: string | undefined,
    private readonly appender: Appender,
    private readonly options: StreamOptions,
    private readonly metrics: IngestMetrics,
  ) {}

  /** Greets the client. A bound connection is an event of its call: it makes the call known, or resumes it. */
  opened(): void {
    const { window, maxMessageBytes } = this.options
    this.socket.send(JSON.stringify({ type: 'hello', protocol: 1, window, max_message_bytes: maxMessageBytes }))
    this.record('call.connected')
  }

  /** The end of a bound connection without `call.ended` is recorded in the stream, where the end of a call belongs. */
  closed(code: number): void {
    this.open = false
    if (!this.ended) this.record('call.disconnected', `closed with ${code}`)
  }

  /** @param given one event or an array of events, as JSON in UTF-8; undefined for a message that is not text */
  accept(given: Buffer | undefined): void {
    // Before anything is taken: clients that come back to a full queue with all that was not acked must not fill it further.
    if (this.isTurnedAway || this.appender.isFull) {
      this.closeOverloaded()
      return
    }
    const events = given && splitMessage(given)
    if (events) for (const { value, json } of events) this.acceptNext(value, json)
    else this.acceptWhole(given?.toString('utf8'))
    if (this.isOverWindow) {
      const reason = `more than ${this.options.window} events unacknowledged`
      this.socket.close(CLOSE_WINDOW_EXCEEDED, reason)
    } else if (this.isTurnedAway || this.appender.isFull) {
      this.closeOverloaded()
    }
    this.sendAck()
  }

  private acceptWhole(text: string | undefined): void {
    const message = text === undefined ? new Refusal('not_text', 'an event is sent as a text message') : parseJson(text)
    if (message instanceof Refusal) {
      this.refuse(++this.received, message) // what it held cannot be known: it counts as one event
    } else if (Array.isArray(message)) {
      for (const each of message) this.acceptNext(each)
    } else {
      this.acceptEvent(message, text)
    }
  }

  /** One of many. @param json as it was given */
  private acceptNext(given: unknown, json?: string): void {
    // However many there are behind it: nobody will be told what became of them.
    if (this.open && !this.isOverWindow && !this.isTurnedAway && !this.appender.isFull) this.acceptEvent(given, json)
  }

  private closeOverloaded(): void {
    this.socket.close(CLOSE_OVERLOADED, OVERLOADED)
  }

  private get isOverWindow(): boolean {
    return this.received - this.through > this.options.window
  }

  private acceptEvent(given: unknown, json?: string): void {
    const parsed = parseEvent(given, this.boundTo)
    if (parsed instanceof Refusal) {
      this.refuse(++this.received, parsed)
      return
    }
    if (this.appender.isFullFor(parsed.event.call_sid)) {
      this.isTurnedAway = true
      return
    }
    if (parsed.event.type === 'call.ended' && parsed.event.call_sid === this.boundTo) this.ended = true
    const payload = json === undefined || parsed.changed ? JSON.stringify(parsed.event) : json
    this.appender.append(parsed.event, payload, this, ++this.received)
  }

  private refuse(number: number, refusal: Refusal): void {
    this.metrics.refused.inc({ code: refusal.code })
    this.settle(number, refusal)
  }

  settle(number: number, refusal?: Refusal): void {
    if (number === 0) return // an event of our own
    if (refusal && this.open) this.socket.send(JSON.stringify({ type: 'error', event: number, ...refusal }))
    if (number !== this.through + 1) {
      this.ahead.set(number, refusal === undefined)
      return
    }
    this.advance(refusal === undefined)
    while (this.ahead.size > 0) {
      const isStored = this.ahead.get(this.through + 1)
      if (isStored === undefined) break
      this.ahead.delete(this.through + 1)
      this.advance(isStored)
    }
  }

  private advance(isStored: boolean): void {
    this.through++
    if (isStored) this.storedUnacked++
  }

  settled(): void {
    this.sendAck()
  }

  private sendAck(): void {
    if (this.through === this.acked || !this.open) return
    this.acked = this.through
    this.metrics.acked.inc(this.storedUnacked)
    this.storedUnacked = 0
    this.socket.send(`{"type":"ack","through":${this.through}}`)
  }

  /** What became of a bound connection is an event of its call. */
  private record(type: ConnectionChanged['type'], reason?: string): void {
    if (this.boundTo === undefined) return
    const event: CallEvent = { type, call_sid: this.boundTo, source: 'ingest', connection: this.id }
    if (reason !== undefined) event.reason = reason
    this.appender.append(event, JSON.stringify(event), this, 0)
  }
}
