/** Exotel's WebSocket: the Voicebot applet and the Stream applet, [doc]. In snake case, or in camel case from its own bridge. */

import type { JsonObject } from '../../shared/json.js'
import { callStarted } from './call-started.js'
import { Fields } from './fields.js'
import { contentKey, objectOf, textOf, without } from './payload.js'
import type { Common, ProviderEvent, ProviderStream } from './provider.js'

/** More keys than anybody presses in a call. */
const MAX_KEYS = 256

export class ExotelStream implements ProviderStream {
  private callSid: string | undefined
  /** All that the caller has pressed. */
  private keys = ''

  toEvents(message: JsonObject): ProviderEvent[] | undefined {
    const kind = textOf(message.event) ?? ''
    if (kind === 'media') return undefined
    if (kind === 'connected') return []
    const fields = new Fields(kind === 'start' || kind === 'stop' ? flat(message, kind) : message)
    const streamSid = fields.peek(textOf, 'streamsid')
    // Better under another name than not at all: its stop may still say whose it was.
    const call_sid = fields.take(textOf, 'callsid') ?? this.callSid ?? (kind === 'start' ? streamSid : undefined)
    if (kind === 'start' || this.callSid === undefined) this.goTo(call_sid)
    // Without a number nothing tells a message from its like: two marks may have one name.
    const isNumbered = fields.peek(textOf, 'sequencenumber') !== undefined
    const common = { call_sid, source: 'exotel', ...(isNumbered && { id: contentKey(message) }) }
    if (kind === 'start') return started(fields, common)
    if (kind === 'stop') {
      const reason = fields.take(textOf, 'reason') ?? kind
      return [{ ...common, type: 'call.ended', reason, meta: without(fields.rest, 'event') }]
    }
    const digit = kind === 'dtmf' ? textOf(objectOf(message.dtmf).digit) : undefined
    if (digit) this.keys = (this.keys + digit).slice(-MAX_KEYS)
    const data = digit ? { dtmf: this.keys } : undefined
    const meta = kind === 'dtmf' || kind === 'mark' ? without(fields.rest, 'event') : fields.rest
    return [{ ...common, type: 'call.data', data, meta }]
  }

  private goTo(callSid: string | undefined): void {
    if (callSid !== this.callSid) this.keys = ''
    this.callSid = callSid
  }
}

/** custom_parameters are what the flow's author put into the URL, not what the conversation collected: `meta`, as CustomField. */
function started(fields: Fields, common: Common): ProviderEvent[] {
  const start = startOf(fields, common, () => undefined)
  const meta = without(fields.rest, 'event')
  // A start that comes again may be numbered anew.
  const id = contentKey(without(meta, 'sequence_number', 'sequenceNumber'))
  // Only an answered call has audio.
  return [start, { ...common, type: 'call.status', id, status: 'in-progress', meta }]
}

/** What a start or a stop says of the call lies one level deeper. */
function flat(message: JsonObject, kind: string): JsonObject {
  const body = objectOf(message[kind])
  return Object.keys(body).length > 0 ? { ...without(message, kind), ...body } : message
}

/** Who is calling whom, as far as it is said. */
export function startOf(fields: Fields, common: Common, time: (value: unknown) => number | undefined): ProviderEvent {
  const who = {
    // The word itself stays: outbound-api and outbound-dial are not the same.
    direction: fields.peek(textOf, 'direction'),
    from: fields.take(textOf, 'from', 'callfrom'),
    to: fields.take(textOf, 'to', 'callto'),
  }
  return callStarted(common, 'exotel', who, { ts: fields.take(time, 'datecreated', 'created', 'starttime') })
}
