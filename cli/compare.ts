/**
 * What was sent against what PostgreSQL has, turn by turn. Deliberately uses nothing of ingest and sink, nor the rules they
 * normalise with: a check that shares the code it checks shares its faults.
 */
import { isDeepStrictEqual } from 'node:util'
import type { CallData, CallEnded, CallStarted, CallStatusChanged, Turn } from '../shared/events.js'
import type { Pool } from '../shared/postgres.js'

/** An event as a producer sends it; a turn always numbered. */
export type SentEvent = (Turn & { seq: number }) | CallStarted | CallStatusChanged | CallData | CallEnded

/** A row of call_transcript_turns. */
export interface TurnRow {
  turn_id: string
  seq: number | null
  speaker: string
  text: string
  /** Epoch milliseconds. */
  spoken_at: number
  language: string | null
  confidence: number | null
  interrupted: boolean | null
}

/** A row of call_sessions. */
export interface SessionRow {
  [column: string]: unknown
  full_transcript: { seq: number | null; speaker: string; text: string; timestamp: string }[] | null
  finalized_at: Date | null
}

export interface ExpectedCall {
  callSid: string
  /** By `seq`. */
  turns: Map<number, TurnRow>
  /** Columns of the call's row. */
  session: Record<string, unknown>
}

/** What may be wrong. `unexpected`: a turn that nobody sent. `call row`: the other columns of call_sessions. */
export const KINDS = ['missing', 'doubled', 'changed', 'out of order', 'unexpected', 'call row'] as const
export type Kind = (typeof KINDS)[number]

export interface Difference {
  callSid: string
  kind: Kind
  /** The turn; absent when it is about the call. */
  seq?: number | undefined
  /** The tables or columns where it shows. */
  where: string[]
  detail: string
}

export interface Report {
  calls: number
  /** Turns that were sent, each counted once. */
  turns: number
  rows: number
  counts: Record<Kind, number>
  /** The first of them. */
  differences: Difference[]
}

const MOST_DIFFERENCES = 20
/** Characters of a value that a difference shows. */
const SHORT = 70
/** How much is read and compared at a time: bounds the memory, whatever the number of calls. */
const PAGE_TURNS = 5000
const PAGE_CALLS = 500

const SPEAKERS: Record<string, string> = {
  ai: 'agent',
  bot: 'agent',
  assistant: 'agent',
  user: 'customer',
  caller: 'customer',
  human: 'customer',
}

const SESSION_COLUMNS = [
  ...['provider', 'direction', 'from_number', 'to_number', 'status', 'outcome', 'end_reason', 'conversation_stage'],
  ...['collected_data', 'objections_encountered', 'turn_count', 'expected_turns', 'complete'],
]

/**
 * What PostgreSQL must have of a call in the end. Without call.ended among `events`, its connection was lost; one that has it,
 * has its outcome there.
 */
export function expectedCall(callSid: string, events: Iterable<SentEvent>): ExpectedCall {
  const turns = new Map<number, TurnRow>()
  const said: Record<string, unknown> = { end_reason: 'disconnected', status: 'completed' }
  for (const event of events) {
    if (event.type === 'turn') {
      turns.set(event.seq, turnRow(event))
    } else if (event.type === 'call.started') {
      const { provider, direction, from, to } = event
      Object.assign(said, { provider, direction, from_number: from, to_number: to })
    } else if (event.type === 'call.data') {
      if (event.stage) said.conversation_stage = event.stage
      if (event.data) said.collected_data = { ...(said.collected_data as object), ...event.data }
      const known = (said.objections_encountered ?? []) as string[]
      if (event.objections) said.objections_encountered = [...new Set([...known, ...event.objections])]
    } else if (event.type === 'call.ended') {
      const { reason, outcome, turn_count: count } = event
      Object.assign(said, { end_reason: reason, outcome, expected_turns: count })
      if (count !== undefined) said.complete = true
    }
  }
  const customerSpoke = [...turns.values()].some(({ speaker, text }) => speaker === 'customer' && text.trim() !== '')
  said.outcome ??= said.end_reason === 'disconnected' ? (customerSpoke ? 'disconnected' : 'no_answer') : null
  said.turn_count = turns.size
  return { callSid, turns, session: Object.fromEntries(SESSION_COLUMNS.map((name) => [name, said[name] ?? null])) }
}

