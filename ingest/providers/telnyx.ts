/** Telnyx Call Control: `{data: {event_type, id, occurred_at, payload}}`. [doc, sdk: telnyx's webhooks] */

import { createPublicKey, type KeyObject, verify as verifySignature } from 'node:crypto'
import { OperatorError } from '../../shared/config.js'
import type { JsonObject } from '../../shared/json.js'
import { callStarted } from './call-started.js'
import { contentKey, keyOf, missingCall, objectOf, textOf, without } from './payload.js'
import {
  type Common,
  type CreateProvider,
  IGNORED,
  type ProviderEvent,
  type ProviderRequest,
  type Translation,
} from './provider.js'
import { forbidden, notFresh } from './signature.js'

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
      // Sent again, it has its id again.
      const id = textOf(data.id) === undefined ? contentKey(data) : keyOf(data.id)
      const common = { call_sid: callSid, source: 'telnyx', id, ts: data.occurred_at }
      const translate = TRANSLATE.get(eventType) ?? other
      const { events, ...rest } = translate(fields, common, eventType)
      const [said, ...others] = events
      if (!said) return IGNORED
      const around = { ...without(payload, 'data'), ...without(data, 'payload', 'event_type', 'id', 'occurred_at') }
      const whole = { ...said, meta: { ...around, ...objectOf(said.meta) } }
      return { events: [started(fields, common), whole, ...others], ...rest }
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
  return notFresh('Telnyx-Timestamp', Number(timestamp) * 1000, receivedMs)
}

/**
 * The call is the session: a call that is transferred has several legs, and what was said belongs together. Nothing in a hangup
 * says which leg it was: so one that nobody has answered ends the call only if nobody had answered before.
 */
const IDENTITY = ['call_session_id', 'call_leg_id', 'call_control_id']

/** Other types, of messages and faxes, are of no call; what says nothing is. */
const OF_CALLS = /^call\.|^$/

type Translate = (fields: JsonObject, common: Common, eventType: string) => Translation

const TRANSLATE = new Map<string, Translate>([
  ['call.initiated', (fields, common) => status('initiated', fields, common)],
  ['call.answered', (fields, common) => status('in-progress', fields, common)],
  ['call.hangup', hangup],
  ['call.transcription', transcription],
  ['call.recording.saved', recording],
])

/** Of the session, the earliest counts, of whichever leg, and not all events of a leg have a direction: so each has its key. */
function started({ call_leg_id, direction, from, to }: JsonObject, common: Common): ProviderEvent {
  const id = keyOf('telnyx', call_leg_id, contentKey({ direction, from, to }))
  return callStarted(common, 'telnyx', { direction, from, to }, { id })
}

const status = (status: string, fields: JsonObject, common: Common): Translation => ({
  events: [{ ...common, type: 'call.status', status, meta: metaOf(fields) }],
})

const metaOf = (fields: JsonObject) => without(fields, 'from', 'to', 'direction')

/** A cause that nobody knows is no failure: `unspecified`. [sdk: CallHangup's hangup_cause] */
const STATUS_OF_CAUSE = new Map([
  ['normal_clearing', 'completed'],
  ['time_limit', 'completed'],
  ['user_busy', 'busy'],
  ['call_rejected', 'busy'],
  ['timeout', 'no-answer'],
  ['no_answer', 'no-answer'],
  ['originator_cancel', 'canceled'],
  ['not_found', 'failed'],
])

/** Why a leg ends that nobody has answered. */
const UNANSWERED = new Set(['busy', 'no-answer', 'canceled', 'failed'])

function hangup(fields: JsonObject, common: Common): Translation {
  const reason = textOf(fields.hangup_cause)
  const status = STATUS_OF_CAUSE.get(reason ?? '')
  const said: ProviderEvent = { ...common, type: 'call.data', meta: metaOf(fields) }
  const ended: ProviderEvent[] = [
    { ...common, type: 'call.status', status },
    { ...common, type: 'call.ended', reason },
  ]
  if (status !== undefined && UNANSWERED.has(status)) return { events: [said], unlessAnswered: ended }
  return { events: [said, ...ended] }
}

/** Of the leg, inbound is what its other end says; it is all that is transcribed unless both tracks are asked for. */
function transcription(fields: JsonObject, common: Common): Translation {
  const { transcript, confidence, is_final, transcription_track: track, ...rest } = objectOf(fields.transcription_data)
  const text = textOf(transcript)
  if (is_final === false || transcript === '') return IGNORED
  if (text === undefined) return other(fields, common, 'call.transcription')
  const speaker = track === 'outbound' ? 'agent' : 'customer'
  const meta = { ...without(metaOf(fields), 'transcription_data'), ...rest, transcription_track: track }
  if (is_final !== true) Object.assign(meta, { is_final })
  return { events: [{ ...common, type: 'turn', speaker, text, confidence, meta }] }
}

/** Public URLs stay; the others are signed for ten minutes. */
function recording(fields: JsonObject, common: Common): Translation {
  const urls = { ...objectOf(fields.recording_urls), ...objectOf(fields.public_recording_urls) }
  const recording_url = textOf(urls.mp3) ?? textOf(urls.wav)
  return { events: [{ ...common, type: 'call.status', recording_url, meta: metaOf(fields) }] }
}

/** DTMF, machine detection, streaming, bridging, and whatever is added. */
const other: Translate = (fields, common, event_type) => ({
  events: [{ ...common, type: 'call.data', meta: { event_type, ...metaOf(fields) } }],
})
