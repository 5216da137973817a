/**
 * Exotel: StatusCallback, the Passthru applet, and the stream of the Voicebot and Stream applets (exotel-stream.ts).
 *
 * It signs nothing: what comes is trusted for a secret in the URL, as the last part of the path or as Basic credentials.
 */
import { DateTime } from 'luxon'
import { END_STATUSES, Refusal } from '../../shared/events.js'
import type { JsonObject } from '../../shared/json.js'
import { basicCredentials, secretCheck } from '../auth.js'
import { ExotelStream, startOf } from './exotel-stream.js'
import { Fields } from './fields.js'
import { contentKey, jsonOf, missingCall, numberOf, objectOf, textOf } from './payload.js'
import type { Common, CreateProvider, ProviderEvent, ProviderRequest, Translation } from './provider.js'
import { forbidden } from './signature.js'

export const createExotel: CreateProvider = ({ EXOTEL_SECRET: secrets, EXOTEL_TIME_ZONE: zone }) => ({
  name: 'exotel',
  routes: ['status', 'passthru'],
  takesPathSecret: true,
  secretVariable: 'EXOTEL_SECRET',
  isSecretInHead: true,
  ...(secrets.length > 0 && { verify: verifier(secrets) }),
  toEvents: ({ route, payload, receivedMs }) => {
    const fields = new Fields(payload)
    const call_sid = fields.take(textOf, 'callsid')
    if (call_sid === undefined) return missingCall('CallSid')
    const common = { call_sid, id: contentKey(payload), source: 'exotel' }
    const time = (value: unknown) => readTime(value, zone, receivedMs)
    const started = startOf(fields, common, time)
    return route === 'status'
      ? ofStatus(fields, common, started, time)
      : ofPassthru(fields, common, started, time, secrets)
  },
  openStream: () => new ExotelStream(),
})

type ReadTime = (value: unknown) => number | undefined

/**
 * @param secrets each the last part of the path, or the password of whatever user; `user:password` wants that user
 * @returns `unauthorized` where other credentials may help, `forbidden` where only another URL does
 */
function verifier(secrets: string[]) {
  const isSecret = secretCheck(secrets)
  return ({ pathSecret, header }: ProviderRequest): Refusal | undefined => {
    const basic = basicCredentials(header('authorization'))
    if (basic && (isSecret(basic.password) || isSecret(`${basic.user}:${basic.password}`))) return undefined
    if (pathSecret) return isSecret(pathSecret) ? undefined : forbidden('the path ends with none of EXOTEL_SECRET')
    return new Refusal(
      'unauthorized',
      'one of EXOTEL_SECRET is wanted: as the password of Basic credentials, or as the last part of the path',
    )
  }
}

/**
 * [doc] StatusCallback: as a form or JSON, with CallSid, DateUpdated, Status, RecordingUrl alone, or with all of the call. [code]
 * `answered` comes with Status=in-progress, `Duration` from older senders.
 */
function ofStatus(fields: Fields, common: Common, started: ProviderEvent, time: ReadTime): Translation {
  const eventType = fields.peek(textOf, 'eventtype')?.toLowerCase()
  const status = fields.take(textOf, 'status') ?? (eventType === 'answered' ? 'in-progress' : undefined)
  const isEnd = eventType === 'terminal' || END_STATUSES.has(status?.toLowerCase().replaceAll('_', '-') ?? '')
  const ending = {
    duration_seconds: fields.take(numberOf, 'conversationduration', 'duration'),
    recording_url: fields.take(textOf, 'recordingurl'),
    ts: fields.take(time, ...(isEnd ? ['endtime'] : []), 'dateupdated'),
  }
  const legs = fields.take(arrayIn, 'legs')
  const meta = { ...fields.rest, ...(legs && { Legs: legs }) }
  const events: ProviderEvent[] = [started, { ...common, type: 'call.status', ...ending, status, meta }]
  if (isEnd) events.push({ ...common, type: 'call.ended', ...ending, reason: status ?? 'terminal' })
  return { events }
}

