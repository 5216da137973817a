/** What the scenarios share: services to measure, a load, and the proof that every row is there. */
import { setTimeout as sleep } from 'node:timers/promises'
import { verifyCalls } from '../cli/compare.js'
import { expectedCalls, generateCall, newRun, type Run } from '../cli/load.js'
import type { LocalServer } from '../cli/local-server.js'
import { type Service, startService } from '../cli/stack.js'
import { type Client, connect } from '../client/client.js'
import type { CallEvent } from '../shared/events.js'
import { createPool, type Pool } from '../shared/postgres.js'

export interface Bench {
  calls: number
  turns: number
  seconds: number
  redis: LocalServer
  postgres: LocalServer
  folder: string
  say: (line: string) => void
}

/** One line of the table. */
export interface Result {
  scenario: string
  figure: string
  value: string
  unit: string
}

const CONNECTIONS = 50

export const databaseOf = ({ postgres }: Bench) => ({ DATABASE_URL: postgres.url, DATABASE_SCHEMA: 'public' })

export function start(bench: Bench, name: 'ingest' | 'sink'): Promise<Service> {
  const environment = {
    REDIS_URL: bench.redis.url,
    ...databaseOf(bench),
    INGEST_PORT: '0',
    SINK_METRICS_PORT: '0',
    LOG_LEVEL: 'warn',
  }
  return startService(name, bench.folder, environment, bench.say)
}

export const openPool = (bench: Bench): Pool => createPool(databaseOf(bench), 'bench', 2)

export interface Load {
  run: Run
  turns: number
  /** Sends everything at full speed; resolves when all is acked. Made beforehand, so that only sending is measured. */
  send(ingestUrl: string): Promise<void>
}

export function makeLoad(calls: number, turns: number): Load {
  const run = newRun(calls, turns)
  const shares: CallEvent[][] = Array.from({ length: Math.min(CONNECTIONS, calls) }, (_, connection) => {
    const live = []
    for (let call = connection; call < calls; call += CONNECTIONS) live.push(generateCall(run, call))
    const share: CallEvent[] = []
    // In rounds, an event of each call: its calls are all live at once, as they would be.
    for (let left = live.length; left > 0; ) {
      left = 0
      for (const call of live) {
        const { value } = call.next()
        if (!value) continue
        share.push(value)
        left++
      }
    }
    return share
  })
  return {
    run,
    turns: calls * turns,
    async send(ingestUrl) {
      const clients = await connectAll(ingestUrl, shares.length)
      await Promise.all(clients.map((client, i) => sendAll(client, shares[i]!)))
      await Promise.all(clients.map((client) => client.close()))
    },
  }
}

export function connectAll(ingestUrl: string, count = CONNECTIONS): Promise<Client[]> {
  return Promise.all(Array.from({ length: count }, () => connect(ingestUrl)))
}

async function sendAll(client: Client, events: CallEvent[]): Promise<void> {
  for (const event of events) {
    await client.ready()
    client.post(event as Parameters<Client['post']>[0])
  }
  await client.flush()
}

export async function untilFinalized(pool: Pool, load: Load): Promise<void> {
  const deadline = Date.now() + 120_000
  // Looks at the calls only: counting the turns again and again would be a load of its own.
  const sql = 'SELECT count(finalized_at)::int AS finalized FROM call_sessions WHERE call_sid >= $1 AND call_sid < $2'
  for (;;) {
    const { rows } = await pool.query<{ finalized: number }>(sql, [load.run.prefix, `${load.run.prefix}~`])
    if (rows[0]!.finalized >= load.run.calls) return
    if (Date.now() > deadline) throw new Error('the calls were not all finalized within two minutes')
    await sleep(20)
  }
}

/** A figure counts only if every row is there and right. */
export async function verify(pool: Pool, load: Load): Promise<void> {
  const report = await verifyCalls(pool, load.run.prefix, expectedCalls(load.run))
  if (report.differences.length > 0) {
    throw new Error(`rows are wrong: ${JSON.stringify(report.counts)}, first: ${JSON.stringify(report.differences[0])}`)
  }
}

export function row(scenario: string, figure: string, value: number, unit: string): Result {
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : 2
  return { scenario, figure, value: value.toFixed(digits), unit }
}

export function cpuRows(scenario: string, cpu: Record<string, number>): Result[] {
  const all = Object.entries(cpu).filter(([name]) => name !== 'client')
  const sum = all.reduce((total, [, micros]) => total + micros, 0)
  const rows = Object.entries(cpu).map(([name, micros]) => row(scenario, `CPU ${name}`, micros, 'µs/turn'))
  return [...rows, row(scenario, 'CPU all but client', sum, 'µs/turn')]
}
