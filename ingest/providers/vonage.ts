/**
 * Vonage Voice API: the event webhook, POST (JSON) or GET (query).
 *
 * The call is the conversation (`conversation_uuid`), not one of its legs (`uuid`): recordings and transcriptions name only
 * the conversation, and a bot's WebSocket is a leg of its own. So a leg's end is not always the call's:
 * - a leg to a WebSocket is the bot's: it says nothing of the call's status;
 * - another outbound leg is the call itself or, once somebody has answered, an attempt to reach one more party.
 */

import { createHash } from 'node:crypto'
import { END_STATUSES, type Refusal } from '../../shared/events.js'
import type { JsonObject } from '../../shared/json.js'
import { bearerToken } from '../auth.js'
import { callStarted } from './call-started.js'
import { arrayOf, contentKey, jsonOf, keyOf, missingCall, numberOf, objectOf, textOf, without } from './payload.js'
import {
  type Common,
  type CreateProvider,
  NO_CONTENT,
  type ProviderEvent,
  type ProviderRequest,
  type Translation,
} from './provider.js'
import { forbidden, isSigned, notFresh } from './signature.js'

/** [doc] Vonage's words; any other one is no status of a call (`disconnected` is of a WebSocket, `transcribed` of a recording). */
const STATUSES = new Map([
  ['started', 'initiated'],
  ['ringing', 'ringing'],
  ['answered', 'in-progress'],
  ['human', 'in-progress'],
  ['machine', 'in-progress'],
  ['completed', 'completed'],
  ['busy', 'busy'],
  ['cancelled', 'canceled'],
  ['failed', 'failed'],
  ['rejected', 'failed'], // by Vonage, before it was connected
  ['timeout', 'no-answer'],
  ['unanswered', 'no-answer'],
])

export const createVonage: CreateProvider = ({ VONAGE_SIGNATURE_SECRET: secrets }) => ({
  name: 'vonage',
  routes: [''],
  secretVariable: 'VONAGE_SIGNATURE_SECRET',
  ...(secrets.length > 0 && { verify: (request) => verify(request, secrets) }),
  toEvents: ({ payload }) => translate(payload),
  // Anything else could be taken for an NCCO, which replaces what the call is doing.
  answer: () => NO_CONTENT,
})

/** [doc] A JWT of which Vonage uses only HS256: three lines of node:crypto, and no dependency that could accept another `alg`. */
function verify(request: ProviderRequest, secrets: string[]): Refusal | undefined {
  const token = bearerToken(request.header('authorization'))
  const [header = '', claims = '', signature = '', ...rest] = token?.split('.') ?? []
  if (token === undefined || rest.length > 0)
    return forbidden('Authorization wants Bearer and the JWT of a signed webhook')
  const isOurs =
    decoded(header).alg === 'HS256' && isSigned(signature, 'sha256', 'base64url', secrets, `${header}.${claims}`)
  if (!isOurs) return forbidden('the JWT is not signed with HS256 and VONAGE_SIGNATURE_SECRET')
  const { iat, exp, payload_hash } = decoded(claims)
  const stale = notFresh('the JWT', (numberOf(iat) ?? Number.NaN) * 1000, request.receivedMs)
  if (stale) return stale
  if ((numberOf(exp) ?? Number.POSITIVE_INFINITY) * 1000 <= request.receivedMs) return forbidden('the JWT has expired')
  const signed = request.method === 'GET' ? signedQuery(request.query) : request.body
  const isUnchanged = signed !== undefined && payload_hash === createHash('sha256').update(signed).digest('hex')
  return isUnchanged ? undefined : forbidden('payload_hash is not that of what was sent')
}

/** [doc] Of a GET, it is its parameters as a JSON object, in their order; one that comes twice would be read, but not signed. */
function signedQuery(query: URLSearchParams): string | undefined {
  const parameters = Object.fromEntries(query)
  return Object.keys(parameters).length === query.size ? JSON.stringify(parameters) : undefined
}

const decoded = (part: string): JsonObject => objectOf(jsonOf(Buffer.from(part, 'base64url').toString('utf8')))

function translate(payload: JsonObject): Translation | Refusal {
  const { uuid, call_uuid, conversation_uuid, conversation_uuid_from, from, to, direction } = payload
  const call_sid = [conversation_uuid, conversation_uuid_from, uuid, call_uuid].map(textOf).find(Boolean)
  if (!call_sid) return missingCall('conversation_uuid')
  const common = { call_sid, ts: textOf(payload.timestamp), source: 'vonage' }
  const isOfBot = /^wss?:/i.test(textOf(to) ?? '')
  const events: ProviderEvent[] = []
  if ((textOf(from) || textOf(to)) && !isOfBot) {
    events.push(callStarted(common, 'vonage', { direction, from, to }))
  }
  const status = isOfBot ? undefined : STATUSES.get(textOf(payload.status) ?? '')
  const said = { ...common, id: contentKey(payload) } // no event has an id
  if (!status) return { events: [...events, withoutStatus(payload, said)] }

  const statuses = ofStatus(payload, status, said)
  // An inbound leg is a conversation's first one; and whoever else is called: what was answered or completed is so.
  const isOfCall = direction === 'inbound' || status === 'in-progress' || status === 'completed'
  const named = ['conversation_uuid', ...(said.ts === undefined ? [] : ['timestamp'])]
  if (events.length > 0) named.push('from', 'to', 'direction')
  if (isOfCall && END_STATUSES.has(status) && numberOf(payload.duration) !== undefined) named.push('duration')
  const meta = without(payload, ...named, ...(payload.status === status ? ['status'] : []))
  events.push({ ...said, type: 'call.data', meta })
  return isOfCall ? { events: [...events, ...statuses] } : { events, unlessAnswered: statuses }
}

function ofStatus(payload: JsonObject, status: string, said: Common): ProviderEvent[] {
  const events: ProviderEvent[] = [{ ...said, type: 'call.status', status }]
  if (END_STATUSES.has(status)) {
    const reason = textOf(payload.detail) ?? textOf(payload.reason) ?? payload.status
    events.push({ ...said, type: 'call.ended', reason, duration_seconds: numberOf(payload.duration) })
  }
  return events
}

/** [doc] `record`, `input`, `transfer`, errors; what is of a bot's WebSocket; and whatever else. */
function withoutStatus(payload: JsonObject, said: Common): ProviderEvent {
  const { recording_url, recording_uuid } = payload
  const meta = without(payload, 'conversation_uuid', ...(said.ts === undefined ? [] : ['timestamp']))
  if (textOf(recording_url)) {
    const id = textOf(recording_uuid) ? keyOf('recording', recording_uuid) : said.id
    return { ...said, type: 'call.status', id, recording_url, meta: without(meta, 'recording_url') }
  }
  // What an `input` action heard: the likeliest of its results is what was said.
  const [best] = arrayOf(objectOf(payload.speech).results).map(objectOf)
  const text = textOf(best?.text)
  if (!text) return { ...said, type: 'call.data', meta }
  return { ...said, type: 'turn', speaker: 'customer', text, confidence: numberOf(best?.confidence), meta }
}
