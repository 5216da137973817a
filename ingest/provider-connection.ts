/**
 * One WebSocket of a provider (`/streams/NAME`), bound to the call that its messages name. Nobody acks or sends again here,
 * so events go to Redis or to the spool.
 */
import { randomUUID } from 'node:crypto'
import { type CallEvent, type ConnectionChanged, parseJson, Refusal } from '../shared/events.js'
import { isObject, type JsonObject } from '../shared/json.js'
import type { Logger } from '../shared/log.js'
import type { IngestMetrics } from '../shared/metrics.js'
import type { Deliveries } from './deliver.js'
import type { ProviderEvent, ProviderStream } from './providers/provider.js'
import type { Connection } from './server.js'
import { parseGenerously } from './webhooks.js'

/** Audio is nearly all there is: it is not parsed. (With its fields in another order it is, and then dropped.) */
const AUDIO = /^\s*\{\s*"event"\s*:\s*"media"/

export class ProviderConnection implements Connection {
  private readonly id = randomUUID()
  /** The call that it is of. */
  private callSid: string | undefined
  private hasEnded = false
  private audioMessages = 0
  /** Said once until something is stored again: there may be thousands of events a second. */
  private isLosing = false

  constructor(
    private readonly provider: string,
    private readonly stream: ProviderStream,
    private readonly deliveries: Deliveries,
    private readonly metrics: IngestMetrics,
    private readonly log: Logger,
  ) {}

  opened(): void {
    this.metrics.connections.inc()
  }

  accept(given: Buffer | undefined): void {
    const text = given?.toString('utf8')
    if (text !== undefined && AUDIO.test(text)) {
      this.dropAudio()
      return
    }
    const message = text === undefined ? new Refusal('not_text', 'a message is text') : parseJson(text)
    if (message instanceof Refusal || !isObject(message)) {
      this.metrics.refused.inc({ code: message instanceof Refusal ? message.code : 'not_an_object' })
      return
    }
    const events = this.translate(message, text!)
    if (!events) this.dropAudio()
    else if (events.length === 0) this.metrics.ignored.inc({ provider: this.provider })
    else this.take(events, text!)
  }

  /** A message that its adapter cannot cope with is kept as it is. */
  private translate(message: JsonObject, text: string): ProviderEvent[] | undefined {
    return this.guarded(
      () => this.stream.toEvents(message),
      () => {
        if (this.callSid === undefined) return []
        return [{ type: 'call.data', call_sid: this.callSid, source: this.provider, meta: { not_translated: text } }]
      },
    )
  }

  /** What an adapter throws, thrown any further, would end the process with all calls. */
  private guarded<T>(translate: () => T, otherwise: () => T): T {
    try {
      return translate()
    } catch (err) {
      this.log.error({ provider: this.provider, err }, 'a message of a WebSocket could not be translated')
      this.metrics.refused.inc({ code: 'not_translated' })
      return otherwise()
    }
  }

  private dropAudio(): void {
    this.audioMessages++
    this.metrics.ignored.inc({ provider: this.provider })
  }

  closed(code: number): void {
    this.metrics.connections.dec()
    const said = this.guarded(
      () => this.stream.closed?.(code) ?? [],
      () => [],
    )
    this.take(said, '')
    this.deliver(this.left(`closed with ${code}`))
  }

  private take(given: ProviderEvent[], raw: string): void {
    const events: CallEvent[] = []
    for (const each of given) {
      const event = parseGenerously(each, raw)
      if (event instanceof Refusal) this.metrics.refused.inc({ code: event.code })
      else events.push(...this.bound(event))
    }
    this.deliver(events)
  }

  private deliver(events: CallEvent[]): void {
    if (events.length === 0) return
    void this.deliveries.deliverOrSpool(events).then(({ state, reason, refused }) => {
      for (const { refusal } of refused) this.metrics.refused.inc({ code: refusal.code })
      const isLost = state === 'unavailable'
      if (isLost) this.metrics.undelivered.inc(events.length)
      if (isLost && !this.isLosing) {
        this.log.error({ provider: this.provider, err: reason }, 'events of a WebSocket may be lost')
      }
      this.isLosing = isLost
    })
  }

  /** The first event of a call makes the connection known as its own, and as gone from the call that it was of before. */
  private bound(event: CallEvent): CallEvent[] {
    const events: CallEvent[] = [event]
    if (event.call_sid !== this.callSid) {
      events.unshift(...this.left('went on with another call'))
      if (this.callSid !== undefined) this.audioMessages = 0
      this.callSid = event.call_sid
      this.hasEnded = false
      if (event.type !== 'call.ended') events.push(this.changed('call.connected', event.call_sid))
    }
    if (event.type === 'call.ended') {
      this.hasEnded = true
      event.meta = { ...event.meta, audio_messages: this.audioMessages }
    }
    return events
  }

  /** That it has none any more is news of a call that nobody has ended. */
  private left(reason: string): CallEvent[] {
    if (this.callSid === undefined || this.hasEnded) return []
    return [this.changed('call.disconnected', this.callSid, reason)]
  }

  private changed(type: ConnectionChanged['type'], callSid: string, reason?: string): ConnectionChanged {
    const event: ConnectionChanged = { type, call_sid: callSid, source: 'ingest', connection: this.id }
    if (reason !== undefined) Object.assign(event, { reason, meta: { audio_messages: this.audioMessages } })
    return event
  }
}
