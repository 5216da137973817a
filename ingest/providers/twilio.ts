/** Twilio: status callbacks, Real-Time Transcription, recordings. (`/streams/twilio`: twilio-stream.ts) */
import { DateTime } from 'luxon'
import { END_STATUSES } from '../../shared/events.js'
import type { JsonObject } from '../../shared/json.js'
import { contentKey, jsonOf, keyOf, missingCall, numberOf, objectOf, textOf, without, wordOf } from './payload.js'
import { type CreateProvider, EMPTY_RESPONSE, IGNORED, NO_CONTENT, type ReadRequest } from './provider.js'
import { type EventFields, startedEvents, twilioEvents } from './twilio-events.js'
import { verifySignature } from './twilio-signature.js'
import { TwilioStream } from './twilio-stream.js'

/** @param retryKey of what has no number of its own: the same when it is sent again */
type Translate = (payload: JsonObject, retryKey: string) => EventFields[]

const ROUTES: Record<string, Translate> = { voice, transcription, recording }

export const createTwilio: CreateProvider = ({ TWILIO_AUTH_TOKEN: tokens }) => ({
  name: 'twilio',
  routes: Object.keys(ROUTES),
  secretVariable: 'TWILIO_AUTH_TOKEN',
  ...(tokens.length > 0 && { verify: (request) => verifySignature(request, tokens) }),
  toEvents(request) {
    const payload = fieldsOf(request)
    const callSid = textOf(payload.CallSid)
    if (callSid === undefined) return missingCall('CallSid')
    const token = textOf(request.header('i-twilio-idempotency-token'))
    const events = ROUTES[request.route]!(payload, token === undefined ? contentKey(payload) : keyOf(token))
    if (events.length === 0) return IGNORED
    return { events: twilioEvents(callSid, [...started(payload, events), ...events]) }
  },
  answer: ({ route, payload }) => (wantsTwiml(route, payload) ? EMPTY_RESPONSE : NO_CONTENT),
  openStream: () => new TwilioStream(),
})

/**
 * The end tells when the call began, too: for calls to a number of which only the end is called back. That has another id, for
 * it must not matter which message comes first.
 */
function started({ From, To, Direction }: JsonObject, events: EventFields[]): EventFields[] {
  const { ts } = events[0]!
  const ended = events.find(({ type }) => type === 'call.ended')
  if (!ended) return startedEvents('twilio', From, To, Direction, ts)
  const duration = numberOf(ended.duration_seconds) ?? 0
  return startedEvents('twilio-ended', From, To, Direction, numberOf(ts) && Number(ts) - duration * 1000)
}

/** A Voice URL, and the `action` of a verb, are asked what to do next; a callback only tells. */
function wantsTwiml(route: string, { CallbackSource }: JsonObject): boolean {
  return route === 'voice' && CallbackSource !== 'call-progress-events'
}

/** With the query of its URL: the only way to have something of one's own in a callback. A name twice is a list. */
function fieldsOf({ query, payload }: ReadRequest): JsonObject {
  const fields = { ...without(Object.fromEntries(query), 'bodySHA256'), ...payload }
  return Object.fromEntries(
    Object.entries(fields).map(([name, value]) => {
      const values = Array.isArray(value) ? [...new Set(value)] : []
      return [name, values.length === 1 ? values[0] : value]
    }),
  )
}

/**
 * StatusCallback, and requests of a Voice URL. [sdk] [doc]
 * They come in any order, and are numbered from 0, by SequenceNumber; Voice URL requests are not.
 */
function voice(payload: JsonObject, retryKey: string): EventFields[] {
  const status = textOf(payload.CallStatus)
  if (status === undefined) return other(payload, retryKey)
  const number = numberOf(payload.SequenceNumber)
  const id = number === undefined ? retryKey : keyOf(number, status)
  const time = timeOf(payload.Timestamp)
  // It has whole seconds: the number puts what happened in one of them in order.
  const ts = time === undefined ? undefined : time + Math.min(number ?? 0, 999)
  const duration_seconds = numberOf(payload.CallDuration)
  const recording_url = textOf(payload.RecordingUrl)
  const read = { CallStatus: status, Timestamp: ts, CallDuration: duration_seconds, RecordingUrl: recording_url }
  const common = { id, ts, duration_seconds, recording_url }
  const events: EventFields[] = [{ type: 'call.status', ...common, status, meta: unread(payload, read) }]
  if (END_STATUSES.has(status.toLowerCase())) events.push({ type: 'call.ended', ...common, reason: status })
  return events
}

