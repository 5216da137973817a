/**
 * Pipecat has no webhooks: the bot's own handlers of its aggregators' events post what they were given, with the event's
 * name, to `/webhooks/pipecat?call_sid=X`. No signature: INGEST_TOKENS.
 */
import type { Refusal } from '../../shared/events.js'
import type { JsonObject } from '../../shared/json.js'
import { contentKey, missingCall, textOf, without } from './payload.js'
import type { CreateProvider, Translation } from './provider.js'

/** [sdk] Older versions have `on_user_turn_stopped` only; newer ones send both, with the same text and time: one turn. */
const SPEAKERS = new Map([
  ['on_user_turn_message_added', 'customer'],
  ['on_user_turn_stopped', 'customer'],
  ['on_assistant_turn_stopped', 'agent'],
])
const ENDS = new Set(['on_client_disconnected', 'on_pipeline_finished'])

export const createPipecat: CreateProvider = () => ({
  name: 'pipecat',
  routes: [''],
  toEvents: ({ payload, query }) => translate(payload, textOf(query.get('call_sid')) ?? textOf(payload.call_sid)),
})

function translate(payload: JsonObject, call_sid: string | undefined): Translation | Refusal {
  if (call_sid === undefined) return missingCall('call_sid')
  const { event, content, timestamp, interrupted } = payload
  const common = { call_sid, ts: textOf(timestamp), source: 'pipecat' }
  const name = textOf(event) ?? ''
  const speaker = SPEAKERS.get(name)
  const text = textOf(content)
  if (speaker && text) {
    // What was said again at another time is another turn. Without a time nothing tells it from a retry: no key, no loss.
    const id = common.ts && contentKey({ speaker, content, timestamp })
    const meta = without(payload, 'event', 'call_sid', 'content', 'timestamp', 'interrupted')
    return { events: [{ ...common, type: 'turn', id, speaker, text, interrupted, meta }] }
  }
  const id = contentKey(payload)
  if (ENDS.has(name)) {
    const meta = without(payload, 'event', 'call_sid', 'reason', 'timestamp')
    return { events: [{ ...common, type: 'call.ended', id, reason: textOf(payload.reason) ?? name.slice(3), meta }] }
  }
  // [sdk] An assistant that was interrupted before its first word said nothing; and whatever else a bot may post.
  return { events: [{ ...common, type: 'call.data', id, meta: without(payload, 'call_sid') }] }
}