/**
 * [doc] Passthru, a step of a call's flow: GET, or JSON by POST (EventType=stream-start).
 *
 * None of it is the call's end, whatever CallType says: that tells how the applet before went, and there may be others behind
 * (`completed` and `incomplete` are a dialled agent's leg, `voicemail` lasts on). Were `client-hangup` an end status, it would
 * overrule the one that StatusCallback brings later. Nor is DialCallDuration, that leg's, the duration of the call.
 */
function ofPassthru(
  fields: Fields,
  common: Common,
  started: ProviderEvent,
  time: ReadTime,
  secrets: string[],
): Translation {
  const ts = fields.take(time, 'currenttime')
  const digits = fields.take(digitsIn, 'digits')
  const stream = fields.take(objectIn, 'stream')
  const recording_url =
    fields.take(textOf, 'recordingurl') ?? (stream && new Fields(stream).peek(textOf, 'recordingurl'))
  const rest = withoutCredentials(fields.rest, secrets)
  const meta = { ...rest, ...(stream && { Stream: withoutCredentials(stream, secrets) }) }
  const data = digits === undefined ? undefined : { digits }
  const events: ProviderEvent[] = [started, { ...common, type: 'call.data', ts, data, meta }]
  if (recording_url) events.push({ ...common, type: 'call.status', ts, recording_url })
  return { events }
}

/** [doc] Wrapped in double quotes. */
const digitsIn = (value: unknown) => textOf(textOf(value)?.replaceAll('"', '').trim())

/** Nested by the form's names, or JSON text. */
const objectIn = (value: unknown): JsonObject | undefined => {
  const object = objectOf(jsonOf(value))
  return Object.keys(object).length > 0 ? object : undefined
}
const arrayIn = (value: unknown): unknown[] | undefined => {
  const array = jsonOf(value)
  return Array.isArray(array) ? array : undefined
}

/** StreamUrl is the URL of our own WebSocket as it was configured, with what opens it. */
function withoutCredentials(payload: JsonObject, secrets: string[]): JsonObject {
  const hidden = (url: string) =>
    secrets
      .flatMap((secret) => [secret, encodeURIComponent(secret)])
      .reduce((text, secret) => text.replaceAll(secret, '***'), url.replace(/\/\/[^/]*@/, '//***@'))
  return Object.fromEntries(
    Object.entries(payload).map(([name, value]) =>
      /^stream_?url$/i.test(name) && typeof value === 'string' ? [name, hidden(value)] : [name, value],
    ),
  )
}

/** Unverified which of them it sends where: with a zone, they say so themselves. */
const FORMATS: ((text: string, zone: string) => DateTime)[] = [
  (text, zone) => DateTime.fromSQL(text, { zone }),
  (text, zone) => DateTime.fromISO(text, { zone }),
  (text, zone) => DateTime.fromFormat(text, 'ccc, d LLL yyyy HH:mm:ss', { zone, locale: 'en' }),
  (text, zone) => DateTime.fromRFC2822(text, { zone }),
]

/** A longer one is none, and could keep the formats' patterns busy. */
const MAX_TIME_CHARS = 64

/**
 * [doc] `YYYY-MM-DD HH:mm:ss` without a zone. An hour that a clock passes twice is the one nearer to the receipt.
 *
 * @returns epoch ms; undefined for what is not a time
 */
function readTime(value: unknown, zone: string, receivedMs: number): number | undefined {
  const text = textOf(value)?.trim()
  if (text === undefined || text.length > MAX_TIME_CHARS || !/\d{4}\D.*\d:\d\d/.test(text)) return undefined
  for (const read of FORMATS) {
    const time = read(text, zone)
    if (!time.isValid) continue
    const candidates = time.getPossibleOffsets().map((each) => each.toMillis())
    return candidates.reduce((a, b) => (Math.abs(b - receivedMs) < Math.abs(a - receivedMs) ? b : a))
  }
  return undefined
}
