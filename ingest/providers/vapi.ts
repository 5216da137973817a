/** Vapi's server messages: everything is in `message`. [sdk: ServerMessage…] */

import { parseTime } from '../../shared/event-rules.js'
import type { JsonObject } from '../../shared/json.js'
import { bearerToken, secretCheck } from '../auth.js'
import { callStarted } from './call-started.js'
import { arrayOf, contentKey, missingCall, numberOf, objectOf, textOf, without, wordOf } from './payload.js'
import { type Common, type CreateProvider, IGNORED, type ProviderEvent, type Translation } from './provider.js'
import { forbidden } from './signature.js'

export const createVapi: CreateProvider = ({ VAPI_SECRET: secrets }) => {
  const isSecret = secretCheck(secrets)
  return {
    name: 'vapi',
    routes: [''],
    secretVariable: 'VAPI_SECRET',
    isSecretInHead: true,
    ...(secrets.length > 0 && {
      verify({ header }) {
        const given = header('x-vapi-secret') || bearerToken(header('authorization')) || ''
        return isSecret(given) ? undefined : forbidden('X-Vapi-Secret, or the bearer token, wants to be VAPI_SECRET')
      },
    }),
    toEvents({ payload }) {
      // Unverified: a message without its envelope.
      const message = 'message' in payload ? { ...without(payload, 'message'), ...objectOf(payload.message) } : payload
      const type = textOf(message.type) ?? ''
      const callSid = textOf(objectOf(message.call).id)
      if (callSid === undefined) return OF_NO_CALL.test(type) ? IGNORED : missingCall('message.call.id')
      if (REDUNDANT.has(type) || message.transcriptType === 'partial') return IGNORED
      const common = { call_sid: callSid, source: 'vapi' }
      const { events, ...rest } = translate(type, message, common)
      return { events: [started(message, common), ...events], ...rest }
    },
  }
}

function translate(type: string, message: JsonObject, common: Common): Translation {
  if (TRANSCRIPT.test(type)) return { events: [turn(message, common)] }
  if (type === 'status-update') return { events: statusUpdate(message, common) }
  if (type === 'end-of-call-report') return report(message, common)
  const rest = without(message, ...CONTEXT)
  return { events: [{ ...common, type: 'call.data', id: contentKey(rest), ts: message.timestamp, meta: rest }] }
}

