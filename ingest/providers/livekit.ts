/**
 * LiveKit Agents has no webhooks for what is said: the bot's own handlers of AgentSession's events post them, as they are, to
 * `/webhooks/livekit?call_sid=X`. No signature: INGEST_TOKENS.
 */
import type { Refusal } from '../../shared/events.js'
import type { JsonObject } from '../../shared/json.js'
import { arrayOf, contentKey, keyOf, missingCall, msOf, objectOf, textOf, without } from './payload.js'
import { type Common, type CreateProvider, IGNORED, type ProviderEvent, type Translation } from './provider.js'

export const createLiveKit: CreateProvider = () => ({
  name: 'livekit',
  routes: [''],
  toEvents: ({ payload, query }) => translate(payload, textOf(query.get('call_sid')) ?? textOf(payload.call_sid)),
})

function translate(payload: JsonObject, call_sid: string | undefined): Translation | Refusal {
  if (call_sid === undefined) return missingCall('call_sid')
  // Partial words; and when it is final, the item that follows has it.
  if (payload.type === 'user_input_transcribed') return IGNORED
  const item = objectOf(payload.item)
  const common = { call_sid, ts: msOf(item.created_at ?? payload.created_at), source: 'livekit' }
  const id = contentKey(payload)
  if (payload.type === 'close') {
    const meta = without(payload, 'type', 'call_sid', 'reason', ...(common.ts === undefined ? [] : ['created_at']))
    return { events: [{ ...common, type: 'call.ended', id, reason: textOf(payload.reason), meta }] }
  }
  const turn =
    payload.type === 'conversation_item_added'
      ? turnOf(item, { ...common, id: textOf(item.id) ? keyOf(item.id) : id })
      : undefined
  if (turn) {
    const around = without(
      payload,
      'type',
      'call_sid',
      'item',
      ...(common.ts !== undefined && item.created_at === undefined ? ['created_at'] : []),
    )
    return { events: [{ ...turn, meta: { ...around, ...objectOf(turn.meta) } }] }
  }
  return { events: [{ ...common, type: 'call.data', id, meta: without(payload, 'call_sid') }] }
}

/** [sdk] ChatMessage; its times are epoch seconds. @returns undefined for what nobody said: tool calls, handovers between agents, a picture */
function turnOf(item: JsonObject, common: Common): ProviderEvent | undefined {
  const content = typeof item.content === 'string' ? [item.content] : arrayOf(item.content)
  const said = content
    .map((part) => textOf(part) ?? textOf(objectOf(part).transcript))
    .filter((text) => text !== undefined)
  if (said.length === 0 || !textOf(item.role)) return undefined
  const metrics = objectOf(item.metrics)
  const others = content.filter((part) => typeof part !== 'string')
  return {
    ...common,
    type: 'turn',
    speaker: item.role === 'developer' ? 'system' : item.role,
    text: said.join('\n'), // as ChatMessage.text_content does
    interrupted: item.interrupted,
    confidence: item.transcript_confidence,
    started_at: msOf(metrics.started_speaking_at),
    ended_at: msOf(metrics.stopped_speaking_at),
    meta: {
      ...without(
        item,
        'id',
        ...(item.type === 'message' ? ['type'] : []),
        'role',
        'content',
        'interrupted',
        'transcript_confidence',
        ...(common.ts === undefined ? [] : ['created_at']),
      ),
      ...(others.length > 0 && { content: others }),
      ...(item.role === 'developer' && { role: item.role }),
    },
  }
}
