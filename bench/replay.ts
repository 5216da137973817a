/** Tables that were truncated, replayed from the streams while calls go on; against plain COPY of the very same rows. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { compareSchemas } from '../cli/replay/compare.js'
import { childEnvironment } from '../shared/config.js'
import { PACKAGE_ROOT } from '../shared/package-root.js'
import { readPartitions } from '../shared/redis.js'
import { Backlog } from '../sink/backlog.js'
import type { Bench } from './context.js'
import { closeAll, connectAll, makeLoad, OpenCalls } from './load.js'
import { Meter, type Usage } from './machine.js'
import { copyRanges } from './plain-copy.js'
import { type Pipeline, startPipeline, storePids } from './processes.js'
import { figure } from './report.js'
import { untilFinalized, untilStored, verify, verifyOpen } from './verify.js'

/** What is sent at a time, so that it need not all be in memory. */
const CALLS_A_LOAD = 500
const LIVE_RATE = 1000
const LIVE_CALLS = 100
const SAMPLE_MS = 250
const TABLES = ['call_transcript_turns', 'call_sessions']
const ALL_TABLES = [...TABLES, 'call_events']

export async function replay(bench: Bench): Promise<void> {
  const { calls, turns } = bench.options
  await bench.reset()
  const pipeline = await startPipeline(bench)
  try {
    for (let sent = 0; sent < calls; sent += CALLS_A_LOAD) {
      bench.progress.step(`storing what is to be replayed, from call ${sent} on`)
      const load = makeLoad(Math.min(CALLS_A_LOAD, calls - sent), turns)
      await load.send(pipeline.urls)
      await untilFinalized(bench, load)
      await verify(bench, load)
    }
    await keepCopy(bench)
    for (const tables of [TABLES, ALL_TABLES]) await replayOnce(bench, pipeline, tables)
    await bench.stores.pool.query('DROP SCHEMA before CASCADE')
  } finally {
    await pipeline.stop()
  }
}

/** A schema with the tables as they are. */
async function keepCopy({ stores: { pool } }: Bench): Promise<void> {
  await pool.query('CREATE SCHEMA before')
  for (const table of ALL_TABLES) {
    await pool.query(`CREATE TABLE before.${table} (LIKE public.${table} INCLUDING ALL)`)
    await pool.query(`INSERT INTO before.${table} SELECT * FROM public.${table}`)
    await pool.query(`ANALYZE before.${table}`)
  }
  await pool.query('CHECKPOINT')
}

async function replayOnce(bench: Bench, pipeline: Pipeline, tables: string[]): Promise<void> {
  const { calls, turns } = bench.options
  const { pool, client } = bench.stores
  const expected = calls * turns
  const partitions = await readPartitions(client, 64)
  const backlog = new Backlog(client, partitions)
  const clients = await connectAll(pipeline.urls)
  const live = new OpenCalls(LIVE_CALLS)
  const lags: number[] = []
  let isOver = false
  const talking = live.talk(clients, LIVE_RATE, () => isOver)
  const looking = (async () => {
    for (; !isOver; await sleep(SAMPLE_MS)) lags.push((await backlog.read()).lagMs)
  })()
  await pool.query(`TRUNCATE ${tables.join(', ')}`)
  const replayed = await runReplay(bench, expected).finally(() => {
    isOver = true
  })
  await Promise.all([talking, looking])
  await closeAll(clients)
  await untilStored(bench, live.run.prefix, live.turns)
  const liveRows = await verifyOpen(bench, live)

  const same = await compareSchemas({
    ...{ pool, main: 'public', other: 'before', callSid: undefined, redis: undefined, partitions, sinceMs: 0 },
  })
  if (same.calls !== calls || same.missing + same.extra + same.different > 0) {
    throw new Error(`what was replayed is not what was there: ${JSON.stringify(same)}`)
  }
  const copied = await copyRanges(pool, 'before.call_transcript_turns', expected)
  const turnsPerSecond = expected / replayed.seconds
  const lag = (share: number) =>
    lags.toSorted((a, b) => a - b)[Math.min(lags.length - 1, Math.floor(lags.length * share))] ?? 0
  bench.progress.say(`replay of ${tables.length} tables: ${Math.round(turnsPerSecond)} turns/s`)
  bench.rows.push({
    scenario: `replay of ${tables.length} tables, ${calls} × ${turns}, ${LIVE_RATE} turns/s arriving`,
    ...{ turnsPerSecond, usage: replayed.usage, verifiedRows: expected + liveRows },
    figures: [
      figure('÷ plain binary COPY of the same rows alone', turnsPerSecond / copied, ''),
      figure('lag of the live turns: median', lag(0.5), 'ms'),
      figure('most', lag(1), 'ms'),
    ],
  })
}

/** `calltape replay`, in the column of the sink; that of Redis and PostgreSQL is for the live turns, too. */
async function runReplay(bench: Bench, turns: number): Promise<{ seconds: number; usage: Usage }> {
  bench.progress.step('replaying')
  const child = spawn(process.execPath, [join(PACKAGE_ROOT, 'dist/cli/calltape.js'), 'replay', '--all', '--json'], {
    env: childEnvironment({ REDIS_URL: bench.stores.redis.url, ...bench.stores.database }),
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  bench.atEnd(async () => void child.kill('SIGKILL'))
  const meter = new Meter({ ...storePids(bench), sink: [child.pid!] })
  // Once it has ended there is nothing of it to be read: what it had used shortly before has to do.
  let usage = meter.read(turns)
  const timer = setInterval(() => {
    if (child.exitCode === null && child.signalCode === null) usage = meter.read(turns)
  }, SAMPLE_MS)
  let [out, err] = ['', '']
  child.stdout.on('data', (data) => (out += data))
  child.stderr.on('data', (data) => (err += data))
  const [code] = (await once(child, 'close')) as [number]
  clearInterval(timer)
  meter.stop(turns)
  if (code !== 0) throw new Error(`replay exited with ${code}: ${err}`)
  return { seconds: (JSON.parse(out) as { seconds: number }).seconds, usage }
}
