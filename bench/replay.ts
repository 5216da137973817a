/** Tables that were truncated, replayed from the streams while calls go on; against plain COPY of the very same rows. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { compareSchemas } from '../cli/replay/compare.js'
import { childEnvironment } from '../shared/config.js'
import { createLog } from '../shared/log.js'
import { PACKAGE_ROOT } from '../shared/package-root.js'
import { createPool, type Pool } from '../shared/postgres.js'
import { connectRedis, readPartitions } from '../shared/redis.js'
import { Backlog } from '../sink/backlog.js'
import { copyRanges } from './drain.js'
import { sendAtRate } from './end-to-end.js'
import { cpuNow, cpuSince } from './machine.js'
import {
  type Bench,
  connectAll,
  cpuRows,
  databaseOf,
  makeLoad,
  type Result,
  row,
  start,
  untilFinalized,
} from './scenario.js'

/** What is sent at a time, so that it need not all be in memory. */
const CALLS_A_LOAD = 500
const LIVE_RATE = 1000
const LIVE_CALLS = 100
const SAMPLE_MS = 250
const TABLES = ['call_transcript_turns', 'call_sessions']

export async function replayTables(bench: Bench): Promise<Result[]> {
  const pool = createPool(databaseOf(bench), 'bench', 2)
  const ingest = await start(bench, 'ingest')
  const sink = await start(bench, 'sink')
  try {
    await pool.query('TRUNCATE call_transcript_turns, call_events, call_sessions')
    let sent = 0
    for (let calls = 0; calls < bench.calls; calls += CALLS_A_LOAD) {
      const load = makeLoad(Math.min(CALLS_A_LOAD, bench.calls - calls), bench.turns)
      await load.send(ingest.url)
      await untilFinalized(pool, load)
      sent += load.turns
    }
    await keepCopy(pool)
    bench.say(`replay: ${sent} turns are stored`)
    const figures: Result[] = []
    for (const tables of [TABLES, [...TABLES, 'call_events']]) {
      figures.push(...(await replayOnce(bench, pool, ingest.url, tables, sent)))
    }
    await pool.query('DROP SCHEMA before CASCADE')
    return figures
  } finally {
    await ingest.stop()
    await sink.stop()
    await pool.end()
  }
}

/** A schema with the tables as they are. */
async function keepCopy(pool: Pool): Promise<void> {
  await pool.query('CREATE SCHEMA before')
  for (const table of [...TABLES, 'call_events']) {
    await pool.query(`CREATE TABLE before.${table} (LIKE public.${table} INCLUDING ALL)`)
    await pool.query(`INSERT INTO before.${table} SELECT * FROM public.${table}`)
    await pool.query(`ANALYZE before.${table}`)
  }
  await pool.query('CHECKPOINT')
}

async function replayOnce(bench: Bench, pool: Pool, ingestUrl: string, tables: string[], turns: number) {
  const redis = await connectRedis(bench.redis.url, createLog('bench', 'silent'))
  const partitions = await readPartitions(redis, 64)
  const backlog = new Backlog(redis, partitions)
  const clients = await connectAll(ingestUrl)
  const live = { isOver: false, sent: 0, lags: [] as number[] }
  const prefix = `live-${Date.now()}-`
  const sending = (async () => {
    for (let second = 0; !live.isOver; second++) {
      live.sent += await sendAtRate(clients, prefix, LIVE_CALLS, LIVE_RATE, 1, (second * LIVE_RATE) / LIVE_CALLS)
    }
  })()
  const looking = (async () => {
    for (; !live.isOver; await sleep(SAMPLE_MS)) live.lags.push((await backlog.read()).lagMs)
  })()
  await pool.query(`TRUNCATE ${tables.join(', ')}`)
  const { seconds, entries, cpu } = await runReplay(bench, turns)
  live.isOver = true
  await Promise.all([sending, looking])
  await Promise.all(clients.map((client) => client.flush()))
  await Promise.all(clients.map((client) => client.close()))
  await untilStored(pool, prefix, live.sent)

  const schemas = { main: 'public', other: 'before' }
  const same = await compareSchemas({ ...schemas, pool, callSid: undefined, redis: undefined, partitions, sinceMs: 0 })
  redis.disconnect()
  if (same.calls !== bench.calls || same.missing + same.extra + same.different > 0) {
    throw new Error(`what was replayed is not what was there: ${JSON.stringify(same)}`)
  }
  const copied = await copyRanges(pool, 'before.call_transcript_turns', turns)
  const rate = turns / seconds
  const lags = live.lags.sort((a, b) => a - b)
  const lag = (share: number) => lags[Math.min(lags.length - 1, Math.floor(lags.length * share))] ?? 0
  bench.say(`replay of ${tables.length} tables: ${Math.round(rate)} turns/s, plain COPY ${Math.round(copied)} rows/s`)
  const scenario = `replay, ${bench.calls} × ${bench.turns}, ${tables.length} tables`
  return [
    row(scenario, 'replayed and finalized', rate, 'turns/s'),
    row(scenario, 'entries', entries, ''),
    row(scenario, 'plain COPY of the same rows, binary', copied, 'rows/s'),
    row(scenario, 'ratio', rate / copied, ''),
    row(scenario, 'live turns meanwhile', live.sent, ''),
    ...cpuRows(scenario, cpu),
    row(scenario, 'lag of the live turns, median', lag(0.5), 'ms'),
    row(scenario, 'lag of the live turns, most', lag(1), 'ms'),
  ]
}

/** @returns also the CPU time a turn; that of Redis and PostgreSQL is for the live turns, too */
async function runReplay(bench: Bench, turns: number) {
  const child = spawn(process.execPath, [join(PACKAGE_ROOT, 'dist/cli/calltape.js'), 'replay', '--all', '--json'], {
    env: childEnvironment({ REDIS_URL: bench.redis.url, ...databaseOf(bench) }),
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const pids = { redis: bench.redis.pid, postgres: bench.postgres.pid }
  const before = cpuNow(pids)
  const own = { replay: child.pid! }
  let cpu: Record<string, number> = {}
  const none = cpuNow({ replay: child.pid! })
  const timer = setInterval(() => {
    if (child.exitCode === null) cpu = cpuSince(none, own, turns)
  }, SAMPLE_MS)
  let out = ''
  child.stdout.on('data', (data) => {
    out += data
  })
  const [code] = (await once(child, 'close')) as [number]
  clearInterval(timer)
  if (code !== 0) throw new Error(`replay exited with ${code}`)
  const { seconds, entries } = JSON.parse(out) as { seconds: number; entries: number }
  return { seconds, entries, cpu: { ...cpu, ...cpuSince(before, pids, turns) } }
}

/** All live turns, each once. */
async function untilStored(pool: Pool, prefix: string, expected: number): Promise<void> {
  const sql = 'SELECT count(*)::int AS rows FROM call_transcript_turns WHERE call_sid >= $1 AND call_sid < $2'
  const deadline = Date.now() + 60_000
  for (;;) {
    const { rows } = await pool.query<{ rows: number }>(sql, [prefix, `${prefix}~`])
    if (rows[0]!.rows === expected) return
    if (Date.now() > deadline) throw new Error(`${rows[0]!.rows} rows of ${expected} live turns`)
    await sleep(200)
  }
}
