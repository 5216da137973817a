/** What the live session hash shows of a call: what its producers said last. append.lua keeps an end status once it has one. */
import { type CallEvent, isPresumedEnd } from '../shared/events.js'

/** @returns field, value, field, value … as append.lua wants them; empty for a turn */
export function sessionFields(event: CallEvent): string[] {
  switch (event.type) {
    case 'turn':
      return []
    case 'call.started':
      return [...given(event, ['direction', 'from', 'to', 'provider']), 'started_at', String(event.ts ?? Date.now())]
    case 'call.status':
      return given(event, ['status', 'duration_seconds', 'recording_url'])
    case 'call.data':
      return given(event, ['stage'])
    case 'call.ended':
      if (isPresumedEnd(event)) return ['presumed', event.reason ?? '']
      return [...given(event, ['reason', 'outcome', 'turn_count', 'duration_seconds', 'recording_url']), 'ended', '1']
    case 'call.connected':
    case 'call.disconnected':
      return [event.type.slice('call.'.length), event.connection ?? '']
  }
}

function given<E extends object>(event: E, fields: (keyof E & string)[]): string[] {
  return fields.flatMap((field) => (event[field] === undefined ? [] : [field, String(event[field])]))
}
