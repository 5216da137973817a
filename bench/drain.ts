/** A backlog, drained at full speed; against plain COPY of the very same rows into the very same table. */
import type { Environment } from '../shared/config.js'
import { Drain, type Drained } from './backlog.js'
import type { Bench } from './context.js'
import { median } from './end-to-end.js'
import { farAway } from './far.js'
import { saturated } from './machine.js'
import { copyEncoded, copyRows } from './plain-copy.js'
import { figure } from './report.js'
import { verifyTurns } from './verify.js'

/** Each way: as from one continent's side to the other. */
const FAR_MS = 25

interface Round extends Drained {
  /** Plain COPY, rows/s: by a program that encodes; of what was encoded beforehand. */
  copied: number
  text: number
  binary: number
}

export async function drain(bench: Bench): Promise<void> {
  const { calls, turns, rounds } = bench.options
  const { pool } = bench.stores
  const done: Round[] = []
  const draining = await Drain.open(bench, 1)
  try {
    for (let round = 1; round <= rounds; round++) {
      const drained = await draining.round(calls)
      const count = drained.load.turns
      bench.progress.step('plain COPY of the same rows')
      const binary = await copyEncoded(pool, count, '(FORMAT binary)')
      const text = await copyEncoded(pool, count, '')
      const copied = await copyRows(pool, count)
      await verifyTurns(bench, pool, drained.load)
      done.push({ ...drained, copied, text, binary })
      const [rate, plain] = [drained.turnsPerSecond, copied].map(Math.round)
      const ratio = (drained.turnsPerSecond / copied).toFixed(2)
      bench.progress.say(
        `drain, round ${round} of ${rounds}: ${rate} turns/s, plain COPY ${plain} rows/s, ratio ${ratio}`,
      )
    }
  } finally {
    await draining.stop()
  }
  const { turnsPerSecond, usage, verifiedRows, copied, text, binary } = median(
    done,
    (round) => round.turnsPerSecond / round.copied,
  )
  bench.measured.drainToCopy = turnsPerSecond / copied
  bench.rows.push(
    {
      scenario: `drain, ${calls} × ${turns}`,
      turnsPerSecond,
      usage,
      verifiedRows,
      figures: [
        figure('÷ plain COPY', turnsPerSecond / copied, ''),
        figure('÷ COPY of text encoded beforehand', turnsPerSecond / text, ''),
        figure('÷ of binary', turnsPerSecond / binary, ''),
      ],
    },
    { scenario: 'ceiling: plain COPY of the same rows', turnsPerSecond: copied, verifiedRows },
    { scenario: 'ceiling: COPY of text encoded beforehand', turnsPerSecond: text, verifiedRows },
    { scenario: 'ceiling: COPY of binary encoded beforehand', turnsPerSecond: binary, verifiedRows },
  )
}

/** What more sinks bring where all processes share the machine; if it is not the sink that is short of CPU, little. */
export async function sinks(bench: Bench): Promise<void> {
  const counts = bench.options.quick ? [1, 2] : [1, 2, 4]
  await compareSinks(bench, counts, '', {})
}

/**
 * What a second sink brings where the sink is the bottleneck: it waits for a PostgreSQL that is far away, and nothing else has much to
 * do meanwhile.
 */
export async function farSinks(bench: Bench): Promise<void> {
  const far = await farAway(bench.stores.postgres.url, FAR_MS)
  try {
    const where = `, PostgreSQL ${FAR_MS} ms away`
    const two = await compareSinks(bench, [1, 2], where, { DATABASE_URL: far.url })
    Object.assign(bench.measured, { twoSinksToOne: two.ratio, twoSinksSaturated: saturated(two.usage) })
  } finally {
    await far.stop()
  }
}

/** @returns of the most sinks */
async function compareSinks(bench: Bench, counts: number[], where: string, ofSinks: Environment) {
  const { calls, turns, rounds } = bench.options
  const medians: Drained[] = []
  let ratio = 1
  for (const count of counts) {
    const draining = await Drain.open(bench, count, ofSinks)
    const done: Drained[] = []
    try {
      for (let round = 1; round <= rounds; round++) done.push(await draining.round(calls))
    } finally {
      await draining.stop()
    }
    const typical = median(done, (round) => round.turnsPerSecond)
    medians.push(typical)
    const { turnsPerSecond, usage, verifiedRows } = typical
    ratio = turnsPerSecond / medians[0]!.turnsPerSecond
    const title = `${count} ${count === 1 ? 'sink' : 'sinks'}${where}`
    bench.progress.say(`${title}: ${Math.round(turnsPerSecond)} turns/s, ${ratio.toFixed(2)} times one`)
    bench.rows.push({
      scenario: `drain with ${title}, ${calls} × ${turns}`,
      turnsPerSecond,
      usage,
      verifiedRows,
      figures: [figure('÷ one sink', ratio, '')],
    })
  }
  return { ratio, usage: medians.at(-1)!.usage }
}
