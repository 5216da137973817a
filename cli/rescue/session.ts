/**
 * A session of the legacy voice bot, one JSON blob under one key, as the events of a call.
 *
 * The bot writes the blob back whole (GET, change, SET) without a lock, so an item of its transcript may vanish, come back,
 * or change its place. Therefore a turn's id is made of what the item says, never of where it stands: whatever states of
 * the blob are looked at, in whatever order, together they give each turn that was ever seen once.
 */
import { createHash } from 'node:crypto'
import { DateTime } from 'luxon'
import { LATEST_MS } from '../../shared/event-rules.js'
import {
  type CallData,
  type CallEnded,
  type CallStarted,
  OWN_SOURCE,
  parseEvent,
  Refusal,
  type Turn,
} from '../../shared/events.js'
import { isDeeperThan, isObject, type JsonObject } from '../../shared/json.js'
import { readBlob, TRANSCRIPT_FIELD } from './json.js'

/** Marks the events of rescue. */
export const SOURCE = 'rescue'
/** The telephony of the legacy bot; the blob does not name it. */
const PROVIDER = 'exotel'

const LEAD_FIELDS = ['lead_id', 'lead_name', 'lead_phone', 'property_type', 'location', 'budget', 'source']
/** Left out: the bot's working memory, changed with every frame of audio or turn, and worth nothing, or in the transcript, after it. */
const VOLATILE_FIELDS = [
  'audio_buffer',
  'silence_chunks',
  'last_voice_time',
  'customer_mid_sentence',
  'is_bot_speaking',
  'waiting_for_response',
  'should_stop_speaking',
  'last_agent_question',
  'last_agent_question_type',
]
/** These have a place of their own in the events, if they are what they should be. */
const PLACED_FIELDS = [
  'call_sid',
  TRANSCRIPT_FIELD,
  'collected_data',
  'conversation_stage',
  'objections_encountered',
  'session_start_time',
  'last_interaction_time',
]
const ELSEWHERE = new Set([...LEAD_FIELDS, ...VOLATILE_FIELDS, ...PLACED_FIELDS])

/** What is kept of a blob that cannot be read, and of one item that cannot. */
const MAX_UNREADABLE_CHARS = 64 * 1024
/** Items that cannot be read are kept up to so many characters together, beyond that only counted. */
const MAX_UNREADABLE_TURNS_CHARS = 256 * 1024
/** What is kept of a field that nobody knows: it may be audio under another name. */
const MAX_FIELD_CHARS = 16 * 1024
/** What is nested deeper is kept as text: an event may be nested 64 deep. */
const MAX_DEPTH = 32
const MAX_STAGE_CHARS = 128
/** Nobody knows what else was said: then a call without a customer's turn is not one that nobody took (fold.sql). */
const TRANSCRIPT_INCOMPLETE = { transcript_incomplete: true }
const CALL_SID = /^[A-Za-z0-9_.:@+-]{1,128}$/
const ID_CHARS = 22 // of base64url: 132 bits

export interface Session {
  callSid: string
  started: CallStarted
  /** In the transcript's order. */
  turns: Turn[]
  /** Undefined when there is nothing to say. */
  data: CallData | undefined
  isTruncated: boolean
  /** Why items of the transcript are no turns; never with what they say. */
  unreadable: string[]
  /** When the call was last heard of, epoch ms. */
  lastMs: number | undefined
}

export interface UnreadableSession {
  /** Never with what the blob says. */
  reason: string
  /** Keeps what there is; absent when nobody knows whose it is. */
  data?: CallData
}

