/** reclaim: what a sink that died or hangs had leased goes to another, nothing missing. */
import { setTimeout as sleep } from 'node:timers/promises'
import { beforeEach, expect, test } from 'vitest'
import type { Leases } from '../sink/lease.js'
import type { Overdue } from '../sink/overdue.js'
import { givenBack } from '../sink/settle.js'
import { type RedisDatabase, until } from './support/stores.js'
import {
  callsIn,
  committed,
  freshLeases,
  groupOf,
  leaseAll,
  type Producer,
  placesOf,
  sessionOf,
  streamOf,
  take,
  turn,
} from './support/streams.js'

let redis: RedisDatabase
let leases: Leases
let overdue: Overdue
let producer: Producer
beforeEach(async () => {
  ;({ redis, leases, overdue, producer } = await freshLeases())
})

const sid = 'CA1'

/** Leases `count` times as a sink that then dies. */
async function loseLeases(count: number): Promise<void> {
  for (let i = 0; i < count; i++) {
    await leaseAll(leases, redis, { leaseMs: 1 })
    await until('the lease lapses', async () => (await overdue.reclaim(100)).length > 0)
  }
}

test('a_lapsed_lease_goes_to_another_with_all_that_was_not_committed_and_its_lapses_counted', async () => {
  await producer.store(turn(sid, 0), turn(sid, 1), turn(sid, 2))
  await leases.settle([committed(await take(leases, redis), 1)])
  const lost = await take(leases, redis, { leaseMs: 20 })
  await producer.store(turn(sid, 3)) // arrives while the dead sink holds the call
  expect(await until('it lapses', async () => (await overdue.reclaim(10)).at(0))).toBe(sid)
  const other = await take(leases, redis)
  expect(other.lease).toMatchObject({ callSid: sid, cursor: lost.lease.cursor, waiting: 3, read: 1, lapses: 1 })
  expect(other.entries.slice(0, 2)).toEqual(lost.entries)
  expect(other.entries).toHaveLength(3)
  await leases.settle([committed(other)])
  expect(await groupOf(redis, sid)).toMatchObject({ lag: 0, pending: 0 })
})

test('a_call_has_been_waiting_since_its_oldest_entry_arrived_whoever_had_it_meanwhile', async () => {
  await producer.store(turn(sid, 0), turn(sid, 1))
  await leases.settle([committed(await take(leases, redis), 1)])
  const [, second] = await redis.client.xrange(streamOf(redis, sid), '-', '+')
  await sleep(20)
  await loseLeases(1)
  expect((await placesOf(redis, sid)).ready).toBe(Number.parseInt(second![0], 10))
})

test('every_lapse_is_counted', async () => {
  await producer.store(turn(sid, 0))
  await loseLeases(3)
  expect((await take(leases, redis)).lease.lapses).toBe(3)
})

test('a_lease_that_has_not_lapsed_is_not_reclaimed', async () => {
  const [dead, alive] = callsIn(redis.partitions, 3, 2) as [string, string]
  await producer.store(turn(dead, 0))
  await leaseAll(leases, redis, { leaseMs: 1 })
  await producer.store(turn(alive, 0))
  const { lease } = await take(leases, redis, { leaseMs: 20_000 })
  expect(await until('the other one lapses', async () => (await overdue.reclaim(10)).at(0))).toBe(dead)
  expect(await overdue.reclaim(10)).toEqual([])
  expect((await placesOf(redis, alive)).leased).toBe(lease.deadline)
  expect((await placesOf(redis, alive)).ready).toBeUndefined()
  expect(await redis.client.hexists(sessionOf(redis, alive), 'lapses')).toBe(0)
})

test('many_sinks_that_look_for_lapsed_leases_reclaim_each_once', async () => {
  const calls = Array.from({ length: 200 }, (_, c) => `CA${c}`)
  await producer.store(...calls.map((each) => turn(each, 0)))
  await leaseAll(leases, redis, { leaseMs: 1 })
  await sleep(20)
  const reclaimed = (await Promise.all(Array.from({ length: 20 }, () => overdue.reclaim(30)))).flat()
  expect(reclaimed.toSorted()).toEqual(calls.toSorted())
  for (const lease of await leaseAll(leases, redis)) expect(lease.lapses).toBe(1)
})

test('no_more_calls_are_reclaimed_at_once_than_asked_for', async () => {
  const calls = Array.from({ length: 25 }, (_, c) => `CA${c}`)
  await producer.store(...calls.map((each) => turn(each, 0)))
  await leaseAll(leases, redis, { leaseMs: 1 })
  await sleep(20)
  const rounds = [
    await overdue.reclaim(10),
    await overdue.reclaim(10),
    await overdue.reclaim(10),
    await overdue.reclaim(10),
  ]
  expect(rounds.map((round) => round.length)).toEqual([10, 10, 5, 0])
  expect(new Set(rounds.flat()).size).toBe(25)
})

test('lapses_are_forgotten_after_progress_and_not_by_giving_back', async () => {
  await producer.store(turn(sid, 0), turn(sid, 1))
  await loseLeases(2)
  const first = await take(leases, redis)
  await leases.settle([givenBack(first.lease)])
  const second = await take(leases, redis)
  expect(second.lease.lapses).toBe(2)
  await leases.settle([committed(second, 1)])
  expect((await take(leases, redis)).lease.lapses).toBe(0)
})

test('a_session_key_of_another_type_loses_no_call', async () => {
  const [before, foreign, behind] = callsIn(redis.partitions, 3, 3) as [string, string, string]
  await producer.store(turn(before, 0), turn(foreign, 0), turn(behind, 0))
  await leaseAll(leases, redis, { leaseMs: 1 })
  await redis.client.set(sessionOf(redis, foreign), 'of somebody else')
  await sleep(20)
  expect(await overdue.reclaim(10)).toEqual([before, foreign, behind])
  for (const each of [before, foreign, behind]) expect(Object.keys(await placesOf(redis, each))).toContain('ready')
})
