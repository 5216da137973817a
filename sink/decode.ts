/** decode: stream entries into rows. What cannot be decoded becomes a quarantine row; it never stops its neighbours. */
import { crashPoint } from '../shared/crash.js'
import { LATEST_MS } from '../shared/event-rules.js'
import {
  type CallEvent,
  idempotencyKey,
  isPresumedEnd,
  OWN_SOURCE,
  parseEvent,
  parseJson,
  Refusal,
  resumes,
  type Turn,
} from '../shared/events.js'
import { EVENT_FIELD, streamKey } from '../shared/keys.js'
import type { Lease } from './lease.js'
import { givenBack, type Settlement } from './settle.js'

/** As XREAD gives it: the id, and field, value, field, value … */
export type Entry = [id: string, fields: string[]]

export interface TurnRow {
  turnId: string
  turn: Turn
  streamId: string
  /** JSON for jsonb. */
  meta: string | null
}

/** Where turn rows go: an array, or the encoder of copy.ts. */
export interface TurnRows {
  readonly length: number
  push(row: TurnRow): void
}

export interface EventRow {
  callSid: string
  eventId: string
  type: string
  occurredMs: number
  /** JSON for jsonb. */
  event: string
  streamId: string
}

export interface QuarantineRow {
  streamKey: string
  entryId: string
  reason: string
  raw: string
}

/** A call whose row in call_sessions is to be written. */
export interface CallRow {
  callSid: string
  /** Its earliest event in the batch, epoch ms. */
  firstMs: number
  /** Its latest event in the batch that somebody sent, epoch ms; null when calltape itself presumed the call over. */
  lastMs: number | null
  /** For the metrics: whether the call has ended is for the fold to say. */
  finalize: boolean
  /** For the metrics: nobody but calltape says that it is over. */
  presumed?: true
  /** It is not the call's first batch: others may be writing the call's row, too. */
  begun?: true
  /** It has turns only: they move the last_event_at of a live call's row, and nothing else. */
  turnsOnly?: true
}

/** What one transaction stores. */
export interface Batch<Rows extends TurnRows = TurnRows> {
  turns: Rows
  events: EventRow[]
  calls: CallRow[]
  quarantine: QuarantineRow[]
  /** Some of it may be in PostgreSQL already. */
  redelivered: boolean
  settlements: Settlement[]
  /** When its oldest entry arrived, epoch ms. */
  oldestMs: number
  /** Ids in quarantined_events of entries that are stored with it: they leave the quarantine in the same transaction. */
  release?: string[]
  /** What came after it may be in PostgreSQL already: where a row there has the key of one in the batch, the earlier one stays. */
  belated?: true
  /** Asked right before COMMIT; if it rejects, nothing of the batch is stored. */
  confirm?: () => Promise<void>
}

export function emptyBatch<Rows extends TurnRows>(turns: Rows): Batch<Rows> {
  return { turns, events: [], calls: [], quarantine: [], redelivered: false, settlements: [], oldestMs: Infinity }
}

/** While a call is live its row's last_event_at may be this old: writing it for every turn would double the work. */
const LAST_EVENT_GRAIN_MS = 10_000

/** Adds one leased call and its entries to the batch. */
export function decodeCall(lease: Lease, entries: Entry[], batch: Batch): void {
  const last = entries.at(-1)?.[0]
  if (last === undefined) {
    batch.settlements.push(givenBack(lease))
    return
  }
  const eventsBefore = batch.events.length
  let ended = lease.finalized
  let presumed = false
  let firstMs = Infinity
  let lastMs: number | null = null
  for (const entry of entries) {
    const event = decodeEntry(lease, entry, batch)
    if (!event) continue
    const ms = event.ts ?? entryMs(entry[0])
    if (ms < firstMs) firstMs = ms
    if (event.source !== OWN_SOURCE && (lastMs === null || ms > lastMs)) lastMs = ms
    if (isPresumedEnd(event)) presumed = true
    else if (event.type === 'call.ended') ended = true
    else if (resumes(event)) presumed = false
  }
  const finalize = ended || presumed
  // Quarantined entries alone make a row, too: the turns behind them would not, for theirs is not the first batch.
  if (firstMs === Infinity) firstMs = entryMs(entries[0]![0])
  const moved = lease.cursor === '0-0' || grain(entryMs(lease.cursor)) !== grain(entryMs(last))
  if (finalize || moved || lease.presumed || batch.events.length > eventsBefore) {
    const row: CallRow = { callSid: lease.callSid, firstMs, lastMs, finalize }
    if (presumed && !ended) row.presumed = true
    if (lease.cursor !== '0-0') row.begun = true
    if (row.begun && !finalize && !lease.presumed && batch.events.length === eventsBefore) row.turnsOnly = true
    batch.calls.push(row)
  }
  if (lease.lapses > 0) batch.redelivered = true
  batch.oldestMs = Math.min(batch.oldestMs, entryMs(entries[0]![0]))
  const settlement: Settlement = { lease, last, count: entries.length, finalized: finalize }
  if (presumed && !ended) settlement.presumed = true
  batch.settlements.push(settlement)
}

