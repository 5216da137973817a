/** SIGTERM under load, and restarts one after the other. */
import { setTimeout as sleep } from 'node:timers/promises'
import { expect, test } from 'vitest'
import type { Service } from '../support/processes.js'
import { Load } from './load.js'
import { backlogOf, expectNoUnexplainedDeaths, figureOf, settled, startRig, TIMEOUT_MS } from './rig.js'

const STOP_MS = 10_000
/** Of a machine that has other things to do; a lease that had to lapse would take 15 s. */
const LONGEST_PAUSE_MS = 5000

/** @throws unless it exits with code 0 within the 10 s that a container is given */
async function expectCleanStop(service: Service): Promise<void> {
  expect(await service.stop()).toMatchObject({ code: 0, signal: null })
  expect(service.lastStopMs).toBeLessThan(STOP_MS)
}

test.concurrent('a_sink_stopped_under_load_leaves_nothing_in_hand_and_nothing_to_be_redelivered', {
  timeout: TIMEOUT_MS,
}, async (context) => {
  const rig = await startRig({ context, ingests: 1, sinks: 1 })
  const [sink] = rig.sinks
  const load = new Load({ calls: 100, turns: 60, rate: 3000 })
  const played = load.play(rig.url)
  await sleep(800)
  await expectCleanStop(sink!)
  expect(await backlogOf(rig)).toMatchObject({ leased: 0 })
  await sleep(300)
  await sink!.start()
  await played
  await load.expectStored(rig.pool)
  await settled(rig)
  expect(await figureOf(sink!, 'turns_total')).toBeGreaterThan(0)
  for (const name of ['duplicate_turns_total', 'staged_batches_total', 'reclaimed_total', 'retries_total']) {
    expect([name, await figureOf(sink!, name)]).toEqual([name, 0])
  }
})

test.concurrent('an_ingest_stopped_under_load_hands_its_clients_over', { timeout: TIMEOUT_MS }, async (context) => {
  const rig = await startRig({ context, sinks: 1 })
  const load = new Load({ calls: 100, turns: 60, rate: 3000 })
  const played = load.play(rig.url)
  await sleep(800)
  await expectCleanStop(rig.ingests[0]!)
  await played
  expect(load.reconnects).toBeGreaterThan(0)
  await load.expectStored(rig.pool)
  expectNoUnexplainedDeaths(rig)
})

test.concurrent('a_rolling_restart_under_load_shows_no_gap', { timeout: TIMEOUT_MS }, async (context) => {
  const rig = await startRig({ context })
  const load = new Load({ calls: 100, turns: 80, rate: 1600 })
  const played = load.play(rig.url)
  await sleep(500)
  for (const service of [rig.sinks[0], rig.ingests[0], rig.sinks[1], rig.ingests[1]]) {
    await expectCleanStop(service!)
    await service!.start()
  }
  await played
  await load.expectStored(rig.pool)
  expectNoUnexplainedDeaths(rig)
  const { rows } = await rig.pool.query<{ pause: number; latency: number }>(
    `SELECT max(extract(epoch FROM pause) * 1000)::float8 AS pause, max(extract(epoch FROM latency) * 1000)::float8 AS latency
     FROM (SELECT persisted_at - lag(persisted_at) OVER (ORDER BY persisted_at) AS pause, persisted_at - ingested_at AS latency
           FROM call_transcript_turns) times`,
  )
  // Between one commit and the next; and from a turn's arrival in Redis to its commit.
  expect(rows[0]!.pause).toBeLessThan(LONGEST_PAUSE_MS)
  expect(rows[0]!.latency).toBeLessThan(LONGEST_PAUSE_MS)
})
