/** What more ingests bring: sent until acked, with no sink; one drains it afterwards, so that all rows can be compared. */
import type { Bench } from './context.js'
import { median, type Round, WARM_UP_SHARE } from './end-to-end.js'
import { makeLoad } from './load.js'
import { measure } from './machine.js'
import { pidsOf, startServices, storePids } from './processes.js'
import { figure } from './report.js'
import { untilFinalized, verify } from './verify.js'

export async function ingests(bench: Bench): Promise<void> {
  const { calls, turns, rounds, quick } = bench.options
  let one: number | undefined
  for (const count of quick ? [1, 2] : [1, 2, 4]) {
    await bench.reset()
    const done: Round[] = []
    for (let round = 1; round <= rounds; round++) done.push(await acceptRound(bench, count))
    const { turnsPerSecond, usage, verifiedRows } = median(done, (round) => round.turnsPerSecond)
    one ??= turnsPerSecond
    bench.progress.say(`${count} ingests: ${Math.round(turnsPerSecond)} acked turns/s`)
    bench.rows.push({
      scenario: `acked by ${count} ${count === 1 ? 'ingest' : 'ingests'}, ${calls} × ${turns}`,
      turnsPerSecond,
      usage,
      verifiedRows,
      figures: [figure('÷ one ingest', turnsPerSecond / one, '')],
    })
  }
}

async function acceptRound(bench: Bench, count: number): Promise<Round> {
  const { calls, turns } = bench.options
  const load = makeLoad(calls, turns)
  const ingests = await startServices(bench, 'ingest', count)
  const urls = ingests.map(({ url }) => url)
  // The code has run once before it is measured.
  const warmUp = makeLoad(Math.ceil(calls * WARM_UP_SHARE), turns)
  await warmUp.send(urls)
  bench.progress.step(`sending to ${count}`, load.turns)
  const speed = await measure({ ...storePids(bench), ingest: pidsOf(ingests) }, load.turns, () =>
    load.send(urls, (events) => bench.progress.at(events)),
  )
  await Promise.all(ingests.map((ingest) => ingest.stop()))
  const [sink] = await startServices(bench, 'sink')
  bench.progress.step('waiting until all calls are final', calls)
  await untilFinalized(bench, load)
  const verifiedRows = await verify(bench, load)
  await sink!.stop()
  return { ...speed, verifiedRows }
}
