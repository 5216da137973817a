/** Vapi's server messages: everything is in `message`. [sdk: ServerMessage…] */
import { bearerToken, secretCheck } from '../auth.js'
import { arrayOf, contentKey, missingCall, numberOf, objectOf, textOf, without } from './payload.js'
import { type CreateProvider, IGNORED, type JsonObject, type ProviderEvent, type Translation } from './provider.js'
import { forbidden } from './signature.js'

export const createVapi: CreateProvider = ({ VAPI_SECRET: secrets }) => {
  const isSecret = secretCheck(secrets)
  return {
    name: 'vapi',
    routes: [''],
    secretVariable: 'VAPI_SECRET',
    ...(secrets.length > 0 && {
      verify({ header }) {
        const given = header('x-vapi-secret') || bearerToken(header('authorization')) || ''
        return isSecret(given) ? undefined : forbidden('X-Vapi-Secret, or the bearer token, wants to be VAPI_SECRET')
      },
    }),
    toEvents({ payload }) {
      // Unverified: what posts a message by itself.
      const message = 'message' in payload ? objectOf(payload.message) : payload
      const type = textOf(message.type) ?? ''
      const callSid = textOf(objectOf(message.call).id)
      if (callSid === undefined) return OF_NO_CALL.test(type) ? IGNORED : missingCall('message.call.id')
      if (REDUNDANT.has(type) || message.transcriptType === 'partial') return IGNORED
      const of = { call_sid: callSid, source: 'vapi' }
      const { events, ...rest } = translate(type, message, of)
      return { events: [started(message, of), ...events], ...rest }
    },
  }
}

/** What every event of a message has. */
interface Of {
  call_sid: string
  source: string
}

function translate(type: string, message: JsonObject, of: Of): Translation {
  if (TRANSCRIPT.test(type)) return { events: [turn(message, of)] }
  if (type === 'status-update') return { events: statusUpdate(message, of) }
  if (type === 'end-of-call-report') return report(message, of)
  const rest = without(message, ...CONTEXT)
  return { events: [{ ...of, type: 'call.data', id: contentKey(rest), ts: message.timestamp, meta: rest }] }
}

/** Messages of text chats and their sessions. */
const OF_NO_CALL = /^(chat|session)\./
/** Also told which transcripts are wanted, some messages repeat it in their type. */
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

const DIRECTIONS: JsonObject = { inboundPhoneCall: 'inbound', outboundPhoneCall: 'outbound' }

function started(message: JsonObject, of: Of): ProviderEvent {
  const call = objectOf(message.call)
  const numberIn = (field: string) => textOf(objectOf(message[field] ?? call[field]).number)
  const [customer, ours] = [numberIn('customer'), numberIn('phoneNumber')]
  const direction = DIRECTIONS[String(call.type)]
  const [from, to] = direction === 'outbound' ? [ours, customer] : [customer, ours]
  const { phoneCallProvider, phoneCallProviderId, assistantId } = call
  const meta = { callType: call.type, phoneCallProvider, phoneCallProviderId, assistantId }
  return { ...of, type: 'call.started', id: 'vapi', ts: call.createdAt, provider: 'vapi', direction, from, to, meta }
}

/** A final transcript has no id. Sent again it is the same to the millisecond; the same words said again are not. */
function turn(message: JsonObject, of: Of): ProviderEvent {
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
  return { ...of, type: 'turn', id: contentKey(identity), ...said, meta }
}

const STATUSES: Record<string, string> = { scheduled: 'queued', forwarding: 'in-progress' }

function statusUpdate(message: JsonObject, of: Of): ProviderEvent[] {
  const word = String(message.status)
  const reason = textOf(message.endedReason)
  const hasEnded = word === 'ended'
  // Without a reason it is not said how it ended: the report will tell.
  const status = hasEnded ? reason && endStatus(reason) : (STATUSES[word] ?? message.status)
  const meta = without(message, ...CONTEXT, 'type', 'timestamp', 'transcript', ...(status === word ? ['status'] : []))
  const common = { ...of, id: contentKey({ word, timestamp: message.timestamp }), ts: message.timestamp }
  const events: ProviderEvent[] = [{ ...common, type: 'call.status', status, meta }]
  return hasEnded ? [...events, { ...common, type: 'call.ended', reason }] : events
}

