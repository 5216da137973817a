/** Many calls open at once: what a turn costs and how long it takes must not feel their number; and what an idle one takes. */

import type { Client } from '../client/client.js'
import type { Bench } from './context.js'
import { talkAt, warmUp } from './latency.js'
import { closeAll, connectAll, OpenCalls } from './load.js'
import { measure, pipelineMicros, residentMiB, type Speed } from './machine.js'
import { type Pipeline, startPipeline } from './processes.js'
import { figure } from './report.js'
import { readSlowCommands, watchSlowCommands } from './slow-commands.js'
import { readLatency, untilStored, verifyOpen } from './verify.js'

const TURNS_EACH = 20
const TURNS_PER_SECOND = 5000

export async function openCalls(bench: Bench): Promise<void> {
  const micros = new Map<number, number>()
  for (const calls of bench.options.open) {
    await bench.reset()
    const pipeline = await startPipeline(bench)
    try {
      micros.set(calls, await runWith(bench, pipeline, calls))
    } finally {
      await pipeline.stop()
    }
  }
  bench.measured.micros1k = micros.get(1000)
  bench.measured.micros100k = micros.get(100_000)
}

/** @returns CPU µs a turn, over all processes, at the fixed rate */
async function runWith(bench: Bench, pipeline: Pipeline, calls: number): Promise<number> {
  const clients = await connectAll(pipeline.urls)
  await warmUp(bench, clients, TURNS_PER_SECOND)
  const open = new OpenCalls(calls)
  const before = { redis: await usedBytes(bench), ingest: residentMiB(pipeline.pids.ingest!) }
  const filling = await fill(bench, pipeline, open, clients)
  const text = open.textBytes() / calls
  const grown = ((await usedBytes(bench)) - before.redis) / calls
  const ingestGrown = residentMiB(pipeline.pids.ingest!) - before.ingest
  if (!bench.options.quick) bench.measured.bytesAnOpenCall = grown - text

  const { client } = bench.stores
  await bench.untilRewritten() // what filling has set off is not what an open call costs
  await watchSlowCommands(client)
  const usage = await talkAt(bench, pipeline, open, clients, TURNS_PER_SECOND)
  const slow = await readSlowCommands(client)
  await closeAll(clients)
  const latencyMs = await readLatency(bench, open)
  const verifiedRows = await verifyOpen(bench, open)
  bench.progress.say(`${calls} open calls: p50 ${latencyMs.p50.toFixed(1)} ms, p99 ${latencyMs.p99.toFixed(1)} ms`)
  const scenario = `${calls.toLocaleString('en-US')} open calls`
  bench.rows.push(
    { scenario: `${scenario}, opened with ${TURNS_EACH} turns each`, ...filling, verifiedRows },
    {
      scenario: `${scenario}, ${TURNS_PER_SECOND} turns/s`,
      turnsPerSecond: TURNS_PER_SECOND,
      latencyMs,
      usage,
      verifiedRows,
      figures: [
        figure('an idle one in Redis', grown - text, 'bytes'),
        figure('and its text', text, 'bytes'),
        figure('ingest grew by', ingestGrown, 'MiB'),
        ...slow,
      ],
    },
  )
  return pipelineMicros(usage)
}

/** Opens them at full speed. */
async function fill(bench: Bench, pipeline: Pipeline, open: OpenCalls, clients: Client[]): Promise<Speed> {
  bench.progress.step('opening the calls', open.calls * (TURNS_EACH + 1))
  return measure(pipeline.pids, open.calls * TURNS_EACH, async () => {
    await open.fill(clients, TURNS_EACH, (sent) => bench.progress.at(sent))
    bench.progress.step('waiting until all is stored', open.turns)
    await untilStored(bench, open.run.prefix, open.turns)
  })
}

/** What is in Redis takes so much. */
export async function usedBytes({ stores: { client } }: Bench): Promise<number> {
  return Number(/^used_memory:(\d+)/m.exec(await client.info('memory'))?.[1])
}
