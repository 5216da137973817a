/** A Cluster whose masters are failed over, in order and by SIGKILL, under load. */
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, inject, test } from 'vitest'
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

testAtLength(
  'masters_failed_over_in_order_under_load_lose_and_double_nothing',
  { timeout: TIMEOUT_MS },
  async (context) => {
    const rig = await startRig({ context, redis: cluster, environment: ENVIRONMENT })
    const load = new Load({ calls: 100, turns: 60, rate: 2000 })
    const failOver = async () => {
      for (const master of await cluster.masters()) {
        await sleep(500)
        await cluster.failOver(master)
      }
    }
    await Promise.all([load.play(rig.url), failOver()])
    await load.expectStored(rig.pool, 40_000)
    await settled(rig)
    expectNoUnexplainedDeaths(rig)
  },
)

const killClaim = 'a_master_killed_ahead_of_its_replica_under_load_loses_nothing_that_was_acked_with_replicas_1'
test(killClaim, { timeout: TIMEOUT_MS }, async (context) => {
  const rig = await startRig({ context, redis: cluster, environment: { ...ENVIRONMENT, DURABILITY: 'replicas:1' } })
  const load = new Load({ calls: 100, turns: 60, rate: 2000 })
  const kill = async () => {
    await sleep(800)
    const [victim] = await cluster.masters()
    await cluster.killMaster(victim!, AHEAD_MS)
    await sleep(300)
    await cluster.restore() // until then the new master has no replica, and its events wait
  }
  await Promise.all([load.play(rig.url), kill()])
  await load.expectStored(rig.pool, 40_000)
  await settled(rig)
  expectNoUnexplainedDeaths(rig)
})

const hangClaim =
  'a_master_that_hangs_and_wakes_up_after_its_replica_took_over_loses_nothing_that_was_acked_with_replicas_1'
testAtLength(hangClaim, { timeout: TIMEOUT_MS }, async (context) => {
  const rig = await startRig({ context, redis: cluster, environment: { ...ENVIRONMENT, DURABILITY: 'replicas:1' } })
  const load = new Load({ calls: 100, turns: 60, rate: 2000 })
  const hang = async () => {
    await sleep(800)
    const [victim] = await cluster.masters()
    await cluster.hangMaster(victim!)
    await cluster.untilWhole()
  }
  await Promise.all([load.play(rig.url), hang()])
  await load.expectStored(rig.pool, 40_000)
  await settled(rig)
  expectNoUnexplainedDeaths(rig)
})
