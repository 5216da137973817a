/** From the WebSocket to COMMIT: at full speed, and the latency at a fifth of it. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Client } from '../client/client.js'
import type { Pool } from '../shared/postgres.js'
import { cpuNow, cpuSince, residentMiB } from './machine.js'
import {
  type Bench,
  connectAll,
  cpuRows,
  makeLoad,
  openPool,
  type Result,
  row,
  start,
  untilFinalized,
  verify,
} from './scenario.js'

const ROUNDS = 3
const TEXT = 'Could you tell me the order number once more, please? It is on the invoice. '.repeat(3).slice(0, 200)

export async function endToEnd(bench: Bench): Promise<Result[]> {
  const ingest = await start(bench, 'ingest')
  const sink = await start(bench, 'sink')
  const pool = openPool(bench)
  const pids = {
    ingest: ingest.pid(),
    redis: bench.redis.pid,
    sink: sink.pid(),
    postgres: bench.postgres.pid,
    client: process.pid,
  }
  try {
    const rounds: { rate: number; acked: number; cpu: Record<string, number> }[] = []
    for (let round = 0; round < ROUNDS; round++) {
      const load = makeLoad(bench.calls, bench.turns)
      const cpu = cpuNow(pids)
      const began = performance.now()
      await load.send(ingest.url)
      const acked = load.turns / ((performance.now() - began) / 1000)
      await untilFinalized(pool, load)
      const rate = load.turns / ((performance.now() - began) / 1000)
      const cost = cpuSince(cpu, pids, load.turns)
      await verify(pool, load)
      bench.say(`end to end, round ${round + 1} of ${ROUNDS}: ${Math.round(rate)} turns/s committed`)
      rounds.push({ rate, acked, cpu: cost })
    }
    const middle = rounds.sort((a, b) => a.rate - b.rate)[Math.floor(ROUNDS / 2)]!
    const scenario = `end to end, ${bench.calls} × ${bench.turns}`
    const fifth = Math.round(middle.rate / 5)
    return [
      row(scenario, 'committed and finalized', middle.rate, 'turns/s'),
      row(scenario, 'acked', middle.acked, 'turns/s'),
      ...cpuRows(scenario, middle.cpu),
      row(scenario, 'memory ingest', residentMiB(pids.ingest), 'MiB'),
      row(scenario, 'memory sink', residentMiB(pids.sink), 'MiB'),
      ...(await latencyAt(bench, pool, ingest.url, fifth)),
    ]
  } finally {
    await ingest.stop()
    await sink.stop()
    await pool.end()
  }
}

/** Sent evenly, each turn stamped when it is sent; the COMMIT's time is PostgreSQL's own. One machine, one clock. */
async function latencyAt(bench: Bench, pool: Pool, ingestUrl: string, rate: number): Promise<Result[]> {
  const prefix = `latency-${Date.now()}-`
  const clients = await connectAll(ingestUrl)
  const sent = await sendAtRate(clients, prefix, 1000, rate, bench.seconds)
  await Promise.all(clients.map((client) => client.flush()))
  const { rows, p50, p99, p999 } = await readLatencies(pool, prefix, sent)
  await Promise.all(clients.map((client) => client.close()))
  bench.say(`latency at ${rate}/s: p50 ${p50.toFixed(1)} ms, p99 ${p99.toFixed(1)} ms`)
  const scenario = `latency at ${rate}/s`
  return [
    row(scenario, 'sent to committed, p50', p50, 'ms'),
    row(scenario, 'sent to committed, p99', p99, 'ms'),
    row(scenario, 'sent to committed, p99.9', p999, 'ms'),
    row(scenario, 'rows', rows, 'turns'),
  ]
}

/** @returns how many turns were sent, spread evenly over the calls, numbered on from `firstSeq` */
export async function sendAtRate(
  clients: Client[],
  prefix: string,
  calls: number,
  rate: number,
  seconds: number,
  firstSeq = 0,
): Promise<number> {
  const began = performance.now()
  const total = Math.round(rate * seconds)
  let sent = 0
  while (sent < total) {
    const due = Math.min(total, Math.floor(((performance.now() - began) / 1000) * rate))
    for (; sent < due; sent++) {
      const call = sent % calls
      clients[call % clients.length]!.post({
        type: 'turn',
        call_sid: `${prefix}${call}`,
        seq: firstSeq + Math.floor(sent / calls),
        speaker: sent % 2 === 0 ? 'agent' : 'customer',
        text: TEXT,
        ts: Date.now(),
      })
    }
    await sleep(1)
  }
  return total
}

export interface Latencies {
  rows: number
  p50: number
  p99: number
  p999: number
}

/** Of turns sent since `sinceMs`; waits until `expected` rows are there. @throws when they do not come, or more do */
export async function readLatencies(pool: Pool, prefix: string, expected: number, sinceMs = 0): Promise<Latencies> {
  const range = [prefix, `${prefix}~`, new Date(sinceMs)]
  const where = 'call_sid >= $1 AND call_sid < $2 AND spoken_at >= $3'
  const count = async () => {
    const sql = `SELECT count(*)::int AS rows FROM call_transcript_turns WHERE ${where}`
    return (await pool.query<{ rows: number }>(sql, range)).rows[0]!.rows
  }
  const deadline = Date.now() + 30_000
  while ((await count()) < expected && Date.now() < deadline) await sleep(100)
  const { rows } = await pool.query<{ rows: number; ms: [number, number, number] }>(
    `SELECT count(*)::int AS rows, percentile_cont(ARRAY[0.5, 0.99, 0.999]) WITHIN GROUP (
       ORDER BY extract(epoch FROM pg_xact_commit_timestamp(xmin) - spoken_at)::float8 * 1000) AS ms
     FROM call_transcript_turns WHERE ${where}`,
    range,
  )
  const { rows: found, ms } = rows[0]!
  if (found !== expected) throw new Error(`${found} rows of ${expected} turns`)
  return { rows: found, p50: ms[0], p99: ms[1], p999: ms[2] }
}