function turnRow(turn: Turn & { seq: number }): TurnRow {
  return {
    turn_id: turn.id ?? String(turn.seq),
    seq: turn.seq,
    speaker: SPEAKERS[turn.speaker] ?? turn.speaker,
    text: turn.text,
    spoken_at: turn.ts ?? Number.NaN,
    language: turn.language ?? null,
    confidence: turn.confidence ?? null,
    interrupted: turn.interrupted ?? null,
  }
}

/** Differences of one call. What shows in the turns and in the transcript is one difference. */
class Findings {
  private readonly found = new Map<string, Difference>()

  constructor(private readonly callSid: string) {}

  add(kind: Kind, seq: number | null | undefined, where: string, detail: string): void {
    const key = `${kind} ${seq ?? detail}`
    const known = this.found.get(key)
    if (!known) this.found.set(key, { callSid: this.callSid, kind, seq: seq ?? undefined, where: [where], detail })
    else if (!known.where.includes(where)) known.where.push(where)
  }

  get all(): Difference[] {
    return [...this.found.values()]
  }
}

/**
 * @param rows the call's rows in call_transcript_turns, in any order
 * @param session the call's row in call_sessions
 */
export function compareCall(expected: ExpectedCall, rows: TurnRow[], session: SessionRow | undefined): Difference[] {
  const findings = new Findings(expected.callSid)
  const wrong = session ? wrongColumns(expected, session) : ['there is none']
  if (wrong.length > 0) findings.add('call row', undefined, 'call_sessions', wrong.join('; '))
  compareTurns('call_transcript_turns', expected, rows, findings)
  if (!session?.full_transcript) return findings.all
  const transcript = session.full_transcript.map(({ timestamp, ...turn }) => ({
    ...turn,
    spoken_at: Date.parse(timestamp),
  }))
  compareTurns('full_transcript', expected, transcript, findings)
  transcript.reduce((last, { seq }) => {
    if (seq === null || seq >= last) return seq ?? last
    findings.add('out of order', seq, 'full_transcript', `stands behind turn ${last}`)
    return last
  }, -1)
  return findings.all
}

function wrongColumns(expected: ExpectedCall, session: SessionRow): string[] {
  if (!session.finalized_at) return ['not finalized'] // the rest of it is preliminary
  return Object.entries(expected.session).flatMap(([column, value]) =>
    isDeepStrictEqual(session[column], value) ? [] : `${column} is ${instead(session[column], value)}`,
  )
}

function compareTurns(where: string, expected: ExpectedCall, found: Partial<TurnRow>[], findings: Findings): void {
  const seen = new Set<number>()
  for (const turn of found) {
    const sent = typeof turn.seq === 'number' ? expected.turns.get(turn.seq) : undefined
    const seq = sent?.seq
    if (!sent || typeof seq !== 'number') {
      findings.add('unexpected', turn.seq, where, short(turn.text))
      continue
    }
    if (seen.has(seq)) findings.add('doubled', seq, where, short(turn.text))
    seen.add(seq)
    for (const column of Object.keys(turn) as (keyof TurnRow)[]) {
      if (turn[column] === sent[column]) continue
      findings.add('changed', seq, where, `${column} is ${instead(turn[column], sent[column])}`)
    }
  }
  for (const [seq, sent] of expected.turns) if (!seen.has(seq)) findings.add('missing', seq, where, short(sent.text))
}

/** Both values, long strings from where they begin to differ. */
function instead(found: unknown, sent: unknown): string {
  if (typeof found !== 'string' || typeof sent !== 'string') return `${short(found)} instead of ${short(sent)}`
  let same = 0
  while (same < found.length && found[same] === sent[same]) same++
  const from = same < SHORT / 2 ? 0 : same - SHORT / 4
  const tail = (text: string) => `${from > 0 ? '…' : ''}${short(text.slice(from))}`
  return `${tail(found)} instead of ${tail(sent)}`
}

function short(value: unknown): string {
  const text = JSON.stringify(value) ?? 'nothing'
  return text.length > SHORT ? `${text.slice(0, SHORT)}…` : text
}

/**
 * Reads the calls back from PostgreSQL, page by page, and compares.
 *
 * @param prefix what the call_sids of these calls, and of no others, begin with
 * @param calls made as they are needed, so that they need not be remembered all at once
 */
