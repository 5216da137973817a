/**
 * The rules of the events' fields: what each type has, what a value may be, and how it is normalised.
 *
 * A table of rules instead of a schema library: one pass over the event's own keys checks, normalises and finds the unknown
 * ones, for what a zod schema costs that only checks (measured on a 280-byte turn: 0.5 µs each).
 */
import { isDeeperThan, isObject } from './json.js'

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

export const MAX_TEXT_BYTES = 64 * 1024
/** The last moment that a time may name, epoch ms. */
export const LATEST_MS = Date.UTC(9999, 11, 31, 23, 59, 59, 999)
const MAX_INT4 = 2_147_483_647

/** What a rule's check gives for a value that it does not take. */
export const WRONG = Symbol('wrong')

export interface FieldRule {
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
export const isCallSid = (text: string) => CALL_SID.test(text)
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
export const MAX_DEPTH = 64

const object: FieldRule = {
  wants: `a JSON object nested at most ${MAX_DEPTH} deep`,
  check: (v) => (isObject(v) && !isDeeperThan(v, MAX_DEPTH) ? v : WRONG),
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

export interface TypeRules {
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

export const PUBLIC_TYPES = new Map<string, TypeRules>([
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
/** Those, and what ingest writes itself. */
export const ALL_TYPES = new Map<string, TypeRules>([
  ...PUBLIC_TYPES,
  ['call.connected', rules(connectionFields)],
  ['call.disconnected', rules(connectionFields)],
])
