/** `/webhooks/PROVIDER/…`: verify → read → translate → deliver → answer in the provider's way. */
import { isUtf8 } from 'node:buffer'
import { parse as parseNested } from 'qs'
import { type CallEvent, parseEvent, parseJson, Refusal } from '../shared/events.js'
import type { IngestMetrics } from '../shared/metrics.js'
import type { Deliveries } from './deliver.js'
import { type Answer, overloaded, problem } from './http.js'
import { keyOf } from './providers/payload.js'
import type {
  JsonObject,
  Provider,
  ProviderEvent,
  ProviderRequest,
  ReadRequest,
  Translation,
} from './providers/provider.js'

/** Far more fields than any webhook has. */
const MAX_FIELDS = 2000
const FORM = 'application/x-www-form-urlencoded'

export interface WebhookContext {
  deliveries: Deliveries
  metrics: IngestMetrics
  /** Has Redis turns of this call with other ids than these? */
  hasOtherTurns(callSid: string, ids: Set<unknown>): Promise<boolean>
  /** Has somebody answered this call, as far as Redis knows? */
  isAnswered(callSid: string): Promise<boolean>
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
  const given = [
    ...(await reportedTurns(translation, context)),
    ...translation.events,
    ...(await attempts(translation, context)),
  ]
  if (given.length === 0) metrics.ignored.inc({ provider: provider.name })

  const raw = request.method === 'GET' ? request.query.toString() : request.body.toString('utf8')
  const parsed = given.map((event) => parseGenerously(event, raw))
  const events = parsed.filter((event): event is CallEvent => !(event instanceof Refusal))
  const rejected = parsed.filter((event) => event instanceof Refusal)
  for (const { code } of rejected) metrics.refused.inc({ code })
  if (events.length === 0 && rejected[0]) return refused(rejected[0])
  const delivered = await deliveries.deliverOrSpool(events)
  if (delivered.state === 'unavailable') return overloaded(delivered.reason ?? 'the stores cannot take more now')
  rejected.push(...delivered.refused.map(({ refusal }) => refusal))
  const answer = provider.answer?.(read)
  if (answer) return { status: answer.status, headers: { 'Content-Type': answer.contentType }, body: answer.body }
  return summary(given.length - rejected.length, rejected)
}

async function reportedTurns({ unlessSpoken }: Translation, context: WebhookContext): Promise<ProviderEvent[]> {
  const [first] = unlessSpoken ?? []
  if (!first) return []
  const ids = new Set(unlessSpoken!.map(({ id }) => id))
  return (await context.hasOtherTurns(String(first.call_sid), ids)) ? [] : unlessSpoken!
}

async function attempts({ unlessAnswered = [] }: Translation, context: WebhookContext): Promise<ProviderEvent[]> {
  const [first] = unlessAnswered
  return first && (await context.isAnswered(String(first.call_sid))) ? [] : unlessAnswered
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
    meta[path] = value
    event = { type: event.type, call_sid: event.call_sid, ...rest, meta }
  }
}

/** A JSON body, a form, or the query of a GET, as one object. */
async function readPayload(request: ProviderRequest): Promise<JsonObject | Refusal> {
  const { method, query, body } = request
  if (method === 'GET') return nested(query)
  const contentType = request.header('content-type')
  const given = contentType.split(';')[0]!.trim().toLowerCase()
  if (given === 'multipart/form-data') return readMultipart(contentType, body)
  if (!isUtf8(body)) return new Refusal('invalid_utf8', 'the body is not UTF-8')
  const text = body.toString('utf8')
  // Not every provider says what it sends, and none means that it may be refused for that.
  const mediaType = given || (text.trimStart().startsWith('{') ? 'application/json' : FORM)
  if (mediaType === FORM) return nested(new URLSearchParams(text))
  if (mediaType === 'application/json' || mediaType.endsWith('+json')) return readJson(text)
  const wants = 'application/json, application/x-www-form-urlencoded or multipart/form-data'
  return new Refusal('unsupported_media_type', `Content-Type wants ${wants}; got ${contentType.slice(0, 100)}`)
}

function readJson(text: string): JsonObject | Refusal {
  const parsed = parseJson(text)
  if (parsed instanceof Refusal) return parsed
  const isObject = typeof parsed === 'object' && parsed !== null && !Array.isArray(parsed)
  return isObject ? (parsed as JsonObject) : new Refusal('not_an_object', 'the body wants a JSON object')
}

async function readMultipart(contentType: string, body: Buffer): Promise<JsonObject | Refusal> {
  try {
    const form = await new Response(body, { headers: { 'Content-Type': contentType } }).formData()
    const fields = new URLSearchParams()
    for (const [name, value] of form) fields.append(name, typeof value === 'string' ? value : await value.text())
    return nested(fields)
  } catch (error) {
    return new Refusal('invalid_form', `the multipart body cannot be read: ${(error as Error).message}`)
  }
}

/** `Legs[0][Status]=completed` → {Legs: [{Status: 'completed'}]} */
function nested(fields: URLSearchParams): JsonObject {
  return parseNested(fields.toString(), { plainObjects: true, parameterLimit: MAX_FIELDS, depth: 8 })
}