function decodeEntry(lease: Lease, [id, fields]: Entry, batch: Batch): CallEvent | undefined {
  crashPoint('decode', fields[1])
  const event = parseEntry(lease.callSid, fields)
  if (event instanceof Refusal) {
    batch.quarantine.push(quarantineRow(lease, [id, fields], `${event.code}: ${event.message}`))
    return undefined
  }
  const key = idempotencyKey(event, id)
  if (event.type === 'turn') batch.turns.push(turnRow(event, key, id))
  else batch.events.push(eventRow(event, key, id))
  return event
}

export function quarantineRow(lease: Lease, [entryId, fields]: Entry, reason: string): QuarantineRow {
  return { streamKey: streamKey(lease), entryId, reason, raw: JSON.stringify(fields) }
}

function fieldOf(fields: string[], name: string): string | undefined {
  for (let i = 0; i < fields.length; i += 2) if (fields[i] === name) return fields[i + 1]
  return undefined
}

/** @returns the event that an entry's fields hold, or why they hold none */
export function parseEntry(callSid: string, fields: string[]): CallEvent | Refusal {
  const json = fieldOf(fields, EVENT_FIELD)
  if (json === undefined) return new Refusal('missing_field', `the entry has no field ${EVENT_FIELD}`)
  const given = parseJson(json)
  if (given instanceof Refusal) return given
  const parsed = parseEvent(given, callSid, true)
  return parsed instanceof Refusal ? parsed : parsed.event
}

function eventRow(event: Exclude<CallEvent, Turn>, eventId: string, streamId: string): EventRow {
  const { call_sid: callSid, type } = event
  let { json, replaced } = jsonb(event)
  if (replaced) json = jsonb({ ...event, meta: { ...event.meta, ...replacement(event) } }).json
  return { callSid, eventId, type, occurredMs: event.ts ?? entryMs(streamId), event: json, streamId }
}

function turnRow(turn: Turn, turnId: string, streamId: string): TurnRow {
  const meta = turn.meta === undefined ? undefined : jsonb(turn.meta)
  if (isStorable(turn.text) && isStorable(turn.speaker) && isStorable(turn.language ?? '') && !meta?.replaced) {
    return { turnId, turn, streamId, meta: meta?.json ?? null }
  }
  const { text, speaker, language } = turn
  const stored = { ...turn, text: storable(text), speaker: storable(speaker) }
  if (language !== undefined) stored.language = storable(language)
  const flagged = jsonb({ ...turn.meta, ...replacement({ text, speaker, language, meta: turn.meta }) })
  return { turnId, turn: stored, streamId, meta: flagged.json }
}

/**
 * What PostgreSQL's text and jsonb cannot hold is replaced by U+FFFD; `meta` says so, and keeps the original as JSON: there,
 * NUL and lone surrogates are \u escapes, plain characters.
 */
const replacement = (original: object) => ({ calltape_replaced: true, calltape_original: JSON.stringify(original) })
const isStorable = (s: string) => !s.includes('\0') && s.isWellFormed()
export const storable = (s: string) => s.toWellFormed().replaceAll('\0', '\uFFFD')

function jsonb(value: object): { json: string; replaced: boolean } {
  const json = JSON.stringify(value)
  // A backslash-u that is itself escaped is found, too: then nothing is replaced, only looked at.
  if (!json.includes('\\u')) return { json, replaced: false }
  const cleaned = JSON.stringify(cleanStrings(value))
  return { json: cleaned, replaced: cleaned !== json }
}

function cleanStrings(value: unknown): unknown {
  if (typeof value === 'string') return storable(value)
  if (Array.isArray(value)) return value.map(cleanStrings)
  if (typeof value !== 'object' || value === null) return value
  return Object.fromEntries(Object.entries(value).map(([name, inner]) => [storable(name), cleanStrings(inner)]))
}

const grain = (ms: number) => Math.floor(ms / LAST_EVENT_GRAIN_MS)

/** As PostgreSQL reads it. @param ms epoch ms, not beyond LATEST_MS */
export const iso = (ms: number) => new Date(ms).toISOString()

/** When an entry arrived in Redis, epoch ms: the first part of its id. (A foreign writer's may be beyond all calendars.) */
export function entryMs(id: string): number {
  return Math.min(Number.parseInt(id, 10), LATEST_MS)
}
