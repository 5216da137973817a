/** Telnyx Call Control: `{data: {event_type, id, occurred_at, payload}}`. [doc, sdk: telnyx's webhooks] */
import { createPublicKey, type KeyObject, verify as verifySignature } from 'node:crypto'
import { OperatorError } from '../../shared/config.js'
import { keyOf, missingCall, objectOf, textOf, without } from './payload.js'
import {
  type CreateProvider,
  IGNORED,
  type JsonObject,
  type ProviderEvent,
  type ProviderRequest,
  type Translation,
} from './provider.js'
import { forbidden, isFresh } from './signature.js'

const TOLERANCE_MS = 5 * 60_000

/** @throws OperatorError when a TELNYX_PUBLIC_KEY is none */
export const createTelnyx: CreateProvider = ({ TELNYX_PUBLIC_KEY }) => {
  const keys = TELNYX_PUBLIC_KEY.map(publicKey)
  return {
    name: 'telnyx',
    routes: [''],
    secretVariable: 'TELNYX_PUBLIC_KEY',
    ...(keys.length > 0 && { verify: (request) => verify(request, keys) }),
    toEvents({ payload }) {
      const data = objectOf(payload.data)
      const eventType = textOf(data.event_type) ?? ''
      const fields = objectOf(data.payload)
      const callSid = IDENTITY.map((field) => textOf(fields[field])).find((id) => id !== undefined)
      if (callSid === undefined) return OF_CALLS.test(eventType) ? missingCall('data.payload.call_session_id') : IGNORED
      const of = { call_sid: callSid, source: 'telnyx', id: textOf(data.id), ts: data.occurred_at }
      const translate = TRANSLATE[eventType] ?? other
      const { events, ...rest } = translate(fields, of, eventType)
      return events.length > 0 ? { events: [started(fields, of), ...events], ...rest } : IGNORED
    },
  }
}

/** @param base64 of the key's 32 bytes, as the portal shows it */
function publicKey(base64: string): KeyObject {
  const bytes = Buffer.from(base64, 'base64')
  if (bytes.length !== 32) {
    throw new OperatorError('TELNYX_PUBLIC_KEY wants the public key that the portal shows: 44 characters of base64')
  }
  return createPublicKey({ key: { kty: 'OKP', crv: 'Ed25519', x: bytes.toString('base64url') }, format: 'jwk' })
}

function verify({ header, body, receivedMs }: ProviderRequest, keys: KeyObject[]) {
  const timestamp = header('telnyx-timestamp')
  const signature = Buffer.from(header('telnyx-signature-ed25519'), 'base64')
  const signed = Buffer.concat([Buffer.from(`${timestamp}|`), body])
  if (!keys.some((key) => verifySignature(null, signed, key, signature))) {
    return forbidden('Telnyx-Signature-Ed25519 does not fit TELNYX_PUBLIC_KEY')
  }
  const isNow = isFresh(Number(timestamp) * 1000, receivedMs, TOLERANCE_MS)
  return isNow ? undefined : forbidden('Telnyx-Timestamp is older than five minutes')
}

/**
 * The call is the session: a call that is transferred has several legs, and what was said belongs together. Nothing in a hangup
 * says which leg it was: so one that nobody has answered ends the call only if nobody had answered before.
 */
const IDENTITY = ['call_session_id', 'call_leg_id', 'call_control_id']

/** Other types, of messages and faxes, are of no call; what says nothing is. */
const OF_CALLS = /^call\.|^$/

interface Of {
  call_sid: string
  source: string
  /** The same when it is sent again. */
  id: string | undefined
  ts: unknown
}
type Translate = (fields: JsonObject, of: Of, eventType: string) => Translation

const TRANSLATE: Record<string, Translate> = {
  'call.initiated': (fields, of) => status('initiated', fields, of),
  'call.answered': (fields, of) => status('in-progress', fields, of),
  'call.hangup': hangup,
  'call.transcription': transcription,
  'call.recording.saved': recording,
}

const DIRECTIONS: JsonObject = { incoming: 'inbound', outgoing: 'outbound' }

/** Of the session, the earliest counts, of whichever leg, and not all events of a leg have a direction: so each has its key. */
function started({ call_leg_id, direction, from, to }: JsonObject, of: Of): ProviderEvent {
  const id = keyOf('telnyx', call_leg_id, direction)
  const known = DIRECTIONS[String(direction)] ?? direction
  return { ...of, type: 'call.started', id, provider: 'telnyx', direction: known, from, to }
}

const status = (status: string, fields: JsonObject, of: Of): Translation => ({
  events: [{ ...of, type: 'call.status', status, meta: metaOf(fields) }],
})

const metaOf = (fields: JsonObject) => without(fields, 'from', 'to', 'direction')

/** A cause that nobody knows is no failure: `unspecified`. [sdk: CallHangup's hangup_cause] */
const END_STATUSES: Record<string, string> = {
  normal_clearing: 'completed',
  time_limit: 'completed',
  user_busy: 'busy',
  call_rejected: 'busy',
  timeout: 'no-answer',
  no_answer: 'no-answer',
  originator_cancel: 'canceled',
  not_found: 'failed',
}

/** Why a leg ends that nobody has answered. */
const UNANSWERED = new Set(['busy', 'no-answer', 'canceled', 'failed'])

function hangup(fields: JsonObject, of: Of): Translation {
  const reason = textOf(fields.hangup_cause)
  const status = END_STATUSES[reason ?? '']
  const said: ProviderEvent = { ...of, type: 'call.data', meta: metaOf(fields) }
  const ended: ProviderEvent[] = [
    { ...of, type: 'call.status', status },
    { ...of, type: 'call.ended', reason },
  ]
  if (status !== undefined && UNANSWERED.has(status)) return { events: [said], unlessAnswered: ended }
  return { events: [said, ...ended] }
}

/** Of the leg, inbound is what its other end says; it is all that is transcribed unless both tracks are asked for. */
function transcription(fields: JsonObject, of: Of): Translation {
  const { transcript, confidence, is_final, transcription_track: track, ...rest } = objectOf(fields.transcription_data)
  const text = textOf(transcript)
  if (is_final === false || text === undefined) return IGNORED
  const speaker = track === 'outbound' ? 'agent' : 'customer'
  const meta = { ...without(metaOf(fields), 'transcription_data'), ...rest, transcription_track: track }
  return { events: [{ ...of, type: 'turn', speaker, text, confidence, meta }] }
}

/** Public URLs stay; the others are signed for ten minutes. */
function recording(fields: JsonObject, of: Of): Translation {
  const urls = { ...objectOf(fields.recording_urls), ...objectOf(fields.public_recording_urls) }
  const recording_url = textOf(urls.mp3) ?? textOf(urls.wav)
  return { events: [{ ...of, type: 'call.status', recording_url, meta: metaOf(fields) }] }
}

/** DTMF, machine detection, streaming, bridging, and whatever is added. */
const other: Translate = (fields, of, event_type) => ({
  events: [{ ...of, type: 'call.data', meta: { event_type, ...metaOf(fields) } }],
})
