/**
 * What the fault suites send, and the comparison of it with PostgreSQL. Calls come by three ways: over our client with
 * numbered turns; over our client with turns that have neither `seq` nor `id`; and over plain HTTP, tried again until it
 * answers 200. Each of them is sent until it is acked. So at the end everything was, and an ack given wrongly is a turn missing.
 */
import { setImmediate as nextRound, setTimeout as sleep } from 'node:timers/promises'
import { expect } from 'vitest'
import { KINDS, verifyCalls } from '../../cli/compare.js'
import { expectedCalls, generateCall, newRun, type Run } from '../../cli/load.js'
import { type Client, connect } from '../../client/client.js'
import type { Pool } from '../../shared/postgres.js'
import { until } from '../support/stores.js'

export interface LoadPlan {
  /** Calls with numbered turns. Of the other two kinds there is a tenth of it each, one at least. */
  calls: number
  /** Of each call. */
  turns: number
  /** Turns a second, all calls together. Absent: as fast as they are acked. */
  rate?: number
}

const CONNECTIONS = 8
const MAX_UNACKED = 500
const HTTP_EVENTS = 20
const HTTP_TIMEOUT_MS = 7000
/** Impatient, for the suites are: a minute of backoff would be a minute of test. */
const CLIENT = { initialBackoffMs: 20, maxBackoffMs: 300, helloTimeoutMs: 2000, silenceTimeoutMs: 4000 }

interface KeylessTurn {
  type: 'turn'
  call_sid: string
  speaker: string
  text: string
  ts: number
}

type Sent = { type: string; call_sid?: string }

export class Load {
  readonly numbered: Run
  readonly keyless: Run
  readonly http: Run
  sent = 0
  reconnects = 0
  resent = 0
  /** HTTP requests that had to be sent again. */
  retried = 0
  private due = performance.now()

  constructor(private readonly plan: LoadPlan) {
    const few = Math.ceil(plan.calls / 10)
    this.numbered = newRun(plan.calls, plan.turns)
    this.keyless = newRun(few, plan.turns)
    this.http = newRun(few, plan.turns)
  }

  get runs(): Run[] {
    return [this.numbered, this.keyless, this.http]
  }

  get calls(): number {
    return this.runs.reduce((sum, run) => sum + run.calls, 0)
  }

  get turns(): number {
    return this.calls * this.plan.turns
  }

  /**
   * Resolves when every event has been acked.
   *
   * @param url of ingest, http://…
   */
  async play(url: string): Promise<void> {
    const wire = (index: number) => this.playOnClient(url, sharedOut(this.numbered, index, CONNECTIONS, generateCall))
    await Promise.all([
      ...Array.from({ length: CONNECTIONS }, (_, index) => wire(index)),
      this.playOnClient(url, sharedOut(this.keyless, 0, 1, keylessCall)),
      this.playOverHttp(url, sharedOut(this.http, 0, 1, generateCall)),
    ])
  }

  private async playOnClient(url: string, events: Iterable<Sent>): Promise<void> {
    const client = await connectAtLast(url)
    const refusals: string[] = []
    client.on('refused', (error) => refusals.push(`${error.event.call_sid} ${error.event.type}: ${error.message}`))
    try {
      for (const event of events) {
        await client.ready()
        await this.pace()
        client.post(event as Parameters<Client['post']>[0])
        this.count(event)
        if (this.sent % 64 === 0) await nextRound() // waiting for what is settled lets nothing else run, not even sockets
      }
      await client.flush()
    } finally {
      this.reconnects += client.stats.reconnects
      this.resent += client.stats.resent
      client.terminate()
    }
    expect(refusals, 'events refused').toEqual([])
    expect(client.stats).toMatchObject({ refused: 0, unacked: 0 })
  }

  private async playOverHttp(url: string, events: Iterable<Sent>): Promise<void> {
    let body: Sent[] = []
    const post = async () => {
      while (!(await postEvents(url, body))) {
        this.retried++
        await sleep(50)
      }
      body = []
    }
    for (const event of events) {
      await this.pace()
      this.count(event)
      if (body.push(event) === HTTP_EVENTS) await post()
    }
    if (body.length > 0) await post()
  }

  private count(event: Sent): void {
    if (event.type === 'turn') this.sent++
  }

  private async pace(): Promise<void> {
    if (this.plan.rate === undefined) return
    const now = performance.now()
    this.due = Math.max(this.due, now - 100) + 1000 / this.plan.rate
    if (this.due - now > 1) await sleep(this.due - now)
  }

