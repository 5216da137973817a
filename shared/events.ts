/**
 * The event contract: what a producer may send, judged and normalised in one pass.
 *
 * Ingest judges what arrives with `parseEvent`; the sink runs what it reads from a stream through the same function, so
 * an entry written by anybody else meets the same rules. Normalising is idempotent: parse(parse(x)) equals parse(x).
 *
 * A table of field rules instead of a schema library: one pass over the event's own keys checks, normalises and finds the
 * unknown ones, for what a zod schema costs that only checks (measured on a 280-byte turn: 0.5 µs each).
 */

export const CALL_STATUSES = [
  'queued',
  'initiated',
  'ringing',
  'in-progress',
  'completed',
  'busy',
  'failed',
  'no-answer',
  'canceled',
] as const
export type CallStatus = (typeof CALL_STATUSES)[number]

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

export const MAX_TEXT_BYTES = 64 * 1024
/** The last moment that a time may name, epoch ms. */
export const LATEST_MS = Date.UTC(9999, 11, 31, 23, 59, 59, 999)
const MAX_INT4 = 2_147_483_647

type JsonObject = Record<string, unknown>

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

/** Why one event was not taken. Returned, not thrown: a flood of bad events must not pay for stack traces. */
export class Refusal {
  constructor(
    readonly code: string,
    readonly message: string,
    /** The field at fault, absent when it is the whole event. */
    readonly path?: string | undefined,
  ) {}
}

const WRONG = Symbol('wrong')

interface FieldRule {
  /** Completes "wants …". */
  wants: string
  required?: true
  /** The normalised value, or WRONG. */
  check(value: unknown): unknown
  /** A value that fails is kept in `meta` instead of refusing the event. */
  lenient?: true
}

const lenient = (rule: FieldRule): FieldRule => ({ ...rule, lenient: true })

function string(maxChars: number, minChars = 0): FieldRule {
  const wants = `a string of ${minChars} to ${maxChars} characters`
  return { wants, check: (v) => (typeof v === 'string' && v.length >= minChars && v.length <= maxChars ? v : WRONG) }
}

function integer(max: number): FieldRule {
  const wants = `an integer from 0 to ${max}`
  return { wants, check: (v) => (Number.isInteger(v) && (v as number) >= 0 && (v as number) <= max ? v : WRONG) }
}

/** An idempotency key is stored as it is, so what PostgreSQL cannot hold is refused rather than replaced. */
const key: FieldRule = {
  wants: 'a string of 1 to 128 characters without NUL or lone surrogates',
  check: (v) =>
    typeof v === 'string' && v.length >= 1 && v.length <= 128 && !v.includes('\0') && v.isWellFormed() ? v : WRONG,
}

const CALL_SID = /^[A-Za-z0-9_.:@+-]{1,128}$/
const callSid: FieldRule = {
  wants: '1 to 128 characters of A-Z a-z 0-9 _ . : @ + -',
  required: true,
  check: (v) => (typeof v === 'string' && CALL_SID.test(v) ? v : WRONG),
}

const RFC3339 = /^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)$/
const time: FieldRule = {
  wants: 'epoch milliseconds or an RFC 3339 time with its zone, from 1970 to 9999',
  check(v) {
    const ms =
      typeof v === 'number' ? Math.round(v) : typeof v === 'string' && RFC3339.test(v) ? Date.parse(v) : Number.NaN
    return ms >= 0 && ms <= LATEST_MS ? ms : WRONG
  },
}

/** JSON nested deeper cannot be relied on to pass JSON.stringify and PostgreSQL's jsonb, which both recurse. */
const MAX_DEPTH = 64

function isDeeperThan(value: unknown, depth: number): boolean {
  if (typeof value !== 'object' || value === null) return false
  return depth === 0 || Object.values(value).some((inner) => isDeeperThan(inner, depth - 1))
}

const object: FieldRule = {
  wants: `a JSON object nested at most ${MAX_DEPTH} deep`,
  check: (v) => (typeof v === 'object' && v !== null && !Array.isArray(v) && !isDeeperThan(v, MAX_DEPTH) ? v : WRONG),
}

const SPEAKERS = new Map([
  ['ai', 'agent'],
  ['bot', 'agent'],
  ['assistant', 'agent'],
  ['agent', 'agent'],
  ['user', 'customer'],
  ['caller', 'customer'],
  ['human', 'customer'],
  ['customer', 'customer'],
  ['system', 'system'],
])
const speaker: FieldRule = {
  wants: 'a string of 1 to 128 characters',
  required: true,
  check(v) {
    if (typeof v !== 'string' || v.length < 1 || v.length > 128) return WRONG
    return SPEAKERS.get(v) ?? SPEAKERS.get(v.toLowerCase()) ?? v
  },
}

