/**
 * LiveKit Agents has no webhooks for what is said: the bot's own handlers of AgentSession's events post them, as they are, to
 * `/webhooks/livekit?call_sid=X`. No signature: INGEST_TOKENS.
 */
import { Refusal } from '../../shared/events.js'
import { arrayOf, contentKey, numberOf, objectOf, textOf, without } from './payload.js'
import { IGNORED, type JsonObject, type Provider, type ProviderEvent, type Translation } from './provider.js'

export function createLiveKit(): Provider {
  return {
    name: 'livekit',
    routes: [''],
    toEvents: ({ payload, query }) => translate(payload, query.get('call_sid') || payload.call_sid),
  }
}

function translate(payload: JsonObject, call_sid: unknown): Translation | Refusal {
  if (!textOf(call_sid)) return new Refusal('missing_field', '?call_sid= wants the call', 'call_sid')
  // Partial words; and when it is final, the item that follows has it.
  if (payload.type === 'user_input_transcribed') return IGNORED
  const item = objectOf(payload.item)
  const common = { call_sid, ts: epochMs(item.created_at ?? payload.created_at), source: 'livekit' }
  const id = textOf(item.id) ?? contentKey(payload)
  if (payload.type === 'close') {
    const meta = without(payload, 'type', 'call_sid', 'reason', 'created_at')
    return { events: [{ ...common, type: 'call.ended', id, reason: textOf(payload.reason), meta }] }
  }
  const turn = payload.type === 'conversation_item_added' ? turnOf(item, { ...common, id }) : undefined
  if (turn) return { events: [turn] }
  return { events: [{ ...common, type: 'call.data', id, meta: without(payload, 'call_sid') }] }
}

/** [sdk] ChatMessage. @returns undefined for what nobody said: tool calls, handovers between agents, a picture */
function turnOf(item: JsonObject, common: JsonObject & { call_sid: unknown }): ProviderEvent | undefined {
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
    started_at: epochMs(metrics.started_speaking_at),
    ended_at: epochMs(metrics.stopped_speaking_at),
    meta: {
      ...without(item, 'id', 'type', 'role', 'content', 'interrupted', 'transcript_confidence', 'created_at'),
      ...(others.length > 0 && { content: others }),
      ...(item.role === 'developer' && { role: item.role }),
    },
  }
}

/** [sdk] Times are epoch seconds with a fraction. */
function epochMs(seconds: unknown): number | undefined {
  const given = numberOf(seconds)
  return given === undefined ? undefined : Math.round(given * 1000)
}