/** @returns what a key has behind the last `:` (or `/`) of the pattern's plain beginning, however that narrows it further */
export function callSidInKey(key: string, pattern: string): string {
  const [beginning = ''] = /^[^*?[\\]*/.exec(pattern) ?? []
  return key.slice(/^.*[:/]/s.exec(beginning)?.[0].length ?? beginning.length)
}

/**
 * @param named what the key says is the call_sid. The bot finds its sessions by it, so it stands against what the blob says;
 *   if it cannot be one, the blob's counts
 */
export function readSession(named: string, text: string): Session | UnreadableSession {
  const blob = readBlob(text)
  if (typeof blob === 'string') return unreadable(named, `the value is ${blob}`, text)
  const { fields, isTruncated } = blob
  const callSid = [named, fields.call_sid].find((sid) => typeof sid === 'string' && CALL_SID.test(sid)) as
    | string
    | undefined
  if (callSid === undefined) return { reason: 'neither the key nor the value has a call_sid' }

  const startMs = readTime(fields.session_start_time)
  const transcript = readTranscript(callSid, fields[TRANSCRIPT_FIELD], startMs)
  const { turns } = transcript
  const turnTimes = turns.flatMap(({ ts }) => (ts === undefined ? [] : [ts]))
  const interactionMs = readTime(fields.last_interaction_time)
  const lastMs = latest([interactionMs, ...turnTimes]) ?? startMs
  return {
    callSid,
    started: callStarted(callSid, fields, startMs ?? turnTimes[0] ?? interactionMs),
    turns,
    data: callData(callSid, fields, transcript, isTruncated, interactionMs ?? lastMs),
    isTruncated,
    unreadable: transcript.unreadable,
    lastMs,
  }
}

/** Of a call that went silent or whose key is gone. @param turnIds all that are known of it: one end for each such state */
export function presumedEnd(callSid: string, turnIds: string[]): CallEnded {
  const id = `rescue-end-${digest(turnIds.toSorted())}`
  return { type: 'call.ended', call_sid: callSid, id, source: OWN_SOURCE, reason: 'expired' }
}

/** The same for two events that say the same, whenever they do. */
export const contentOf = ({ data, stage, objections, meta }: CallData) => digest([data, stage, objections, meta])

function unreadable(named: string, reason: string, text: string): UnreadableSession {
  if (!CALL_SID.test(named)) return { reason }
  const meta = {
    unreadable_session: cut(text, MAX_UNREADABLE_CHARS),
    unreadable_reason: reason,
    ...TRANSCRIPT_INCOMPLETE,
  }
  const id = `rescue-${digest(meta)}`
  return { reason, data: { type: 'call.data', call_sid: named, id, source: SOURCE, meta } }
}

interface Transcript {
  turns: Turn[]
  unreadable: string[]
  /** The unreadable items, for `meta`. */
  kept: unknown[]
}

function readTranscript(callSid: string, given: unknown, startMs: number | undefined): Transcript {
  const read: Transcript = { turns: [], unreadable: [], kept: [] }
  let keptChars = 0
  const refuse = (item: unknown, reason: string) => {
    read.unreadable.push(reason)
    const json = cut(toJson(item), MAX_UNREADABLE_CHARS)
    keptChars += json.length
    if (keptChars <= MAX_UNREADABLE_TURNS_CHARS) read.kept.push({ reason, item: json })
  }
  if (given === undefined || given === null) return read
  if (!Array.isArray(given)) {
    refuse(given, `${TRANSCRIPT_FIELD} is no array`)
    return read
  }
  const times = new Map<string, number>()
  let previousMs = startMs
  for (const item of given as unknown[]) {
    const turn = isObject(item) ? readTurn(callSid, item, previousMs) : 'it is no object'
    if (typeof turn === 'string') {
      refuse(item, turn)
      continue
    }
    // Two that say the same are two turns: the n-th of them is the n-th.
    const nth = times.get(turn.id!) ?? 0
    times.set(turn.id!, nth + 1)
    read.turns.push({ ...turn, id: `${turn.id}-${nth}` })
    previousMs = turn.ts
  }
  return read
}

/** @returns why it is none: by the name of the field at fault */
function readTurn(callSid: string, item: JsonObject, previousMs: number | undefined): Turn | string {
  const { speaker, text, timestamp, ...others } = item
  const ms = readTime(timestamp)
  const isLost = ms === undefined && timestamp !== undefined && timestamp !== null
  const meta = metaOf(Object.entries(isLost ? { ...others, timestamp } : others))
  // Without a time of its own a turn stands where the transcript has it: by its place in the stream, behind the one before.
  const ts = ms ?? previousMs
  const time = ts === undefined ? {} : { ts }
  const parsed = parseEvent({ type: 'turn', call_sid: callSid, source: SOURCE, speaker, text, ...time, ...meta })
  if (parsed instanceof Refusal) return `${parsed.path} is missing or not what it should be`
  const turn = parsed.event as Turn
  return { ...turn, id: `rescue-${digest([turn.speaker, timestamp ?? null, turn.text])}` }
}

function callStarted(callSid: string, fields: JsonObject, ts: number | undefined): CallStarted {
  const said = LEAD_FIELDS.map((name): [string, unknown] => [name, fields[name]])
  const time = ts === undefined ? {} : { ts }
  const content = { provider: PROVIDER, ...time, ...metaOf(said) }
  // Not one id for all: a blob that breaks off before its lead's fields must not keep the whole one's away.
  return { type: 'call.started', call_sid: callSid, id: `rescue-${digest(content)}`, source: SOURCE, ...content }
}

function callData(
  callSid: string,
  fields: JsonObject,
  { kept, unreadable }: Transcript,
  isTruncated: boolean,
  ts: number | undefined,
): CallData | undefined {
  const { collected_data: collected, conversation_stage: stage, objections_encountered: objections } = fields
  const others = Object.entries(fields).filter(([name]) => !ELSEWHERE.has(name))
  const isStage = typeof stage === 'string' && stage.length <= MAX_STAGE_CHARS
  const given = Array.isArray(objections) ? objections : []
  const strings = given.filter((objection) => typeof objection === 'string')
  const strange = Array.isArray(objections) ? given.filter((objection) => typeof objection !== 'string') : objections
  const unread = (name: string) => (readTime(fields[name]) === undefined ? fields[name] : undefined)
  const said = {
    ...(isObject(collected) && Object.keys(collected).length > 0
      ? { data: boundedFields(Object.entries(collected)) }
      : {}),
    ...(isStage ? { stage } : {}),
    ...(strings.length > 0 ? { objections: strings } : {}),
    ...metaOf(
      [
        ...others,
        ['collected_data', isObject(collected) ? undefined : collected],
        ['conversation_stage', isStage ? undefined : stage],
        ['objections_encountered', Array.isArray(strange) && strange.length === 0 ? undefined : strange],
        ['session_start_time', unread('session_start_time')],
        ['last_interaction_time', unread('last_interaction_time')],
        ['session_call_sid', fields.call_sid === callSid ? undefined : fields.call_sid],
      ],
      {
        ...(kept.length > 0 && { unreadable_turns: kept }),
        ...((isTruncated || unreadable.length > 0) && TRANSCRIPT_INCOMPLETE),
      },
    ),
  }
  if (Object.keys(said).length === 0) return undefined
  // With the time in it: a stage that comes back is another event than the first time.
  const id = `rescue-${digest([said, ts])}`
  return { type: 'call.data', call_sid: callSid, id, source: SOURCE, ...(ts === undefined ? {} : { ts }), ...said }
}

function metaOf(entries: [string, unknown][], more: JsonObject = {}): { meta?: JsonObject } {
  const meta = { ...boundedFields(entries), ...more }
  return Object.keys(meta).length === 0 ? {} : { meta }
}

/** Null is how Python writes "absent". (`fromEntries`: a field called __proto__ is data, too.) */
function boundedFields(entries: [string, unknown][]): JsonObject {
  const given = entries.filter(([, value]) => value !== undefined && value !== null)
  return Object.fromEntries(given.map(([name, value]) => [name, bounded(value)]))
}

/** As it is, if an event may have it; else as the beginning of its JSON. */
function bounded(value: unknown): unknown {
  const json = toJson(value)
  return json.length > MAX_FIELD_CHARS || isDeeperThan(value, MAX_DEPTH) ? cut(json, MAX_FIELD_CHARS) : value
}

function toJson(value: unknown): string {
  try {
    return JSON.stringify(value) ?? ''
  } catch (error) {
    if (error instanceof RangeError) return '"nested too deep to be kept"' // JSON.parse goes deeper than JSON.stringify
    throw error
  }
}

const cut = (text: string, maxChars: number) =>
  text.length > maxChars ? `${text.slice(0, maxChars).toWellFormed()}…` : text

const digest = (value: unknown) =>
  createHash('sha256').update(JSON.stringify(value)).digest('base64url').slice(0, ID_CHARS)

const latest = (times: (number | undefined)[]) =>
  times.reduce((last, ms) => (last === undefined || (ms !== undefined && ms > last) ? ms : last), undefined)

const DATE_AND_TIME = /^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d/
/** Epoch seconds, as Python's time.time() gives them, end here (year 5138), and epoch milliseconds begin (1973). */
const SECONDS_BELOW = 1e11

/** @returns epoch ms; undefined when it is no time that an event may have. Without a zone it is UTC: datetime.utcnow() */
export function readTime(value: unknown): number | undefined {
  let ms = Number.NaN
  if (typeof value === 'number') ms = value < SECONDS_BELOW ? value * 1000 : value
  // luxon would also take a time alone, as one of today.
  else if (typeof value === 'string' && DATE_AND_TIME.test(value.trim())) {
    ms = DateTime.fromISO(value.trim().replace(/^(\S+) (?=\d)/, '$1T'), { zone: 'utc' }).toMillis()
  }
  return ms >= 0 && ms <= LATEST_MS ? Math.round(ms) : undefined
}
