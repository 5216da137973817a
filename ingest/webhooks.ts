/** `/webhooks/PROVIDER/…`: verify → read → translate → deliver → answer in the provider's way. */
import { type CallEvent, keepInMeta, parseEvent, Refusal } from '../shared/events.js'
import type { JsonObject } from '../shared/json.js'
import type { IngestMetrics } from '../shared/metrics.js'
import type { Deliveries } from './deliver.js'
import { type Answer, overloaded, problem } from './http.js'
import { contentKey, keyOf, without } from './providers/payload.js'
import type { Provider, ProviderEvent, ProviderRequest, ReadRequest, Translation } from './providers/provider.js'
import { readPayload } from './webhook-payload.js'

export interface WebhookContext {
  deliveries: Deliveries
  metrics: IngestMetrics
  /** Has Redis turns of this call with other ids than these? */
  hasOtherTurns(callSid: string, ids: Set<unknown>): Promise<boolean>
  /** Has somebody answered this call? Undefined when Redis does not say. */
  isAnswered(callSid: string): Promise<boolean | undefined>
}

/** @param request that `provider` has verified, or whose sender was */
export async function takeWebhook(
  provider: Provider,
  request: ProviderRequest,
  context: WebhookContext,
): Promise<Answer> {
  const { deliveries, metrics } = context
  const payload = await readPayload(request)
  if (payload instanceof Refusal) return refuse(payload, metrics)
  const read: ReadRequest = { ...request, payload }
  const translation = provider.toEvents(read)
  if (translation instanceof Refusal) return refuse(translation, metrics)
  const attempts = await attemptsToReach(translation, context)
  // Taken for the call's own, who was busy later on would end a call that goes on.
  if (!attempts) return overloaded('Redis does not say whether the call was answered: send it again')
  const given = [...(await reportedTurns(translation, context)), ...translation.events, ...attempts]
  if (given.length === 0) metrics.ignored.inc({ provider: provider.name })

  const raw = request.method === 'GET' ? request.query.toString() : request.body.toString('utf8')
  const parsed = given.map((event) => parseGenerously(event, raw))
  const events = parsed.filter((event): event is CallEvent => !(event instanceof Refusal))
  const rejected = parsed.filter((event) => event instanceof Refusal)
  for (const { code } of rejected) metrics.refused.inc({ code })
  if (events.length === 0 && rejected[0]) return refused(rejected[0])
  const delivered = await deliveries.deliverOrSpool(events)
  if (delivered.state === 'unavailable') return overloaded(delivered.reason ?? 'the stores cannot take more now')
  metrics.acked.inc(events.length - delivered.refused.length)
  rejected.push(...delivered.refused.map(({ refusal }) => refusal))
  const answer = provider.answer?.(read)
  if (answer) return { status: answer.status, headers: { 'Content-Type': answer.contentType }, body: answer.body }
  return summary(given.length - rejected.length, rejected)
}

async function reportedTurns({ unlessSpoken }: Translation, context: WebhookContext): Promise<ProviderEvent[]> {
  const [first] = unlessSpoken ?? []
  if (!first) return []
  const ids = new Set(unlessSpoken!.map(({ id }) => id))
  if (!(await context.hasOtherTurns(String(first.call_sid), ids))) return unlessSpoken!
  // Some of what is reported may never have come: it is kept, but not as turns.
  const { call_sid, source } = first
  const reported = unlessSpoken!.map((turn) => without(turn, 'type', 'call_sid', 'source'))
  return [{ type: 'call.data', call_sid, source, id: contentKey({ reported }), meta: { reported_turns: reported } }]
}

/** @returns undefined when it cannot be said whether they count */
async function attemptsToReach(
  { unlessAnswered = [] }: Translation,
  context: WebhookContext,
): Promise<ProviderEvent[] | undefined> {
  const [first] = unlessAnswered
  const isAnswered = first && (await context.isAnswered(String(first.call_sid)))
  if (first && isAnswered === undefined) return undefined
  return isAnswered ? [] : unlessAnswered
}

const summary = (accepted: number, rejected: Refusal[]): Answer => ({ status: '200 OK', body: { accepted, rejected } })

function refuse(refusal: Refusal, metrics: IngestMetrics): Answer {
  metrics.refused.inc({ code: refusal.code })
  return refused(refusal)
}

function refused({ code, message }: Refusal): Answer {
  const status = code === 'unsupported_media_type' ? '415 Unsupported Media Type' : '400 Bad Request'
  return problem(status, code, message)
}

/**
 * A provider cannot mend what it sends: an optional field that is not as it should be is kept in `meta`; an event that is
 * still refused is kept there whole.
 *
 * @param raw what came, as text
 * @returns a Refusal only when it cannot be said which call it belongs to
 */
export function parseGenerously(given: ProviderEvent, raw: string): CallEvent | Refusal {
  const meta: JsonObject = typeof given.meta === 'object' ? { ...given.meta } : {}
  // Adapters name fields that are not there: undefined is absent, not wrong.
  const present = Object.entries(given).filter(([, value]) => value !== undefined)
  let event = Object.fromEntries(present) as ProviderEvent
  for (;;) {
    const parsed = parseEvent(event)
    if (!(parsed instanceof Refusal)) return parsed.event
    const { path } = parsed
    if (path === 'call_sid' || path === undefined || path === 'type') return parsed
    if (path === 'meta' || !(path in event) || parsed.code === 'missing_field') {
      // Nested too deep, or a turn that is none: as text, whatever it is.
      const whole = {
        type: 'call.data',
        call_sid: given.call_sid,
        id: keyOf('refused', given.type, given.id, raw),
        meta: { refused: parsed.message, received: raw },
      }
      const kept = parseEvent(whole)
      return kept instanceof Refusal ? kept : kept.event
    }
    const { [path]: value, ...rest } = event
    keepInMeta(meta, path, value)
    event = { type: event.type, call_sid: event.call_sid, ...rest, meta }
  }
}
