/** Jambonz: call status webhooks, and the transcription hooks of its verbs; POST (JSON). A dialled leg is a call of its own. */

import { END_STATUSES, type Refusal } from '../../shared/events.js'
import { callStarted } from './call-started.js'
import { arrayOf, contentKey, keyOf, missingCall, numberOf, objectOf, textOf, without } from './payload.js'
import {
  type Common,
  type CreateProvider,
  IGNORED,
  type ProviderEvent,
  type ProviderRequest,
  type ReadRequest,
  type Translation,
} from './provider.js'
import { forbidden, isSigned, notFresh, signatureParts } from './signature.js'

/** [doc] Those that the contract has other words for. */
const STATUSES = new Map([
  ['trying', 'initiated'],
  ['early-media', 'ringing'],
])

export const createJambonz: CreateProvider = ({ JAMBONZ_SECRET: secrets }) => ({
  name: 'jambonz',
  routes: [''],
  secretVariable: 'JAMBONZ_SECRET',
  ...(secrets.length > 0 && { verify: (request) => verify(request, secrets) }),
  toEvents: translate,
  // Verbs to go on with: none. A status webhook's answer is not read; for an application's call hook it is "nothing to do".
  answer: () => ({ status: '200 OK', contentType: 'application/json', body: '[]' }),
})

/** [sdk] `t=<epoch seconds>,v1=<hex HMAC-SHA256 of "t.body">` */
function verify(request: ProviderRequest, secrets: string[]): Refusal | undefined {
  const { t = '', v1 = '' } = signatureParts(request.header('jambonz-signature'))
  if (!isSigned(v1, 'sha256', 'hex', secrets, `${t}.`, request.body)) {
    return forbidden('Jambonz-Signature does not fit JAMBONZ_SECRET')
  }
  return notFresh('Jambonz-Signature', Number(t) * 1000, request.receivedMs)
}

function translate(request: ReadRequest): Translation | Refusal {
  const { payload } = request
  const { direction, from, to } = payload
  const call_sid = textOf(payload.call_sid)
  if (call_sid === undefined) return missingCall('call_sid')
  const word = textOf(payload.call_status)
  const status = STATUSES.get(word ?? '') ?? word
  const common = { call_sid, source: 'jambonz' }
  const id = contentKey(payload) // no webhook has an id or a time
  const events: ProviderEvent[] = []
  if (textOf(from) || textOf(to)) {
    events.push(callStarted(common, 'jambonz', { direction, from, to }))
  }
  if (payload.speech !== undefined) {
    const { is_final } = objectOf(payload.speech)
    if (is_final === false) return IGNORED
    if (status) events.push({ ...common, type: 'call.status', id: word, status })
    return { events: [...events, spoken(request, common)] }
  }
  const hasEnded = END_STATUSES.has(status ?? '')
  const known = ['call_sid', ...(events.length > 0 ? ['direction', 'from', 'to'] : [])]
  if (status !== undefined && word === status) known.push('call_status')
  if (hasEnded && numberOf(payload.duration) !== undefined) known.push('duration')
  const meta = without(payload, ...known)
  // Without a status it is another kind of hook: its fields are kept all the same.
  events.push({ ...common, type: status ? 'call.status' : 'call.data', id, ...(status && { status }), meta })
  if (hasEnded) {
    const reason = (status === 'completed' ? undefined : textOf(payload.sip_reason)) ?? word
    events.push({ ...common, type: 'call.ended', id, reason, duration_seconds: numberOf(payload.duration) })
  }
  return { events }
}

/** [doc] verb hooks: `speech{is_final, language_code, alternatives[{transcript, confidence}]}`, in older versions in `transcripts[]`. */
function spoken({ payload, header }: ReadRequest, common: Common): ProviderEvent {
  const speech = objectOf(payload.speech)
  const [older] = arrayOf(speech.transcripts).map(objectOf)
  const [best] = arrayOf(speech.alternatives ?? older?.alternatives).map(objectOf)
  const meta = without(payload, 'call_sid', 'direction', 'from', 'to', 'call_status')
  // Two equal sentences are equal payloads: only when they were signed tells them from one that is sent again.
  const { t } = signatureParts(header('jambonz-signature'))
  const id = t === undefined ? undefined : keyOf(contentKey(payload), t)
  const text = textOf(best?.transcript)
  if (!text) return { ...common, type: 'call.data', id, meta }
  return {
    ...common,
    type: 'turn',
    id,
    speaker: speech.channel_tag === 2 ? 'agent' : 'customer', // unverified: channel 2 is who was dialled
    text,
    confidence: numberOf(best?.confidence),
    language: textOf(speech.language_code ?? older?.language_code),
    meta,
  }
}
