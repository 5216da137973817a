/** Jambonz: call status webhooks, and the transcription hooks of its verbs; POST (JSON). A dialled leg is a call of its own. */
import type { Config } from '../../shared/config.js'
import { END_STATUSES, Refusal } from '../../shared/events.js'
import { arrayOf, contentKey, keyOf, numberOf, objectOf, textOf, without } from './payload.js'
import {
  IGNORED,
  type JsonObject,
  type Provider,
  type ProviderEvent,
  type ProviderRequest,
  type ReadRequest,
  type Translation,
} from './provider.js'
import { forbidden, isFresh, isSigned, signatureParts } from './signature.js'

const TOLERANCE_MS = 5 * 60_000

/** [doc] Those that the contract has other words for. */
const STATUSES = new Map([
  ['trying', 'initiated'],
  ['early-media', 'ringing'],
])

export function createJambonz(config: Config): Provider {
  const secrets = config.JAMBONZ_SECRET
  return {
    name: 'jambonz',
    routes: [''],
    secretVariable: 'JAMBONZ_SECRET',
    ...(secrets.length > 0 && { verify: (request: ProviderRequest) => verify(request, secrets) }),
    toEvents: translate,
    // Verbs to go on with: none. A status webhook's answer is not read; for an application's call hook it is "nothing to do".
    answer: () => ({ status: '200 OK', contentType: 'application/json', body: '[]' }),
  }
}

/** [sdk] `t=<epoch seconds>,v1=<hex HMAC-SHA256 of "t.body">` */
function verify(request: ProviderRequest, secrets: string[]): Refusal | undefined {
  const { t = '', v1 = '' } = signatureParts(request.header('jambonz-signature'))
  if (!isSigned(v1, 'sha256', 'hex', secrets, `${t}.`, request.body)) {
    return forbidden('Jambonz-Signature is not that of this body and JAMBONZ_SECRET')
  }
  return isFresh(Number(t) * 1000, request.receivedMs, TOLERANCE_MS)
    ? undefined
    : forbidden('Jambonz-Signature is not of the last 5 minutes')
}

function translate(request: ReadRequest): Translation | Refusal {
  const { payload } = request
  const { call_sid, direction, from, to } = payload
  if (!textOf(call_sid)) return new Refusal('missing_field', 'call_sid wants the call', 'call_sid')
  const word = textOf(payload.call_status)
  const status = STATUSES.get(word ?? '') ?? word
  const common = { call_sid, source: 'jambonz' }
  const id = contentKey(payload) // no webhook has an id or a time
  const events: ProviderEvent[] = []
  if (textOf(from) && textOf(to)) {
    events.push({ ...common, type: 'call.started', id: 'jambonz', provider: 'jambonz', direction, from, to })
  }
  if (payload.speech !== undefined) {
    const { is_final } = objectOf(payload.speech)
    if (is_final === false) return IGNORED
    if (status) events.push({ ...common, type: 'call.status', id: word, status })
    return { events: [...events, spoken(request, common)] }
  }
  const known = ['call_sid', 'direction', 'from', 'to', 'duration', ...(word === status ? ['call_status'] : [])]
  const meta = without(payload, ...known)
  // Without a status it is another kind of hook: its fields are kept all the same.
  events.push({ ...common, type: status ? 'call.status' : 'call.data', id, ...(status && { status }), meta })
  if (END_STATUSES.has(status ?? '')) {
    const reason = (status === 'completed' ? undefined : textOf(payload.sip_reason)) ?? word
    events.push({ ...common, type: 'call.ended', id, reason, duration_seconds: numberOf(payload.duration) })
  }
  return { events }
}

/** [doc] verb hooks: `speech{is_final, language_code, alternatives[{transcript, confidence}]}`, in older versions in `transcripts[]`. */
function spoken({ payload, header }: ReadRequest, common: JsonObject & { call_sid: unknown }): ProviderEvent {
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
