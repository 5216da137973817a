/**
 * `/streams/twilio`: Media Streams, whose messages have an `event`, and ConversationRelay, whose messages have a `type`.
 *
 * ConversationRelay talks to the bot's own server and waits for its answers; calltape gives none. So it is the bot that opens
 * this WebSocket, and passes on each message as it gets it.
 *
 * The end of either is taken for the end of the call. Where the call goes on, its status callbacks say so, and everything that
 * comes later is worked into its row; only `ended_at` stays that of the stream.
 */
import type { JsonObject } from '../../shared/json.js'
import { keyOf, objectOf, textOf, without } from './payload.js'
import type { ProviderEvent, ProviderStream } from './provider.js'
import { type EventFields, startedEvents, twilioEvents } from './twilio-events.js'

/** 1005: closed in order, but without a code. */
const NORMAL_CLOSURE = new Set([1000, 1005])

export class TwilioStream implements ProviderStream {
  private callSid: string | undefined
  /** Media Streams' first message, which names no call. */
  private connected: JsonObject = {}
  /** ConversationRelay's session. */
  private sessionId: string | undefined
  private isRelay = false

  toEvents(message: JsonObject): ProviderEvent[] | undefined {
    if (message.event === 'media') return undefined
    this.isRelay ||= message.event === undefined && message.type !== undefined
    const events = this.isRelay ? this.relayed(message) : this.streamed(message)
    return twilioEvents(this.callSid, events)
  }

  closed(code: number): ProviderEvent[] {
    if (!this.isRelay || this.callSid === undefined || !NORMAL_CLOSURE.has(code)) return []
    return twilioEvents(this.callSid, [{ type: 'call.ended', id: this.sessionId, reason: 'session-ended' }])
  }

  /** Media Streams [doc] */
  private streamed(message: JsonObject): EventFields[] {
    const event = textOf(message.event) ?? ''
    if (event === 'connected') {
      this.connected = without(message, 'event')
      return []
    }
    const { callSid, ...body } = objectOf(message[event])
    const isObject = message[event] === objectOf(message[event])
    this.callSid = textOf(callSid) ?? this.callSid
    const { streamSid, sequenceNumber } = message
    const id = textOf(sequenceNumber) && keyOf(streamSid, sequenceNumber)
    const meta = { ...(isObject ? without(message, event) : message), ...body }
    if (event === 'start')
      return [{ type: 'call.started', id, provider: 'twilio', meta: { ...this.connected, ...meta } }]
    if (event === 'stop') return [{ type: 'call.ended', id, reason: 'stop', meta }]
    return [{ type: 'call.data', id, meta }]
  }

  /**
   * ConversationRelay [sdk] Its messages have no numbers, and so no id: were they counted here, a bot that opens its WebSocket
   * once more would begin anew, and its second prompt would pass for the first one.
   */
  private relayed(message: JsonObject): EventFields[] {
    if (message.type === 'setup') {
      this.callSid = textOf(message.callSid)
      this.sessionId = textOf(message.sessionId)
      const { from, to, direction, callStatus } = message
      const meta = without(message, 'callSid', 'from', 'to', 'callStatus')
      const status = { type: 'call.status', status: callStatus, meta } as const
      return [...startedEvents('twilio', from, to, direction), status]
    }
    if (message.type === 'prompt') {
      if (message.last === false) return []
      const { voicePrompt: text = '', lang: language } = message
      const meta = without(message, 'voicePrompt', 'lang')
      return [{ type: 'turn', speaker: 'customer', text, language, meta }]
    }
    if (message.type === 'interrupt') {
      const { utteranceUntilInterrupt: text = '' } = message
      const meta = without(message, 'utteranceUntilInterrupt')
      return [{ type: 'turn', speaker: 'agent', text, interrupted: true, meta }]
    }
    return [{ type: 'call.data', meta: message }]
  }
}
