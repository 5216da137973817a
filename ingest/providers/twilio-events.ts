/** What Twilio's webhooks and WebSockets have in common as events. */
import type { JsonObject } from '../../shared/json.js'
import { contentKey, keyOf, textOf } from './payload.js'
import type { ProviderEvent } from './provider.js'

/** An event without what is the same in all of a message. */
export type EventFields = JsonObject & Pick<ProviderEvent, 'type'>

export function twilioEvents(callSid: string | undefined, events: EventFields[]): ProviderEvent[] {
  return events.map((event) => ({ source: 'twilio', ...event, call_sid: callSid }))
}

/** Who is calling, from any message that says so: of those that say the same the first one counts. */
export function startedEvents(id: string, from: unknown, to: unknown, direction: unknown, ts?: unknown): EventFields[] {
  const parties = { from: textOf(from), to: textOf(to) }
  if (parties.from === undefined && parties.to === undefined) return []
  // outbound-api, outbound-dial: its own word stays in `meta`.
  const [way] = /^(in|out)bound/.exec(textOf(direction) ?? '') ?? []
  return [
    {
      type: 'call.started',
      id: keyOf(id, contentKey({ from, to, direction })),
      provider: 'twilio',
      ts,
      ...parties,
      direction: way,
    },
  ]
}
