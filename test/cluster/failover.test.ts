/** A Cluster whose masters are failed over, in order and by SIGKILL, under load. */
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, inject, type TestContext, test } from 'vitest'
import type { Environment } from '../../shared/config.js'
import { Load } from '../faults/load.js'
import { expectNoUnexplainedDeaths, settled, startRig, TIMEOUT_MS } from '../faults/rig.js'
import { TestCluster } from '../support/test-cluster.js'

const ENVIRONMENT = { LEASE_SECONDS: '2' }
/** Less than a node may be silent. */
const AHEAD_MS = 400

/** The rest of them is for `npm run test:cluster`. */
const testAtLength = inject('cluster') ? test : () => undefined

let cluster: TestCluster
beforeAll(async () => {
  cluster = await TestCluster.start()
})
afterAll(() => cluster?.stop())
/** What a test has killed comes back, as a replica. */
afterEach(() => cluster.restore())

/** Plays a load while that happens to the Cluster: nothing of it may be lost or doubled, and nobody may die of it. */
async function expectStoredThrough(happens: () => Promise<void>, context: TestContext, settings: Environment = {}) {
  const rig = await startRig({ context, redis: cluster, environment: { ...ENVIRONMENT, ...settings } })
  const load = new Load({ calls: 100, turns: 60, rate: 2000 })
  await Promise.all([load.play(rig.url), happens()])
  await load.expectStored(rig.pool, 40_000)
  await settled(rig)
  expectNoUnexplainedDeaths(rig)
}

const orderClaim = 'masters_failed_over_in_order_under_load_lose_and_double_nothing'
testAtLength(orderClaim, { timeout: TIMEOUT_MS }, (context) => {
  const failOver = async () => {
    for (const master of await cluster.masters()) {
      await sleep(500)
      await cluster.failOver(master)
    }
  }
  return expectStoredThrough(failOver, context)
})

const killClaim = 'a_master_killed_ahead_of_its_replica_under_load_loses_nothing_that_was_acked_with_replicas_1'
test(killClaim, { timeout: TIMEOUT_MS }, (context) => {
  const kill = async () => {
    await sleep(800)
    const [victim] = await cluster.masters()
    await cluster.killMaster(victim!, AHEAD_MS)
    await sleep(300)
    await cluster.restore() // until then the new master has no replica, and its events wait
  }
  return expectStoredThrough(kill, context, { DURABILITY: 'replicas:1' })
})

const hangClaim =
  'a_master_that_hangs_and_wakes_up_after_its_replica_took_over_loses_nothing_that_was_acked_with_replicas_1'
testAtLength(hangClaim, { timeout: TIMEOUT_MS }, (context) => {
  const hang = async () => {
    await sleep(800)
    const [victim] = await cluster.masters()
    await cluster.hangMaster(victim!)
    await cluster.untilWhole()
  }
  return expectStoredThrough(hang, context, { DURABILITY: 'replicas:1' })
})