  /**
   * Everything that was sent is in PostgreSQL, once, in order, in finalized calls, and nothing else of these calls is.
   *
   * @param timeoutMs for the sinks to come to an end with it
   */
  async expectStored(pool: Pool, timeoutMs = 20_000): Promise<void> {
    const sids = this.runs.map((run) => run.prefix)
    const finalized = async () => {
      const sql = `SELECT count(finalized_at)::int AS n FROM call_sessions WHERE call_sid ~ $1`
      const { rows } = await pool.query<{ n: number }>(sql, [`^(${sids.join('|')})`])
      return rows[0]!.n === this.calls
    }
    // Then the comparison says what is missing, which tells more.
    await until('every call is finalized', finalized, timeoutMs).catch(() => undefined)
    for (const run of [this.numbered, this.http]) {
      const report = await verifyCalls(pool, run.prefix, expectedCalls(run))
      const nothing = Object.fromEntries(KINDS.map((kind) => [kind, 0]))
      expect({ ...report.counts, rows: report.rows }, JSON.stringify(report.differences.slice(0, 5))).toEqual({
        ...nothing,
        rows: run.calls * run.turns,
      })
    }
    await expectKeyless(pool, this.keyless)
    const quarantine = await pool.query('SELECT stream_key, entry_id, reason FROM quarantined_events LIMIT 10')
    expect(quarantine.rows, 'in quarantine').toEqual([])
  }
}

/** A connection's share of the calls, interleaved: one more begins in each round, so that calls begin and end all the time. */
function* sharedOut<E>(run: Run, first: number, step: number, eventsOf: (run: Run, call: number) => Iterable<E>) {
  let live: Iterator<E>[] = []
  for (let next = first; live.length > 0 || next < run.calls; next += step) {
    if (next < run.calls) live.push(eventsOf(run, next)[Symbol.iterator]())
    const going: Iterator<E>[] = []
    for (const call of live) {
      const { value, done } = call.next()
      if (done) continue
      yield value
      going.push(call)
    }
    live = going
  }
}

function* keylessCall(run: Run, call: number): Generator<Sent> {
  for (const event of generateCall(run, call)) {
    if (event.type !== 'turn') yield event
    else {
      const { call_sid, seq, ts } = event
      const turn: KeylessTurn = { type: 'turn', call_sid, speaker: 'agent', text: String(seq), ts: ts! }
      yield turn
    }
  }
}

async function expectKeyless(pool: Pool, run: Run): Promise<void> {
  const { rows } = await pool.query<{ texts: string[]; transcript: string[]; complete: boolean; turn_count: number }>(
    `SELECT (SELECT array_agg(text ORDER BY text::int) FROM call_transcript_turns t WHERE t.call_sid = s.call_sid) AS texts,
       ARRAY(SELECT turn->>'text' FROM jsonb_array_elements(full_transcript) WITH ORDINALITY AS e(turn, n) ORDER BY n) AS transcript,
       complete, turn_count
     FROM call_sessions s WHERE call_sid LIKE $1 || '%'`,
    [run.prefix],
  )
  const texts = Array.from({ length: run.turns }, (_, seq) => String(seq))
  const call = { texts, transcript: texts, complete: true, turn_count: run.turns }
  expect(rows, 'calls without keys').toEqual(Array.from({ length: run.calls }, () => call))
}

/** The client wants its first connection to succeed. */
async function connectAtLast(url: string): Promise<Client> {
  for (;;) {
    try {
      return await connect(url, { ...CLIENT, maxUnacked: MAX_UNACKED })
    } catch {
      await sleep(50)
    }
  }
}

/** @returns false when it has to be sent again */
async function postEvents(url: string, events: Sent[]): Promise<boolean> {
  const headers = { 'Content-Type': 'application/json' }
  const signal = AbortSignal.timeout(HTTP_TIMEOUT_MS)
  let answer: Response
  let body: unknown
  try {
    answer = await fetch(`${url}/v1/events`, { method: 'POST', headers, body: JSON.stringify(events), signal })
    body = await answer.json()
  } catch {
    return false // nobody there, or the connection was lost
  }
  if (answer.status === 503) return false
  expect({ status: answer.status, body }).toEqual({ status: 200, body: { accepted: events.length, rejected: [] } })
  return true
}
