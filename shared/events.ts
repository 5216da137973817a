/**
 * The event contract: what a producer may send, judged and normalised in one pass.
 *
 * Ingest judges what arrives with `parseEvent`; the sink runs what it reads from a stream through the same function, so
 * an entry written by anybody else meets the same rules. Normalising is idempotent: parse(parse(x)) equals parse(x).
 */
import {
  ALL_TYPES,
  type CallStatus,
  EVENT_TYPES,
  MAX_DEPTH,
  PUBLIC_TYPES,
  type TypeRules,
  WRONG,
} from './event-rules.js'
import { isDeeperThan, isObject, type JsonObject } from './json.js'

/** The statuses after which a call does not go on; it never goes back from one of them. */
export const END_STATUSES: ReadonlySet<string> = new Set(['completed', 'busy', 'failed', 'no-answer', 'canceled'])

/** Marks the `call.ended` of a call that was presumed over: anybody else's word is better. */
export const OWN_SOURCE = 'calltape'

/**
 * Why a call is presumed over although nobody said so: it fell silent; its connection was lost; what its bot kept of it has expired.
 * It is live again when it goes on: with a turn, or a new connection.
 * (What follows an end status, or only adds to the call, such as its recording's URL, does not bring it back.)
 */
export const PRESUMED_REASONS: ReadonlySet<string> = new Set(['abandoned', 'disconnected', 'expired'])

/** Does this event bring back a call that was presumed over? */
export function resumes({ type }: CallEvent): boolean {
  return type === 'turn' || type === 'call.connected'
}

export function isPresumedEnd(event: CallEvent): boolean {
  return event.type === 'call.ended' && event.source === OWN_SOURCE && PRESUMED_REASONS.has(event.reason ?? '')
}

interface Common {
  call_sid: string
  id?: string
  /** When it happened, epoch milliseconds. Absent: when it was received. */
  ts?: number
  source?: string
  meta?: JsonObject
}

export interface Turn extends Common {
  type: 'turn'
  seq?: number
  speaker: string
  text: string
  confidence?: number
  language?: string
  /** Epoch milliseconds. */
  started_at?: number
  /** Epoch milliseconds. */
  ended_at?: number
  interrupted?: boolean
}

export interface CallStarted extends Common {
  type: 'call.started'
  direction?: 'inbound' | 'outbound'
  from?: string
  to?: string
  provider?: string
}

export interface CallStatusChanged extends Common {
  type: 'call.status'
  status?: CallStatus
  duration_seconds?: number
  recording_url?: string
}

export interface CallData extends Common {
  type: 'call.data'
  data?: JsonObject
  stage?: string
  objections?: string[]
}

export interface CallEnded extends Common {
  type: 'call.ended'
  reason?: string
  outcome?: string
  turn_count?: number
  duration_seconds?: number
  recording_url?: string
}

/** Written by ingest alone, when a connection bound to one call (`?call_sid=`) opens or closes. */
export interface ConnectionChanged extends Common {
  type: 'call.connected' | 'call.disconnected'
  /** Which connection: the end of an older one, found late, says nothing of the call. */
  connection?: string
  reason?: string
}

export type CallEvent = Turn | CallStarted | CallStatusChanged | CallData | CallEnded | ConnectionChanged

/** Why an event is refused, in a word: a closed set, for what is refused is counted by it. */
export const REFUSAL_CODES = [
  'call_sid_mismatch',
  'forbidden',
  'invalid_field',
  'invalid_form',
  'invalid_json',
  'invalid_utf8',
  'missing_field',
  'not_an_object',
  'not_stored',
  'not_text',
  'not_translated',
  'unauthorized',
  'unknown_type',
  'unsupported_media_type',
] as const

/** The others refuse a whole body or connection, and no event. */
export type RefusalCode = (typeof REFUSAL_CODES)[number] | 'not_an_array' | 'overloaded' | 'stopping'

/** Why one event was not taken. Returned, not thrown: a flood of bad events must not pay for stack traces. */
export class Refusal {
  constructor(
    readonly code: RefusalCode,
    readonly message: string,
    /** The field at fault, absent when it is the whole event. */
    readonly path?: string | undefined,
  ) {}
}

/** An event that was taken, and whether it differs from what was given (else the given JSON can be stored as it came). */
export interface Parsed {
  event: CallEvent
  changed: boolean
}

/** A value as an error message shows it: short, and never by stringifying what may be huge or deep. */
export function show(value: unknown): string {
  if (value === null) return 'null'
  if (Array.isArray(value)) return 'an array'
  if (typeof value === 'object') return 'an object'
  if (typeof value === 'string' && value.length > 60) return `a string of ${value.length} characters`
  return value === undefined ? 'nothing' : JSON.stringify(value)
}

