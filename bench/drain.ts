/** A backlog, drained at full speed; against plain COPY of the very same rows into the very same table. */
import { Drain, type Drained } from './backlog.js'
import type { Bench } from './context.js'
import { median } from './end-to-end.js'
import { saturated } from './machine.js'
import { copyEncoded, copyRows } from './plain-copy.js'
import { figure } from './report.js'
import { verifyTurns } from './verify.js'

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

/** What more sinks bring where the sink is the bottleneck; and where it no longer is, what then is. */
export async function sinks(bench: Bench): Promise<void> {
  const { calls, turns, rounds, quick } = bench.options
  const rates = new Map<number, number>()
  for (const count of quick ? [1, 2] : [1, 2, 4]) {
    const draining = await Drain.open(bench, count)
    const done: Drained[] = []
    try {
      for (let round = 1; round <= rounds; round++) done.push(await draining.round(calls))
    } finally {
      await draining.stop()
    }
    const { turnsPerSecond, usage, verifiedRows } = median(done, (round) => round.turnsPerSecond)
    rates.set(count, turnsPerSecond)
    const ratio = turnsPerSecond / rates.get(1)!
    bench.progress.say(`${count} sinks: ${Math.round(turnsPerSecond)} turns/s, ${ratio.toFixed(2)} times one`)
    if (count === 2) Object.assign(bench.measured, { twoSinksToOne: ratio, twoSinksSaturated: saturated(usage) })
    bench.rows.push({
      scenario: `drain with ${count} ${count === 1 ? 'sink' : 'sinks'}, ${calls} × ${turns}`,
      turnsPerSecond,
      usage,
      verifiedRows,
      figures: [figure('÷ one sink', ratio, '')],
    })
  }
}