export async function verifyCalls(
  pool: Pool,
  prefix: string,
  calls: Iterable<ExpectedCall>,
  signal?: AbortSignal,
): Promise<Report> {
  const counts = Object.fromEntries(KINDS.map((kind) => [kind, 0])) as Record<Kind, number>
  const report: Report = { calls: 0, turns: 0, rows: 0, counts, differences: [] }
  for (const page of pages(calls)) {
    signal?.throwIfAborted()
    const sids = page.map((call) => call.callSid)
    const [turns, sessions] = await Promise.all([
      pool.query<TurnRow & { call_sid: string }>(
        `SELECT call_sid, turn_id, seq, speaker, text, (extract(epoch FROM spoken_at) * 1000)::float8 AS spoken_at,
           language, confidence, interrupted
         FROM call_transcript_turns WHERE call_sid = ANY($1)`,
        [sids],
      ),
      pool.query<SessionRow & { call_sid: string }>('SELECT * FROM call_sessions WHERE call_sid = ANY($1)', [sids]),
    ])
    const rowsOf = new Map<string, TurnRow[]>(sids.map((sid) => [sid, []]))
    for (const { call_sid: sid, ...row } of turns.rows) rowsOf.get(sid)?.push(row)
    const sessionOf = new Map(sessions.rows.map((row) => [row.call_sid, row]))
    for (const call of page) {
      const differences = compareCall(call, rowsOf.get(call.callSid) ?? [], sessionOf.get(call.callSid))
      for (const { kind } of differences) report.counts[kind]++
      report.differences.push(...differences.slice(0, MOST_DIFFERENCES - report.differences.length))
      report.calls++
      report.turns += call.turns.size
    }
    report.rows += turns.rows.length
  }
  const strays = (await readLanded(pool, prefix)).turns - report.rows
  if (strays > 0) {
    report.rows += strays
    counts.unexpected += strays
    const detail = `${strays} turns of calls that nobody sent`
    report.differences.unshift({ callSid: `${prefix}…`, kind: 'unexpected', where: ['call_transcript_turns'], detail })
    report.differences.splice(MOST_DIFFERENCES)
  }
  return report
}

function* pages(calls: Iterable<ExpectedCall>): Generator<ExpectedCall[]> {
  let page: ExpectedCall[] = []
  let turns = 0
  for (const call of calls) {
    page.push(call)
    turns += call.turns.size
    if (turns < PAGE_TURNS && page.length < PAGE_CALLS) continue
    yield page
    page = []
    turns = 0
  }
  if (page.length > 0) yield page
}

export interface Latency {
  p50Ms: number
  p99Ms: number
}

/**
 * From a turn's arrival in Redis to the start of the transaction that stored it (`persisted_at` is PostgreSQL's now()), by
 * the clocks of the two. Undefined without turns.
 *
 * @param prefix what the call_sids begin with
 */
export async function readLatency(pool: Pool, prefix: string): Promise<Latency | undefined> {
  const { rows } = await pool.query<{ ms: [number, number] | null }>(
    `SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (
       ORDER BY (extract(epoch FROM persisted_at - ingested_at) * 1000)::float8
     ) AS ms FROM call_transcript_turns WHERE call_sid >= $1 AND call_sid < $2`,
    [prefix, endOfPrefix(prefix)],
  )
  const ms = rows[0]?.ms
  return ms ? { p50Ms: ms[0], p99Ms: ms[1] } : undefined
}

export interface Landed {
  turns: number
  finalized: number
}

/** What PostgreSQL has by now of the calls that begin with `prefix`. */
export async function readLanded(pool: Pool, prefix: string): Promise<Landed> {
  const { rows } = await pool.query<Landed>(
    `SELECT (SELECT count(*)::int FROM call_transcript_turns WHERE call_sid >= $1 AND call_sid < $2) AS turns,
       (SELECT count(finalized_at)::int FROM call_sessions WHERE call_sid >= $1 AND call_sid < $2) AS finalized`,
    [prefix, endOfPrefix(prefix)],
  )
  return rows[0]!
}

/** A call_sid is ASCII and compared byte by byte: `~` stands behind every character it may have. */
const endOfPrefix = (prefix: string) => `${prefix}~`