/** Far more than anybody needs by accident; looking for a free name without an end could take minutes. */
const MAX_UNDERSCORES = 16

/**
 * Keeps an unknown field under its own name in `meta`, or, if `meta` has that name already, under it with `_`s behind.
 *
 * @returns false if none of these names is free
 */
export function keepInMeta(meta: JsonObject, name: string, value: unknown): boolean {
  let free = name
  while (Object.hasOwn(meta, free)) {
    if (free.length === name.length + MAX_UNDERSCORES) return false
    free += '_'
  }
  // defineProperty: a field called __proto__ is data, too.
  Object.defineProperty(meta, free, { value, enumerable: true, writable: true, configurable: true })
  return true
}

/**
 * Judges one event and normalises it.
 *
 * @param given what JSON.parse gave
 * @param bound the call a connection is bound to: the event's call_sid if it has none, and the only one it may have
 * @param internal true in the sink, which also reads the events that ingest writes itself
 * @returns the normalised event (`given` is not changed), or the Refusal that names the field and what it wants
 */
export function parseEvent(given: unknown, bound?: string, internal = false): Parsed | Refusal {
  if (!isObject(given)) return new Refusal('not_an_object', `an event is a JSON object, got ${show(given)}`)
  const types = internal ? ALL_TYPES : PUBLIC_TYPES
  const typeRules = typeof given.type === 'string' ? types.get(given.type) : undefined
  if (!typeRules) {
    return new Refusal('unknown_type', `type wants one of ${EVENT_TYPES.join(', ')}; got ${show(given.type)}`, 'type')
  }
  const event: JsonObject = {}
  let extras: string[] | undefined
  let changed = false
  for (const name of Object.keys(given)) {
    const value = given[name]
    const rule = typeRules.fields.get(name)
    if (value === null && rule) {
      changed = true // null is how many languages write "absent"
      continue
    }
    const checked = rule ? rule.check(value) : WRONG
    if (checked !== WRONG) {
      if (checked !== value) changed = true
      event[name] = checked
    } else if (rule && !rule.lenient) {
      return new Refusal('invalid_field', `${name} wants ${rule.wants}; got ${show(value)}`, name)
    } else if (isDeeperThan(value, MAX_DEPTH - 1)) {
      // One level less than an object may have: it goes into one.
      return new Refusal('invalid_field', `${name} wants to be nested at most ${MAX_DEPTH - 1} deep`, name)
    } else {
      extras ??= []
      extras.push(name)
    }
  }
  if (!internal && event.source === OWN_SOURCE) {
    return new Refusal('invalid_field', `source ${OWN_SOURCE} is calltape's own`, 'source')
  }
  if (bound !== undefined && event.call_sid !== bound) {
    if (event.call_sid !== undefined) {
      const message = `this connection is bound to call ${bound}; got ${show(event.call_sid)}`
      return new Refusal('call_sid_mismatch', message, 'call_sid')
    }
    event.call_sid = bound
    changed = true
  }
  const refusal = missingField(event, typeRules) ?? (extras && keepAllInMeta(event, extras, given))
  return refusal ?? { event: event as unknown as CallEvent, changed: changed || extras !== undefined }
}

function missingField(event: JsonObject, { required, fields }: TypeRules): Refusal | undefined {
  const name = required.find((each) => event[each] === undefined)
  if (name === undefined) return undefined
  return new Refusal('missing_field', `${name} is required and wants ${fields.get(name)?.wants}`, name)
}

function keepAllInMeta(event: JsonObject, names: string[], given: JsonObject): Refusal | undefined {
  const meta = { ...(event.meta as JsonObject | undefined) }
  for (const name of names) {
    if (!keepInMeta(meta, name, given[name])) {
      return new Refusal('invalid_field', `${name} wants a name that meta does not have already`, name)
    }
  }
  event.meta = meta
  return undefined
}

/** @returns what the text holds, or a Refusal: JSON.parse's own words say where it fails */
export function parseJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch (error) {
    return new Refusal('invalid_json', (error as Error).message)
  }
}

/** The key by which a turn or a call event is one and the same however often it arrives. */
export function idempotencyKey(event: CallEvent, entryId: string): string {
  // An end that has the id of a status by mistake must not pass for a second copy of it.
  if (event.id !== undefined) return event.type === 'turn' ? event.id : `${event.type} ${event.id}`
  return event.type === 'turn' && event.seq !== undefined ? String(event.seq) : entryId
}
