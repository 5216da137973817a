/** Plays the sample calls of demo-calls.ts, each over a connection of its own, several times as fast as people speak. */
import { setImmediate as nextRound, setTimeout as sleep } from 'node:timers/promises'
import { type Client, EventRefused } from '../client/client.js'
import type { Pool } from '../shared/postgres.js'
import { type ExpectedCall, expectedCall, type SentEvent } from './compare.js'
import { SAMPLE_CALLS, type SampleCall } from './demo/calls.js'
import { countEvents, type Ingest, open } from './demo/client.js'

/** A call that is being played, as the live view shows it. */
export interface PlayedCall {
  readonly sample: SampleCall
  readonly callSid: string
  readonly steps: Step[]
  readonly turns: number
  state: string
  /** Turns, each counted once. */
  sent: number
  acked: number
  inPostgres: number
  finalized: boolean
  /** Turns sent once more. */
  resent: number
  refusals: string[]
}

/** Something that happens while a call is played. */
interface Step {
  /** From the beginning of the playing. */
  atMs: number
  event?: SentEvent
  /** The connection is lost, with what was sent just before still unacknowledged. */
  drop?: true
  /** A turn that has long been acknowledged is sent again. */
  again?: true
}

/** How far into the call things happen, in the call's own time. */
const RINGING_MS = 700
const ANSWERED_MS = 4000
const PAUSE_MS = 500
const MS_PER_CHARACTER = 55
/** Turns that are under way when a connection is lost; and turns that the producer then sends again though they were acked. */
const CAUGHT_BY_DROP = 4
const SENT_AGAIN = 2

/** @param prefix what the call_sids begin with */
export function sampleRun(prefix: string): PlayedCall[] {
  return SAMPLE_CALLS.map((sample) => {
    const callSid = `${prefix}${sample.name}`
    const steps = stepsOf(sample, callSid)
    const turns = steps.filter((step) => step.event?.type === 'turn' && !step.again).length
    const counts = { sent: 0, acked: 0, inPostgres: 0, finalized: false, resent: 0 }
    return { sample, callSid, steps, turns, state: 'waiting', ...counts, refusals: [] }
  })
}

/** What happens in a call. Its `ts` have the pace of people speaking, and end when the playing does. */
function stepsOf(sample: SampleCall, callSid: string): Step[] {
  const lines = sample.script.trim().split('\n')
  const speaking = lines.map((line) => Math.min(8000, Math.max(1000, line.length * MS_PER_CHARACTER)))
  const lengthMs = ANSWERED_MS + speaking.reduce((sum, ms) => sum + PAUSE_MS + ms, 0)
  const startMs = Date.now() + sample.playMs - lengthMs
  const common = { call_sid: callSid, source: 'bot' }
  const steps: Step[] = []
  const add = (offset: number, event: SentEvent) =>
    steps.push({ atMs: (offset / lengthMs) * sample.playMs, event: { ...event, ts: startMs + offset } })

  const { direction, from, to, provider } = sample
  add(0, { type: 'call.started', ...common, direction, from, to, provider })
  add(RINGING_MS, { type: 'call.status', ...common, status: 'ringing' })
  add(ANSWERED_MS, { type: 'call.status', ...common, status: 'in-progress' })
  let offset = ANSWERED_MS + PAUSE_MS
  for (const [seq, line] of lines.entries()) {
    add(offset, turnOf(sample, callSid, seq, line))
    offset += speaking[seq]!
    const note = sample.notes?.[seq]
    if (note) add(offset, { type: 'call.data', ...common, ...note })
    offset += PAUSE_MS
  }
  if (sample.ending) add(lengthMs, { type: 'call.ended', ...common, ...sample.ending, turn_count: lines.length })
  return sample.fate === 'drops' ? withDrop(steps) : steps
}

function turnOf({ language }: SampleCall, callSid: string, seq: number, line: string): SentEvent {
  const colon = line.indexOf(': ')
  const text = line.slice(colon + 2)
  const confidence = 0.99 - ((seq * 7) % 13) / 100
  return {
    type: 'turn',
    call_sid: callSid,
    seq,
    speaker: line.slice(0, colon),
    text,
    language,
    confidence: Number(confidence.toFixed(2)),
    ...(text.endsWith('—') ? { interrupted: true } : {}),
  }
}

