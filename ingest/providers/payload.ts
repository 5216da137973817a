/** Reading payloads whose values may be of any type: forms have strings only, and pages disagree. */
import { createHash } from 'node:crypto'
import { Refusal } from '../../shared/events.js'
import { isObject, type JsonObject } from '../../shared/json.js'

/** A string that says something; numbers as they are written. */
export function textOf(value: unknown): string | undefined {
  if (typeof value === 'number') return String(value)
  return typeof value === 'string' && value.trim() !== '' && value !== 'null' ? value : undefined
}

/** The same, or else nothing: for looking things up. (String() throws for {"toString": 1}.) */
export const wordOf = (value: unknown): string => (typeof value === 'boolean' ? String(value) : (textOf(value) ?? ''))

export function numberOf(value: unknown): number | undefined {
  const text = textOf(value)
  const number = text === undefined ? Number.NaN : Number(text)
  return Number.isFinite(number) ? number : undefined
}

/** Seconds, since the epoch or since something else, as whole ms. */
export function msOf(seconds: unknown): number | undefined {
  const number = numberOf(seconds)
  return number === undefined ? undefined : Math.round(number * 1000)
}

/** An object, or none: an empty one. */
export function objectOf(value: unknown): JsonObject {
  return isObject(value) ? value : {}
}

export function arrayOf(value: unknown): unknown[] {
  return Array.isArray(value) ? value : []
}

/** What JSON text in a form's field holds; undefined when it is none. */
export function jsonOf(value: unknown): unknown {
  if (typeof value !== 'string') return value
  try {
    return JSON.parse(value)
  } catch {
    return undefined
  }
}

/** All but these fields: what goes into `meta`. */
export function without(payload: JsonObject, ...names: string[]): JsonObject {
  return Object.fromEntries(Object.entries(payload).filter(([name]) => !names.includes(name)))
}

const MAX_KEY_CHARS = 128

/** An idempotency key of parts that a provider's retries repeat. */
export function keyOf(...parts: unknown[]): string {
  const key = parts.map((part) => (isPlain(part) ? String(part) : contentKey({ part }))).join('-')
  return key.length <= MAX_KEY_CHARS && key.isWellFormed() && !key.includes('\0') ? key : digestOf(key)
}

/** The key of what has no identity of its own: a retry is the same payload, in whatever order its fields are. */
export function contentKey(payload: JsonObject): string {
  return digestOf(JSON.stringify(canonical(payload, MAX_KEY_DEPTH)))
}

/** What is nested deeper makes no difference: JSON.stringify, unlike JSON.parse, would run out of stack. */
const MAX_KEY_DEPTH = 64

function canonical(value: unknown, depth: number): unknown {
  if (typeof value !== 'object' || value === null) return value
  if (depth === 0) return null
  if (Array.isArray(value)) return value.map((each) => canonical(each, depth - 1))
  const sorted = Object.entries(value).sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0))
  return Object.fromEntries(sorted.map(([name, each]) => [name, canonical(each, depth - 1)]))
}

const isPlain = (value: unknown): boolean => typeof value !== 'object' || value === null

const digestOf = (text: string) => createHash('sha256').update(text).digest('base64url').slice(0, 32)

/** @param path the field that names the call */
export const missingCall = (path: string) =>
  new Refusal('missing_field', `${path} is required and wants the call's id`, path)
