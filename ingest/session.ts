/** What the live session hash shows of a call: what its producers said last. append.lua keeps an end status once it has one. */
import { type CallEvent, isPresumedEnd, resumes } from '../shared/events.js'

/** What append.lua is told of an event beside its JSON. */
export interface SessionNote {
  /** Field, value, field, value … */
  readonly session: readonly string[]
  /** Of a call that was presumed over: true if it goes on with this event, false if this is such a presumption; else undefined. */
  readonly resumes: boolean | undefined
}

const OF_A_TURN: SessionNote = { session: [], resumes: true }

export function sessionNote(event: CallEvent): SessionNote {
  if (event.type === 'turn') return OF_A_TURN
  return { session: sessionFields(event), resumes: resumes(event) ? true : isPresumedEnd(event) ? false : undefined }
}

/** @returns field, value, field, value … as append.lua wants them; empty for a turn */
function sessionFields(event: CallEvent): string[] {
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
