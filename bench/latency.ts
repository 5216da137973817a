/** How long a turn takes from sending to COMMIT, at rates that leave room. */

import type { Client } from '../client/client.js'
import type { Bench } from './context.js'
import { fullSpeed } from './end-to-end.js'
import { closeAll, connectAll, OpenCalls } from './load.js'
import { Meter, type Usage } from './machine.js'
import { type Pipeline, startPipeline } from './processes.js'
import { readLatency, untilStored, verifyOpen } from './verify.js'

const RATES = [1000, 5000]
const TARGET_RATE = 5000
/** What goes before: V8 takes that long until it has compiled what runs at these rates (at 1,000/s, a fifth less CPU a turn after it). */
const WARM_UP_SECONDS = 12

export async function latency(bench: Bench): Promise<void> {
  const half = Math.round((await fullSpeed(bench)).turnsPerSecond! / 2)
  for (const rate of [...RATES, half]) await latencyAt(bench, rate, rate === half ? ' (half of full speed)' : '')
}

async function latencyAt(bench: Bench, rate: number, note: string): Promise<void> {
  await bench.reset()
  const pipeline = await startPipeline(bench)
  try {
    const clients = await connectAll(pipeline.urls)
    await warmUp(bench, clients, rate)
    const open = new OpenCalls(bench.options.calls)
    const usage = await talkAt(bench, pipeline, open, clients, rate)
    await closeAll(clients)
    const latencyMs = await readLatency(bench, open)
    const verifiedRows = await verifyOpen(bench, open)
    bench.progress.say(`latency at ${rate}/s: p50 ${latencyMs.p50.toFixed(1)} ms, p99 ${latencyMs.p99.toFixed(1)} ms`)
    bench.rows.push({ scenario: `latency at ${rate}/s${note}`, turnsPerSecond: rate, latencyMs, usage, verifiedRows })
    if (rate !== TARGET_RATE) return
    bench.measured.latencyP50 = latencyMs.p50
    bench.measured.latencyP99 = latencyMs.p99
  } finally {
    await pipeline.stop()
  }
}

/** At the rate that is to be measured, with calls of its own. Ends with nothing left to do. */
export async function warmUp(bench: Bench, clients: Client[], rate: number): Promise<void> {
  const { calls, quick, seconds } = bench.options
  const turns = rate * (quick ? seconds : WARM_UP_SECONDS)
  bench.progress.step(`warming up at ${rate}/s`)
  const open = new OpenCalls(calls)
  await open.talk(clients, rate, (sent) => sent >= turns)
  await untilStored(bench, open.run.prefix, open.turns)
}

/** Sends evenly, for as long as the bench was told to. @returns what that cost */
export async function talkAt(
  bench: Bench,
  { pids }: Pipeline,
  open: OpenCalls,
  clients: Client[],
  rate: number,
): Promise<Usage> {
  const total = rate * bench.options.seconds
  bench.progress.step(`sending ${rate}/s`, total)
  const meter = new Meter(pids)
  const sent = await open.talk(clients, rate, (turns) => {
    bench.progress.at(turns)
    return turns >= total
  })
  return meter.stop(sent)
}
