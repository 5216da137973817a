/** Slots that move from one master to another and back while turns stream in. */
import { setTimeout as sleep } from 'node:timers/promises'
import { Command } from 'ioredis'
import { afterAll, beforeAll, expect, inject, onTestFinished, test } from 'vitest'
import { type PartitionKeys, Partitions } from '../../shared/keys.js'
import { connectRedis } from '../../shared/redis.js'
import { Leases } from '../../sink/lease.js'
import { Load } from '../faults/load.js'
import { expectNoUnexplainedDeaths, figureOf, type Rig, settled, startRig, TIMEOUT_MS } from '../faults/rig.js'
import { log, until } from '../support/stores.js'
import { callsIn, committed, LIMITS, Producer, take, turn } from '../support/streams.js'
import { TestCluster } from '../support/test-cluster.js'

let cluster: TestCluster
beforeAll(async () => {
  cluster = await TestCluster.start({ replicas: 0 })
})
afterAll(() => cluster?.stop())

const slotOf = ({ ready }: PartitionKeys) => new Command('exists', [ready]).getSlot()

test('slots_moved_back_and_forth_under_load_lose_double_and_reorder_nothing', {
  timeout: TIMEOUT_MS,
}, async (context) => {
  const rig = await startRig({ context, redis: cluster, environment: { LEASE_SECONDS: '2' } })
  const load = new Load({ calls: inject('cluster') ? 600 : 150, turns: 40, rate: 2500 })
  let isPlayed = false
  const reshard = async () => {
    const masters = await cluster.masters()
    let moves = 0
    for (let p = 0; !isPlayed; p = (p + 1) % 16) {
      const slot = slotOf(rig.partitions.at(p))
      const home = await cluster.masterOf(slot)
      const other = masters[(masters.indexOf(home) + 1) % masters.length]!
      for (const to of [other, home]) {
        await cluster.moveSlot(slot, to, { onHalf: () => sleep(30) })
        moves++
      }
    }
    return moves
  }
  const played = load.play(rig.url).finally(() => {
    isPlayed = true
  })
  const [, moves] = await Promise.all([played, reshard()])
  expect(moves).toBeGreaterThan(3)
  await load.expectStored(rig.pool, 40_000)
  await settled(rig)
  expectNoUnexplainedDeaths(rig)
  await expectNothingTakenForLost(rig)
})

/** What is on its way to another server is not lost. */
async function expectNothingTakenForLost({ sinks }: Rig): Promise<void> {
  for (const sink of sinks) {
    expect([await figureOf(sink, 'lost_streams_total'), await figureOf(sink, 'lost_entries_total')]).toEqual([0, 0])
  }
}

test('a_slot_on_the_move_is_not_looked_into_until_all_of_it_has_come', async () => {
  await cluster.flush()
  const client = await connectRedis(cluster.url, log)
  onTestFinished(() => client.disconnect())
  const redis = { client, partitions: new Partitions(64) }
  const leases = new Leases(client, redis.partitions, LIMITS.leaseMs)
  const producer = new Producer(redis)
  const partition = redis.partitions.at(7)
  const [ended, held, ...waiting] = callsIn(redis.partitions, 7, 6)
  await producer.store({ type: 'call.ended', call_sid: ended! })
  const first = await take(leases, redis)
  await leases.settle([committed(first, 1, true)])
  await producer.store(turn(held!, 0))
  await take(leases, redis)
  await producer.store(...waiting.map((sid) => turn(sid, 0)))
  const slot = slotOf(partition)
  const masters = await cluster.masters()
  const home = await cluster.masterOf(slot)
  const other = masters.find((port) => port !== home)!
  let looks = 0
  const look = async () => {
    // In vain or not at all; what counts is that nothing is taken for gone.
    const found = await leases.lease([7], LIMITS).catch((error: Error) => error)
    if (found instanceof Error) expect(found.message).toMatch(/TRYAGAIN|redirections/)
    else expect(found).toMatchObject({ leases: [], gone: [] })
    looks++
  }
  const { ready, leased } = partition
  await cluster.moveSlot(slot, other, { first: [ready, leased, partition.ended], onHalf: look })
  expect(looks).toBe(1)
  const found = await until('they are leased', async () => {
    const some = await leases.lease([7], LIMITS).catch(() => undefined)
    return some && some.leases.length > 0 && some
  })
  expect(found.gone).toEqual([])
  expect(found.leases.map(({ callSid }) => callSid).toSorted()).toEqual(waiting.toSorted())
})