/** In the middle some turns are sent in a rush, and the connection is lost before they can be acknowledged. */
function withDrop(steps: Step[]): Step[] {
  const turns = steps.filter((step) => step.event?.type === 'turn')
  const rush = turns.slice(turns.length / 2, turns.length / 2 + CAUGHT_BY_DROP)
  const { atMs } = rush.at(-1)!
  for (const step of rush) step.atMs = atMs
  const again = turns.slice(0, SENT_AGAIN).map(({ event }): Step => ({ atMs: atMs + 1000, event: event!, again: true }))
  const at = steps.indexOf(rush.at(-1)!) + 1
  return [...steps.slice(0, at), { atMs, drop: true as const }, ...again, ...steps.slice(at)].sort(
    (a, b) => a.atMs - b.atMs,
  )
}

/** @throws (rejects) ConnectionClosed, or the signal's reason */
export async function playSample(call: PlayedCall, ingest: Ingest, signal: AbortSignal): Promise<void> {
  const hangsUp = call.sample.fate === 'hangs up'
  const client = await open(ingest, { callSid: hangsUp ? call.callSid : undefined })
  const cut = () => client.terminate()
  signal.addEventListener('abort', cut)
  client.on('reconnect', (unacked) => {
    call.state = `back, resends ${unacked}`
  })
  const began = performance.now()
  try {
    let before = 0
    for (const step of call.steps) {
      const wait = began + step.atMs - performance.now()
      // Timers may fire a little early; what is to happen at the same time must not wait for the rest.
      if (wait > 0 && step.atMs > before) await sleep(wait, undefined, { signal })
      before = step.atMs
      await perform(step, call, client)
    }
    await client.flush()
    call.resent += client.stats.resent
    if (hangsUp) {
      client.terminate()
      call.state = 'hung up'
    } else {
      await client.close()
      call.state = 'ended'
    }
  } finally {
    signal.removeEventListener('abort', cut)
    cut()
  }
}

async function perform({ event, drop, again }: Step, call: PlayedCall, client: Client): Promise<void> {
  if (drop) {
    await nextRound() // the turns of the rush go out now, and no answer can have come yet
    client.drop()
    call.state = 'connection lost'
  }
  if (!event) return
  if (event.type === 'call.started') call.state = 'calling'
  if (event.type === 'call.status') call.state = event.status ?? call.state
  const isNewTurn = event.type === 'turn' && !again
  if (isNewTurn) call.sent++
  if (isNewTurn && call.state.startsWith('back')) call.state = 'in-progress'
  if (again) call.resent++
  client.send(event).then(
    () => {
      if (isNewTurn) call.acked++
    },
    (error: Error) => {
      // Anything else means that the connection was closed: then flush() fails with it, too.
      if (error instanceof EventRefused) call.refusals.push(`${call.callSid} ${event.type}: ${error.message}`)
    },
  )
}

/** Notes what PostgreSQL has by now of each call. */
export async function lookAtSamples(pool: Pool, calls: PlayedCall[]): Promise<void> {
  const { rows } = await pool.query<{ call_sid: string; turns: number; finalized: boolean }>(
    `SELECT call_sid, finalized_at IS NOT NULL AS finalized,
       (SELECT count(*)::int FROM call_transcript_turns t WHERE t.call_sid = s.call_sid) AS turns
     FROM call_sessions s WHERE call_sid = ANY($1)`,
    [calls.map((call) => call.callSid)],
  )
  const bySid = new Map(rows.map((row) => [row.call_sid, row]))
  for (const call of calls) {
    call.inPostgres = bySid.get(call.callSid)?.turns ?? 0
    call.finalized = bySid.get(call.callSid)?.finalized ?? false
  }
}

export function expectedOf(call: PlayedCall): ExpectedCall {
  return expectedCall(
    call.callSid,
    call.steps.flatMap((step) => step.event ?? []),
  )
}

/**
 * How many events came to Redis more than once, in calls whose connections add no events of their own and that Redis still has.
 *
 * @throws (rejects) when ingest does not say
 */
export async function countDuplicates(calls: PlayedCall[], ingest: Ingest): Promise<number> {
  let duplicates = 0
  for (const call of calls.filter(({ sample }) => sample.fate !== 'hangs up')) {
    const sent = call.steps.filter((step) => step.event && !step.again).length
    duplicates += ((await countEvents(ingest, call.callSid)) ?? sent) - sent
  }
  return duplicates
}