/** Messages of text chats and their sessions. */
const OF_NO_CALL = /^(chat|session)\./
/** Where only some kinds are asked for, the type names the kind: `transcript[transcriptType="final"]`. */
const TRANSCRIPT = /^transcript(\[|$)/
/** Many a second, of what the transcripts say as well. */
const REDUNDANT = new Set([
  'conversation-update',
  'speech-update',
  'model-output',
  'voice-input',
  'voice-request',
  'assistant.speechStarted',
])
/** In every message again, all of it: the report at the end has it once. */
const CONTEXT = [
  'call',
  'assistant',
  'customer',
  'phoneNumber',
  'artifact',
  'messages',
  'messagesOpenAIFormatted',
  'conversation',
]

function started(message: JsonObject, common: Common): ProviderEvent {
  const call = objectOf(message.call)
  const numberIn = (field: string) => textOf(objectOf(message[field] ?? call[field]).number)
  const [customer, ours] = [numberIn('customer'), numberIn('phoneNumber')]
  const { type, phoneCallProvider, phoneCallProviderId, assistantId } = call
  const direction = wordOf(type).endsWith('PhoneCall') ? type : undefined // webCall has none
  const [from, to] = direction === 'outboundPhoneCall' ? [ours, customer] : [customer, ours]
  const meta = { callType: type, phoneCallProvider, phoneCallProviderId, assistantId }
  return callStarted(common, 'vapi', { direction, from, to }, { ts: call.createdAt, meta })
}

/** A final transcript has no id. Sent again it is the same to the millisecond; the same words said again are not. */
function turn(message: JsonObject, common: Common): ProviderEvent {
  const { role, transcript, timestamp, confidence } = message
  const identity = textOf(timestamp) === undefined ? message : { role, transcript, timestamp }
  const meta = without(
    message,
    ...CONTEXT,
    'type',
    'transcriptType',
    ...Object.keys({ role, transcript, timestamp, confidence }),
  )
  const said = { speaker: role, text: transcript, ts: timestamp, confidence }
  return { ...common, type: 'turn', id: contentKey(identity), ...said, meta }
}

/** Those that the contract has other words for. */
const STATUSES = new Map<unknown, string>([
  ['scheduled', 'queued'],
  ['forwarding', 'in-progress'],
])

function statusUpdate(message: JsonObject, common: Common): ProviderEvent[] {
  const word = wordOf(message.status)
  const reason = textOf(message.endedReason)
  const hasEnded = word === 'ended'
  // Without a reason it is not said how it ended: the report will tell.
  const status = hasEnded ? reason && endStatus(reason) : (STATUSES.get(word) ?? message.status)
  const meta = without(message, ...CONTEXT, 'type', 'timestamp', 'transcript', ...(status === word ? ['status'] : []))
  const said = { ...common, id: contentKey({ word, timestamp: message.timestamp }), ts: message.timestamp }
  const events: ProviderEvent[] = [{ ...said, type: 'call.status', status, meta }]
  return hasEnded ? [...events, { ...said, type: 'call.ended', reason }] : events
}

/** The first that matches counts; a reason that nobody knows is no failure. [sdk: some 700 endedReasons] */
const STATUS_OF_REASON: [RegExp, string][] = [
  [/^customer-busy$/, 'busy'],
  [/^customer-did-not-answer$/, 'no-answer'],
  [/cancel|scheduled-call-deleted|hungup-before-call-connect|did-not-give-microphone/, 'canceled'],
  [/error|fault|failed|assistant-not-|no-call-received|worker-shutdown/, 'failed'],
]
const endStatus = (reason: string) => STATUS_OF_REASON.find(([pattern]) => pattern.test(reason))?.[1] ?? 'completed'

/** The last message: all there is of the call. Its turns count if no transcripts came live: those have no common key. */
function report(message: JsonObject, common: Common): Translation {
  const [call, artifact, analysis] = [objectOf(message.call), objectOf(message.artifact), objectOf(message.analysis)]
  // [sdk] artifact.messages; the other places are those of older versions.
  const said = [artifact.messages, message.messages, call.messages].map(arrayOf).find((list) => list.length > 0) ?? []
  const messages = said.map(objectOf)
  const duration_seconds = seconds(message)
  const reason = textOf(message.endedReason)
  const status = reason && endStatus(reason)
  const wasAnswered = status === 'completed' || status === 'failed'
  const repeated = ['endedReason', ...(said.length > 0 ? ['messages', 'messagesOpenAIFormatted', 'transcript'] : [])]
  const recording_url = recording(message)
  const hasMessages = artifact.messages === undefined || Array.isArray(artifact.messages)
  const meta = {
    ...without(message, ...repeated, 'type', 'recordingUrl', 'startedAt', 'endedAt', 'durationSeconds'),
    call: without(call, ...repeated, 'artifact', 'analysis'),
    // The prompt and the tools' calls: nobody heard them.
    artifact: {
      ...without(artifact, ...repeated, 'recordingUrl'),
      ...(hasMessages && { messages: said.filter((each) => !isSpoken(objectOf(each))) }),
    },
    ...odd(message),
  }
  const ended = { ...common, id: 'report', ts: message.endedAt }
  const events: ProviderEvent[] = [
    { ...ended, type: 'call.status', status },
    {
      ...ended,
      type: 'call.ended',
      reason,
      duration_seconds,
      recording_url,
      meta,
    },
  ]
  if (wasAnswered && textOf(message.startedAt)) {
    events.unshift({ ...common, type: 'call.status', id: 'answered', ts: message.startedAt, status: 'in-progress' })
  }
  if (Object.keys(analysis).length > 0) {
    const data = analysis.structuredData
    events.push({ ...ended, type: 'call.data', data, meta: without(analysis, 'structuredData') })
  }
  return { events, unlessSpoken: reportedTurns(messages, common) }
}

/** What could not be read of what is read. */
function odd({ artifact, analysis, call, startedAt, endedAt, durationSeconds }: JsonObject): JsonObject {
  const isRead = {
    artifact: artifact === objectOf(artifact),
    analysis: analysis === objectOf(analysis),
    call: call === objectOf(call),
    startedAt: parseTime(startedAt) !== undefined,
    endedAt: true, // it is `ts`
    durationSeconds: numberOf(durationSeconds) !== undefined,
  }
  const given = { artifact, analysis, call, startedAt, endedAt, durationSeconds }
  return Object.fromEntries(
    Object.entries(given).filter(([name, value]) => value !== undefined && !isRead[name as keyof typeof isRead]),
  )
}

function seconds({ durationSeconds, startedAt, endedAt }: JsonObject): number | undefined {
  const between = ((parseTime(endedAt) ?? Number.NaN) - (parseTime(startedAt) ?? Number.NaN)) / 1000
  return numberOf(durationSeconds) ?? (between >= 0 ? between : undefined)
}

function recording(message: JsonObject): string | undefined {
  const { recordingUrl, stereoRecordingUrl } = objectOf(message.artifact)
  return textOf(recordingUrl) ?? textOf(message.recordingUrl) ?? textOf(stereoRecordingUrl)
}

const SPEAKERS = new Set(['bot', 'assistant', 'user'])
const isSpoken = ({ role, message }: JsonObject) => SPEAKERS.has(wordOf(role)) && typeof message === 'string'

function reportedTurns(messages: JsonObject[], common: Common): ProviderEvent[] {
  return messages.filter(isSpoken).map((said, seq) => {
    const { role, message, time, endTime, confidence } = said
    const meta = without(said, 'role', 'message', 'time', 'endTime', 'confidence')
    const times = { ts: time, started_at: time, ended_at: endTime }
    return {
      ...common,
      type: 'turn',
      id: `report-${seq}`,
      seq,
      speaker: role,
      text: message,
      ...times,
      confidence,
      meta,
    }
  })
}
