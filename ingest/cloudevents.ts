/**
 * CloudEvents 1.0, JSON format: an envelope around our events. `type` says which one it is, `data` has its fields, and what the
 * envelope has besides goes to `meta`. https://github.com/cloudevents/spec, formats/json-format.md
 */
import { isUtf8 } from 'node:buffer'
import { createHash } from 'node:crypto'
import { EVENT_TYPES, parseTime } from '../shared/event-rules.js'
import { keepInMeta, type Parsed, parseEvent, parseJson, Refusal, show } from '../shared/events.js'
import { isObject, type JsonObject } from '../shared/json.js'

const MAX_CHARS = 128
const BASE64 = /^[A-Za-z0-9+/]*={0,2}$/
/** Attributes that have a place of their own in an event, or say how to read the envelope. */
const READ = new Set([
  'specversion',
  'id',
  'source',
  'type',
  'time',
  'subject',
  'datacontenttype',
  'data',
  'data_base64',
])

/** Judges one CloudEvent. @returns the event in it, or the Refusal that names the attribute, or the field of `data`, and what it wants */
export function parseCloudEvent(given: unknown): Parsed | Refusal {
  if (!isObject(given)) {
    return new Refusal('not_an_object', `a CloudEvent is a JSON object, got ${show(given)}`)
  }
  // To the specification, null is "not there".
  const envelope: JsonObject = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== null))
  const data = wrongAttribute(envelope) ?? dataOf(envelope)
  if (data instanceof Refusal) return data
  const event = eventOf(envelope as JsonObject & Attributes, data)
  return event instanceof Refusal ? event : parseEvent(event)
}

interface Attributes {
  id: string
  source: string
  type: string
}

function wrongAttribute(envelope: JsonObject): Refusal | undefined {
  for (const name of ['specversion', 'id', 'source', 'type']) {
    const value = envelope[name]
    const wants = name === 'specversion' ? '"1.0"' : 'a string that is not empty'
    if (value === undefined) return new Refusal('missing_field', `${name} is required and wants ${wants}`, name)
    const isRight = name === 'specversion' ? value === '1.0' : typeof value === 'string' && value !== ''
    if (!isRight) return wrong(name, wants, value)
  }
  const { time, datacontenttype } = envelope
  if (time !== undefined && parseTime(time) === undefined) return wrong('time', 'an RFC 3339 time with its zone', time)
  if (datacontenttype === undefined || isJson(datacontenttype)) return undefined
  return wrong('datacontenttype', 'application/json, or none', datacontenttype)
}

const wrong = (name: string, wants: string, value: unknown) =>
  new Refusal('invalid_field', `${name} wants ${wants}; got ${show(value)}`, name)

function isJson(mediaType: unknown): boolean {
  return typeof mediaType === 'string' && /^[^/;\s]+\/([^/;\s]+\+)?json\s*(;|$)/i.test(mediaType)
}

function dataOf({ data, data_base64 }: JsonObject): JsonObject | Refusal {
  let object = data
  if (data_base64 !== undefined) {
    if (data !== undefined)
      return new Refusal('invalid_field', 'data and data_base64 exclude each other', 'data_base64')
    object = decode(data_base64)
    if (object === undefined) return wrong('data_base64', 'JSON in base64', data_base64)
  }
  if (object === undefined || object === null) return {} // an event whose fields are all optional, with its call as subject
  return isObject(object)
    ? object
    : wrong(data === undefined ? 'data_base64' : 'data', "a JSON object: the event's fields", object)
}

/** @returns undefined when it is no JSON in base64 */
function decode(base64: unknown): unknown {
  if (typeof base64 !== 'string' || !BASE64.test(base64)) return undefined
  const bytes = Buffer.from(base64, 'base64')
  const parsed = isUtf8(bytes) ? parseJson(bytes.toString('utf8')) : undefined
  return parsed instanceof Refusal ? undefined : parsed
}

function eventOf(envelope: JsonObject & Attributes, data: JsonObject): JsonObject | Refusal {
  const { id, source, subject, time } = envelope
  const { id: ownId, source: ownSource, type: ownType, call_sid, ts, ...fields } = data
  const type = typeNamed(envelope.type) ?? (EVENT_TYPES.includes(ownType as string) ? (ownType as string) : undefined)
  if (!type) {
    const wants = `${EVENT_TYPES.join(', ')}, alone or behind a prefix and a dot (com.example.turn), or such a data.type`
    return new Refusal('unknown_type', `type wants one of ${wants}; got ${show(envelope.type)}`, 'type')
  }
  const callSid = call_sid ?? subject
  if (callSid === undefined) {
    return new Refusal(
      'missing_field',
      'call_sid is required: data.call_sid, or else subject, wants the call',
      'call_sid',
    )
  }
  const event: JsonObject = { type, call_sid: callSid, id: keyOf(source, id), ts: ts ?? time ?? null, ...fields }
  const extensions = Object.entries(envelope).filter(([name]) => !READ.has(name))
  const besides: [string, unknown][] = [
    ...extensions,
    ['type', envelope.type === type ? undefined : envelope.type],
    ['type', ownType === type ? undefined : ownType],
    ['source', source.length > MAX_CHARS ? source : undefined],
    ['source', ownSource],
    ['id', ownId],
    ['subject', subject === callSid ? undefined : subject],
    ['time', ts === undefined || ts === null ? undefined : time],
  ]
  if (source.length <= MAX_CHARS) event.source = source
  return withMeta(
    event,
    besides.filter(([, value]) => value !== undefined && value !== null),
  )
}

/** The one of ours that a type ends with: `io.example.call.ended`. */
function typeNamed(type: string): string | undefined {
  return EVENT_TYPES.find((ours) => type === ours || type.endsWith(`.${ours}`))
}

/** `source` and `id` together are the identity of a CloudEvent. As JSON, for two pairs must never be written as the same key. */
function keyOf(source: string, id: string): string {
  const pair = JSON.stringify([source, id])
  return pair.length <= MAX_CHARS ? pair : `sha256:${createHash('sha256').update(pair).digest('base64url')}`
}

/** @param event whose `meta`, if it is no object, is for parseEvent to refuse */
function withMeta(event: JsonObject, besides: [string, unknown][]): JsonObject | Refusal {
  const given = event.meta ?? {}
  if (besides.length === 0 || !isObject(given)) return event
  const meta = { ...given }
  for (const [name, value] of besides) {
    if (!keepInMeta(meta, name, value)) {
      return new Refusal('invalid_field', `${name} wants a name that meta does not have already`, name)
    }
  }
  return { ...event, meta }
}
