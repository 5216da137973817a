/** From the WebSocket to COMMIT, at full speed. */
import type { Bench } from './context.js'
import { makeLoad } from './load.js'
import { measure, pipelineMicros, type Speed } from './machine.js'
import { type Pipeline, startPipeline } from './processes.js'
import { figure, type Row } from './report.js'
import { untilFinalized, verify } from './verify.js'

/** Of a scenario at full speed. */
export interface Round extends Speed {
  verifiedRows: number
}

interface PipelineRound extends Round {
  ackedPerSecond: number
}

/** The middle one by `by`. */
export function median<T>(rounds: T[], by: (round: T) => number): T {
  return rounds.toSorted((a, b) => by(a) - by(b))[Math.floor(rounds.length / 2)]!
}

/** Sent until finalized; then all rows are compared. */
async function playRound(bench: Bench, pipeline: Pipeline, calls: number, textBytes?: number): Promise<PipelineRound> {
  const { turns } = bench.options
  const load = makeLoad(calls, turns, textBytes)
  bench.progress.step('sending', calls * (turns + 2))
  let ackedMs = 0
  const speed = await measure(pipeline.pids, load.turns, async () => {
    const began = performance.now()
    await load.send(pipeline.urls, (events) => bench.progress.at(events))
    ackedMs = performance.now() - began
    bench.progress.step('waiting until all calls are final', calls)
    await untilFinalized(bench, load)
  })
  return { ...speed, ackedPerSecond: load.turns / (ackedMs / 1000), verifiedRows: await verify(bench, load) }
}

/** Of a round's calls: what runs for the first time is slow, and no service is young for long. */
export const WARM_UP_SHARE = 0.2

/** Rounds on fresh stores; the median by rate, as a row. */
async function playRounds(bench: Bench, scenario: string, calls: number, textBytes?: number): Promise<Row> {
  const { rounds, turns } = bench.options
  await bench.reset()
  const pipeline = await startPipeline(bench)
  const played: PipelineRound[] = []
  try {
    await playRound(bench, pipeline, Math.ceil(calls * WARM_UP_SHARE), textBytes)
    for (let round = 1; round <= rounds; round++) {
      played.push(await playRound(bench, pipeline, calls, textBytes))
      const { turnsPerSecond } = played.at(-1)!
      bench.progress.say(`${scenario}, round ${round} of ${rounds}: ${Math.round(turnsPerSecond)} turns/s`)
    }
  } finally {
    await pipeline.stop()
  }
  const { turnsPerSecond, ackedPerSecond, usage, verifiedRows } = median(played, (round) => round.turnsPerSecond)
  return {
    scenario: `${scenario}, ${calls} × ${turns}`,
    turnsPerSecond,
    usage,
    verifiedRows,
    figures: [
      figure('acked', ackedPerSecond, 'turns/s'),
      figure('slowest round', Math.min(...played.map((round) => round.turnsPerSecond)), 'turns/s'),
      figure('fastest', Math.max(...played.map((round) => round.turnsPerSecond)), 'turns/s'),
    ],
  }
}

/** Measured once in a run, for whoever compares with it. */
export function fullSpeed(bench: Bench): Promise<Row> {
  return bench.once(fullSpeed, async () => {
    const row = await playRounds(bench, 'end to end', bench.options.calls)
    bench.rows.push(row)
    bench.measured.endToEndTurns = row.turnsPerSecond
    bench.measured.endToEndMicros = pipelineMicros(row.usage!)
    return row
  })
}

export async function endToEnd(bench: Bench): Promise<void> {
  await fullSpeed(bench)
}

const SHORT_BYTES = 20
const LONG_BYTES = 2048

/** Texts of a word or two, and of a page. */
export async function texts(bench: Bench): Promise<void> {
  const { calls } = bench.options
  bench.rows.push(await playRounds(bench, `texts of ${SHORT_BYTES} bytes`, calls, SHORT_BYTES))
  // A quarter of the turns are still three times the bytes.
  bench.rows.push(await playRounds(bench, 'texts of 2 KiB', Math.ceil(calls / 4), LONG_BYTES))
}