const text: FieldRule = {
  wants: `a string of at most ${MAX_TEXT_BYTES} bytes of UTF-8`,
  required: true,
  // A UTF-16 unit takes at most three bytes: only long texts need to be measured.
  check: (v) =>
    typeof v === 'string' && (v.length * 3 <= MAX_TEXT_BYTES || Buffer.byteLength(v) <= MAX_TEXT_BYTES) ? v : WRONG,
}

const status: FieldRule = {
  wants: `one of ${CALL_STATUSES.join(' ')}`,
  check(v) {
    if (typeof v !== 'string') return WRONG
    const known = v.toLowerCase().replaceAll('_', '-')
    return (CALL_STATUSES as readonly string[]).includes(known) ? known : WRONG
  },
}

const seconds: FieldRule = {
  wants: `a number of seconds from 0 to ${MAX_INT4}`,
  check: (v) => (typeof v === 'number' && v >= 0 && v <= MAX_INT4 ? Math.round(v) : WRONG),
}

const strings: FieldRule = {
  wants: 'an array of strings',
  check: (v) => (Array.isArray(v) && v.every((s) => typeof s === 'string') ? v : WRONG),
}

const direction: FieldRule = {
  wants: 'inbound or outbound',
  check: (v) => (v === 'inbound' || v === 'outbound' ? v : WRONG),
}

const type: FieldRule = { wants: 'a known type', check: (v) => v }
const confidence: FieldRule = {
  wants: 'a number from 0 to 1',
  check: (v) => (typeof v === 'number' && v >= 0 && v <= 1 ? v : WRONG),
}
const boolean: FieldRule = { wants: 'true or false', check: (v) => (typeof v === 'boolean' ? v : WRONG) }

const common = { type, call_sid: callSid, id: key, ts: time, source: string(128), meta: object }
const ending = { duration_seconds: seconds, recording_url: string(4096) }

interface TypeRules {
  fields: Map<string, FieldRule>
  required: string[]
}

function rules(fields: Record<string, FieldRule>): TypeRules {
  const all = new Map(Object.entries({ ...common, ...fields }))
  return { fields: all, required: [...all].filter(([, rule]) => rule.required).map(([name]) => name) }
}

/** @returns epoch milliseconds of an RFC 3339 time with its zone; undefined when it is none */
export function parseTime(given: unknown): number | undefined {
  const ms = typeof given === 'string' ? time.check(given) : WRONG
  return ms === WRONG ? undefined : (ms as number)
}

const PUBLIC_TYPES = new Map<string, TypeRules>([
  [
    'turn',
    rules({
      seq: integer(MAX_INT4),
      speaker,
      text,
      confidence,
      language: string(64),
      started_at: time,
      ended_at: time,
      interrupted: boolean,
    }),
  ],
  ['call.started', rules({ direction: lenient(direction), from: string(512), to: string(512), provider: string(128) })],
  ['call.status', rules({ status: lenient(status), ...ending })],
  ['call.data', rules({ data: object, stage: string(128), objections: strings })],
  ['call.ended', rules({ reason: string(1024), outcome: string(128), turn_count: integer(MAX_INT4), ...ending })],
])
/** What `type` may be. */
export const EVENT_TYPES: readonly string[] = [...PUBLIC_TYPES.keys()]

const connectionFields = { connection: string(128), reason: string(1024) }
const ALL_TYPES = new Map<string, TypeRules>([
  ...PUBLIC_TYPES,
  ['call.connected', rules(connectionFields)],
  ['call.disconnected', rules(connectionFields)],
])

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
  if (typeof given !== 'object' || given === null || Array.isArray(given)) {
    return new Refusal('not_an_object', `an event is a JSON object, got ${show(given)}`)
  }
  const source = given as JsonObject
  const types = internal ? ALL_TYPES : PUBLIC_TYPES
  const typeRules = typeof source.type === 'string' ? types.get(source.type) : undefined
  if (!typeRules) {
    return new Refusal('unknown_type', `type wants one of ${EVENT_TYPES.join(', ')}; got ${show(source.type)}`, 'type')
  }
  const event: JsonObject = {}
  let extras: string[] | undefined
  let changed = false
  for (const name of Object.keys(source)) {
    const value = source[name]
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
  for (const name of typeRules.required) {
    if (event[name] === undefined) {
      return new Refusal('missing_field', `${name} is required and wants ${typeRules.fields.get(name)?.wants}`, name)
    }
  }
  if (extras) {
    changed = true
    const meta = { ...(event.meta as JsonObject | undefined) }
    for (const name of extras) {
      if (!keepInMeta(meta, name, source[name])) {
        return new Refusal('invalid_field', `${name} wants a name that meta does not have already`, name)
      }
    }
    event.meta = meta
  }
  return { event: event as unknown as CallEvent, changed }
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