/** The first that matches counts; a reason that nobody knows is no failure. [sdk: some 700 endedReasons] */
const END_STATUSES: [RegExp, string][] = [
  [/^customer-busy$/, 'busy'],
  [/^customer-did-not-answer$/, 'no-answer'],
  [/cancel|scheduled-call-deleted|hungup-before-call-connect|did-not-give-microphone/, 'canceled'],
  [/error|fault|failed|assistant-not-|no-call-received|worker-shutdown/, 'failed'],
]
const endStatus = (reason: string) => END_STATUSES.find(([pattern]) => pattern.test(reason))?.[1] ?? 'completed'

/** The last message: all there is of the call. Its turns count if no transcripts came live: those have no common key. */
function report(message: JsonObject, of: Of): Translation {
  const [call, artifact, analysis] = [objectOf(message.call), objectOf(message.artifact), objectOf(message.analysis)]
  // [sdk] artifact.messages; the other places are those of older versions.
  const said = [artifact.messages, message.messages, call.messages].map(arrayOf).find((list) => list.length > 0) ?? []
  const messages = said.map(objectOf)
  const reason = textOf(message.endedReason)
  const status = reason && endStatus(reason)
  const wasAnswered = status === 'completed' || status === 'failed'
  const repeated = ['messages', 'messagesOpenAIFormatted', 'endedReason', ...(said.length > 0 ? ['transcript'] : [])]
  const meta = {
    ...without(message, ...repeated, 'type', 'analysis', 'recordingUrl', 'startedAt', 'endedAt', 'durationSeconds'),
    call: without(call, ...repeated, 'artifact', 'analysis'),
    // The prompt and the tools' calls: nobody heard them.
    artifact: {
      ...without(artifact, ...repeated, 'recordingUrl'),
      messages: messages.filter((each) => !isSpoken(each)),
    },
  }
  const ended = { ...of, id: 'report', ts: message.endedAt }
  const events: ProviderEvent[] = [
    { ...ended, type: 'call.status', status },
    {
      ...ended,
      type: 'call.ended',
      reason,
      duration_seconds: seconds(message),
      recording_url: recording(message),
      meta,
    },
  ]
  if (wasAnswered && textOf(message.startedAt)) {
    events.unshift({ ...of, type: 'call.status', id: 'answered', ts: message.startedAt, status: 'in-progress' })
  }
  if (Object.keys(analysis).length > 0) {
    const data = analysis.structuredData
    events.push({ ...ended, type: 'call.data', data, meta: without(analysis, 'structuredData') })
  }
  return { events, unlessSpoken: reportedTurns(messages, of) }
}

function seconds({ durationSeconds, startedAt, endedAt }: JsonObject): number | undefined {
  const between = (Date.parse(String(endedAt)) - Date.parse(String(startedAt))) / 1000
  return numberOf(durationSeconds) ?? (between >= 0 ? between : undefined)
}

function recording(message: JsonObject): string | undefined {
  const { recordingUrl, stereoRecordingUrl } = objectOf(message.artifact)
  return textOf(recordingUrl) ?? textOf(message.recordingUrl) ?? textOf(stereoRecordingUrl)
}

const SPEAKERS = new Set(['bot', 'assistant', 'user'])
const isSpoken = ({ role, message }: JsonObject) => SPEAKERS.has(String(role)) && typeof message === 'string'

function reportedTurns(messages: JsonObject[], of: Of): ProviderEvent[] {
  return messages.filter(isSpoken).map((said, seq) => {
    const { role, message, time, endTime, confidence } = said
    const meta = without(said, 'role', 'message', 'time', 'endTime', 'confidence')
    const times = { ts: time, started_at: time, ended_at: endTime }
    return { ...of, type: 'turn', id: `report-${seq}`, seq, speaker: role, text: message, ...times, confidence, meta }
  })
}
