/** ElevenLabs Agents: post-call webhooks, one message with all of a call. [doc, sdk: elevenlabs-js's webhooks] */

import type { JsonObject } from '../../shared/json.js'
import { callStarted } from './call-started.js'
import { arrayOf, contentKey, missingCall, msOf, numberOf, objectOf, textOf, without } from './payload.js'
import { type Common, type CreateProvider, IGNORED, type ProviderEvent, type ProviderRequest } from './provider.js'
import { forbidden, isSigned, notFresh, signatureParts } from './signature.js'

/** As its SDK has it. */
const TOLERANCE_MINUTES = 30

export const createElevenLabs: CreateProvider = ({ ELEVENLABS_SECRET: secrets }) => ({
  name: 'elevenlabs',
  routes: [''],
  secretVariable: 'ELEVENLABS_SECRET',
  ...(secrets.length > 0 && { verify: (request) => verify(request, secrets) }),
  toEvents({ payload }) {
    const type = textOf(payload.type) ?? ''
    const data = objectOf(payload.data)
    // The telephony provider's call_sid stays in meta: calls from a browser have none, and not all messages have it.
    const callSid = textOf(data.conversation_id)
    if (callSid === undefined) return OF_CALLS.test(type) ? missingCall('data.conversation_id') : IGNORED
    const message = { type, payload, data, common: { call_sid: callSid, source: 'elevenlabs' } }
    if (type === 'post_call_audio') return IGNORED // megabytes of base64
    if (type === 'post_call_transcription') return { events: conversation(message) }
    if (type === 'call_initiation_failure') return { events: failure(message) }
    return { events: [{ ...message.common, type: 'call.data', id: contentKey(payload), meta: payload }] }
  },
})

function verify({ header, body, receivedMs }: ProviderRequest, secrets: string[]) {
  const { t = '', v0 = '' } = signatureParts(header('elevenlabs-signature'))
  if (!isSigned(v0, 'sha256', 'hex', secrets, `${t}.`, body)) {
    return forbidden('ElevenLabs-Signature does not fit ELEVENLABS_SECRET')
  }
  return notFresh('ElevenLabs-Signature', Number(t) * 1000, receivedMs, TOLERANCE_MINUTES)
}

/** Other types, of voices and workspaces, are of no call; what says nothing is. */
const OF_CALLS = /call|^$/

interface Message {
  type: string
  payload: JsonObject
  data: JsonObject
  common: Common
}

const sum = (a: number | undefined, b: number | undefined) => (a === undefined || b === undefined ? undefined : a + b)

function conversation({ type, payload, data, common }: Message): ProviderEvent[] {
  const metadata = objectOf(data.metadata)
  const startMs = msOf(metadata.start_time_unix_secs)
  const items = arrayOf(data.transcript)
  const turns = items
    .map(objectOf)
    .filter(isSpoken)
    .map((item, seq) => turn(item, seq, startMs, common))
  const duration_seconds = numberOf(metadata.call_duration_secs)
  const ended = { ...common, id: type, ts: sum(startMs, msOf(metadata.call_duration_secs)) }
  const reason = textOf(metadata.termination_reason) ?? textOf(data.status)
  const meta = {
    ...without(data, 'conversation_id', 'transcript', 'metadata', 'analysis'),
    ...without(
      metadata,
      ...(startMs === undefined ? [] : ['start_time_unix_secs']),
      ...(duration_seconds === undefined ? [] : ['call_duration_secs']),
      ...(textOf(metadata.termination_reason) === undefined ? [] : ['termination_reason']),
    ),
    ...(isObject(data.metadata) ? {} : { metadata: data.metadata }),
    ...(isObject(data.analysis) ? {} : { analysis: data.analysis }),
    ...without(payload, 'type', 'data'),
    // What the agent did without a word.
    transcript: Array.isArray(data.transcript) ? items.filter((item) => !isSpoken(objectOf(item))) : data.transcript,
  }
  return [
    started(objectOf(metadata.phone_call), startMs, common),
    { ...common, type: 'call.status', id: 'answered', ts: sum(startMs, 0), status: 'in-progress' },
    ...turns,
    { ...ended, type: 'call.status', status: data.status === 'failed' ? 'failed' : 'completed' },
    ...analysed(ended, objectOf(data.analysis)),
    {
      ...ended,
      type: 'call.ended',
      reason,
      duration_seconds,
      turn_count: Array.isArray(data.transcript) ? turns.length : undefined,
      meta,
    },
  ]
}

const isObject = (value: unknown) => value === undefined || value === objectOf(value)
const isSpoken = ({ message }: JsonObject) => textOf(message) !== undefined

/** Nothing of it came live, so its place in the transcript is its key. */
function turn(item: JsonObject, seq: number, startMs: number | undefined, common: Common): ProviderEvent {
  const { role, message, time_in_call_secs, interrupted } = item
  const at = sum(startMs, msOf(time_in_call_secs))
  const rest = without(item, 'role', 'message', 'interrupted')
  const meta = Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== null && !isEmptyList(value)))
  return {
    ...common,
    type: 'turn',
    seq,
    speaker: role,
    text: textOf(message),
    ts: at,
    started_at: at,
    interrupted,
    meta,
  }
}

const isEmptyList = (value: unknown) => Array.isArray(value) && value.length === 0

/** @param phone absent of calls from a browser */
function started(phone: JsonObject, ts: number | undefined, common: Common): ProviderEvent {
  const [ours, theirs] = [textOf(phone.agent_number), textOf(phone.external_number)]
  const [from, to] = phone.direction === 'outbound' ? [ours, theirs] : [theirs, ours]
  return callStarted(common, 'elevenlabs', { direction: textOf(phone.direction), from, to }, { ts })
}

/** What was to be found out about the call: `{name: {value, rationale, …}}`. */
function analysed(ended: Common, analysis: JsonObject): ProviderEvent[] {
  if (Object.keys(analysis).length === 0) return []
  const results = Object.entries(objectOf(analysis.data_collection_results))
  const data = Object.fromEntries(results.map(([name, result]) => [name, objectOf(result).value ?? null]))
  return [{ ...ended, type: 'call.data', data, meta: analysis }]
}

/** Any other reason is `failed`. */
const UNREACHED = new Set(['busy', 'no-answer'])

/** A call that did not come about; `metadata.body` is what Twilio or SIP said of it. [doc; its fields for SIP: code] */
function failure({ type, payload, data, common }: Message): ProviderEvent[] {
  const reason = textOf(data.failure_reason)
  const body = objectOf(objectOf(data.metadata).body)
  const [ours, theirs] = [textOf(body.From ?? body.from_number), textOf(body.To ?? body.to_number)]
  const phone = { direction: 'outbound', agent_number: ours, external_number: theirs }
  const ended = { ...common, id: type, ts: msOf(payload.event_timestamp) }
  const meta = {
    ...without(payload, 'type', 'data'),
    ...without(data, 'conversation_id', ...(isObject(data.metadata) ? ['metadata'] : [])),
    ...objectOf(data.metadata),
  }
  return [
    started(phone, ended.ts, common),
    { ...ended, type: 'call.status', status: UNREACHED.has(reason ?? '') ? reason : 'failed' },
    { ...ended, type: 'call.ended', reason, meta },
  ]
}