/** Real-Time Transcription: all values are strings; SequenceId counts its webhooks of both tracks, from 1. [code] */
function transcription(payload: JsonObject, retryKey: string): EventFields[] {
  const of = textOf(payload.TranscriptionSid)
  const at = numberOf(payload.SequenceId)
  const id = of === undefined || at === undefined ? retryKey : keyOf(of, at)
  const event = textOf(payload.TranscriptionEvent)
  if (event === 'transcription-content') return isFalse(payload.Final) ? [] : [turn(payload, id, at)]
  const edge =
    event === 'transcription-started'
      ? { starts: true, dense: !isTrue(payload.PartialResults) }
      : event === 'transcription-stopped' && { ends: true }
  const configuration = objectOf(jsonOf(payload.ProviderConfiguration))
  const extra = {
    ...(Object.keys(configuration).length > 0 && { ProviderConfiguration: configuration }),
    // For `complete`: turns have these numbers, too, and with partial results, so do webhooks that are no turns.
    ...(edge && of !== undefined && Number.isInteger(at) && { sequence: { of, at, ...edge } }),
  }
  return other({ ...payload, ...extra }, id)
}

/** Also one without words is a turn: its number counts. */
function turn(payload: JsonObject, id: string, at: number | undefined): EventFields {
  const data = objectOf(jsonOf(payload.TranscriptionData))
  const { transcript } = data
  const text = typeof transcript === 'string' ? transcript : (textOf(payload.TranscriptionData) ?? '')
  const ts = timeOf(payload.Timestamp)
  const language = textOf(payload.LanguageCode)
  const track = textOf(payload.Track)
  const moreData = without(data, 'transcript', 'confidence')
  const meta = {
    ...unread(payload, { TranscriptionData: text, Timestamp: ts, LanguageCode: language }),
    ...(Object.keys(moreData).length > 0 && { TranscriptionData: moreData }),
  }
  const speaker = SPEAKERS.get(track) ?? track ?? 'unknown'
  return { type: 'turn', id, seq: at, ts, speaker, text, confidence: numberOf(data.confidence), language, meta }
}

/**
 * Tracks are named as Twilio hears them: inbound is what it receives from the other end of this CallSid, whoever called whom.
 * (So on the leg of an agent who was dialled it is the agent that is called customer.)
 */
const SPEAKERS = new Map<unknown, string>([
  ['inbound_track', 'customer'],
  ['outbound_track', 'agent'],
])

/** RecordingStatusCallback: after the call's end, as a rule. [doc] Its duration is not the call's. */
function recording(payload: JsonObject, retryKey: string): EventFields[] {
  const sid = textOf(payload.RecordingSid)
  const status = textOf(payload.RecordingStatus)
  const id = sid === undefined || status === undefined ? retryKey : keyOf(sid, status)
  const url = status === 'absent' || status === 'failed' ? undefined : textOf(payload.RecordingUrl)
  const begun = timeOf(payload.RecordingStartTime)
  const seconds = status === 'in-progress' ? 0 : Math.max(numberOf(payload.RecordingDuration) ?? 0, 0)
  // It does not say when it is sent: when the recording began, or else was done.
  const ts = begun === undefined ? undefined : begun + seconds * 1000
  return [{ type: 'call.status', id, ts, recording_url: url, meta: unread(payload, { RecordingUrl: url }) }]
}

/** Whatever else it says of a call. */
function other(payload: JsonObject, id: string): EventFields[] {
  const ts = timeOf(payload.Timestamp)
  return [{ type: 'call.data', id, ts, meta: unread(payload, { Timestamp: ts }) }]
}

/** For `meta`: without the fields of which something was read. Who is calling is in every message: call.started has it. */
function unread(payload: JsonObject, read: JsonObject): JsonObject {
  const names = Object.keys(read).filter((name) => read[name] !== undefined)
  return without(payload, 'CallSid', 'From', 'To', ...names)
}

const isTrue = (value: unknown) => wordOf(value).toLowerCase() === 'true'
const isFalse = (value: unknown) => wordOf(value).toLowerCase() === 'false'

/** A longer one is none. */
const MAX_TIME_CHARS = 64

/** RFC 2822 or ISO 8601, epoch ms. */
function timeOf(value: unknown): number | undefined {
  const text = (textOf(value) ?? '').slice(0, MAX_TIME_CHARS)
  return [DateTime.fromRFC2822(text), DateTime.fromISO(text, { zone: 'utc' })].find((time) => time.isValid)?.toMillis()
}
