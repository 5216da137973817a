/** lease: who gets a call, how much at once, and where to read on. */
import { setTimeout as sleep } from 'node:timers/promises'
import { beforeEach, expect, test } from 'vitest'
import type { Leases } from '../sink/lease.js'
import type { RedisDatabase } from './support/stores.js'
import {
  callsIn,
  committed,
  entriesOf,
  everywhere,
  freshLeases,
  groupOf,
  LIMITS,
  leaseAll,
  type Producer,
  placesOf,
  readAll,
  sessionOf,
  streamOf,
  take,
  turn,
} from './support/streams.js'

let redis: RedisDatabase
let leases: Leases
let producer: Producer
beforeEach(async () => {
  ;({ redis, leases, producer } = await freshLeases())
})

const sids = (taken: { callSid: string }[]) => taken.map((lease) => lease.callSid)

test('a_call_is_leased_to_one_sink_at_a_time', async () => {
  const calls = Array.from({ length: 500 }, (_, c) => `CA${c}`)
  await producer.store(...calls.map((sid) => turn(sid, 0)))
  const taken: string[] = []
  const lease = async () => {
    for (;;) {
      const got = sids(await leaseAll(leases, redis, { calls: 7 }))
      if (got.length === 0) return
      taken.push(...got)
    }
  }
  await Promise.all(Array.from({ length: 12 }, lease))
  expect(taken.toSorted()).toEqual(calls.toSorted()) // none twice, none left out
  await producer.store(...calls.map((sid) => turn(sid, 1)))
  expect(await leaseAll(leases, redis), 'news do not make a leased call ready').toEqual([])
})

test('a_lease_says_where_to_read_on_what_is_waiting_and_how_much_was_read', async () => {
  await producer.store(...[0, 1, 2, 3, 4].map((seq) => turn('CA1', seq)))
  const ids = (await entriesOf(redis, 'CA1')).map(([id]) => id)
  const first = await take(leases, redis)
  expect(first.lease).toMatchObject({ callSid: 'CA1', cursor: '0-0', waiting: 5, read: 0, finalized: false, lapses: 0 })
  expect(first.lease.partition).toBe(redis.partitions.of('CA1'))
  expect(Math.abs(first.lease.oldestMs - Number.parseInt(ids[0]!, 10))).toBeLessThan(1000)
  expect(first.lease.deadline).toBe((await placesOf(redis, 'CA1')).leased)
  expect(Math.abs(first.lease.deadline - Date.now() - LIMITS.leaseMs)).toBeLessThan(10_000)
  expect(first.entries.map(([id]) => id)).toEqual(ids)

  await leases.settle([committed(first, 2)])
  const second = await take(leases, redis)
  expect(second.lease).toMatchObject({ cursor: ids[1], waiting: 3, read: 2 })
  expect(second.lease.oldestMs).toBe(Number.parseInt(ids[2]!, 10))
  expect(second.entries.map(([id]) => id)).toEqual(ids.slice(2))

  await leases.settle([committed(second)])
  await producer.store(turn('CA1', 5))
  const third = await take(leases, redis)
  expect(third.lease).toMatchObject({ cursor: ids[4], waiting: 1, read: 5 })
  expect(third.entries).toHaveLength(1)
})

test('a_lease_stops_at_the_limit_of_calls_and_tells_where_there_is_more', async () => {
  const [a, b, c] = [callsIn(redis.partitions, 3, 2), callsIn(redis.partitions, 5, 2), callsIn(redis.partitions, 9, 1)]
  await producer.store(...[...a, ...b, ...c].map((sid) => turn(sid, 0)))
  const first = await leases.lease([3, 5, 9, 11], { ...LIMITS, calls: 3 })
  expect(first.leases).toHaveLength(3)
  expect(first.leases.slice(0, 2).map((lease) => lease.partition.partition)).toEqual([3, 3])
  expect(first.more).toEqual([5, 9])
  const second = await leases.lease(first.more, LIMITS)
  expect(sids([...first.leases, ...second.leases]).toSorted()).toEqual([...a, ...b, ...c].toSorted())
  expect(second.more).toEqual([])
})

test('a_lease_stops_at_the_limit_of_entries', async () => {
  for (const sid of callsIn(redis.partitions, 3, 5)) {
    for (let seq = 0; seq < 10; seq++) await producer.store(turn(sid, seq))
  }
  const { leases: taken, more } = await leases.lease([3], { ...LIMITS, entries: 21 })
  expect(taken.map((lease) => lease.waiting)).toEqual([10, 10, 10])
  expect(more).toEqual([3])
})

test('a_lease_stops_at_the_limit_of_bytes', async () => {
  const calls = callsIn(redis.partitions, 3, 5)
  for (const sid of calls) await producer.store(turn(sid, 0, 'x'.repeat(1000)), turn(sid, 1, 'x'.repeat(1000)))
  const taken = await leaseAll(leases, redis, { bytes: 4500 })
  expect(taken).toHaveLength(3)
  // Only what is waiting counts, not what was committed before.
  for (const { lease, entries } of await readAll(redis.client, taken, LIMITS)) {
    await leases.settle([committed({ lease, entries }, 1)])
  }
  expect(await leaseAll(leases, redis, { bytes: 4500 })).toHaveLength(4)
})

test('a_lease_takes_at_least_one_call_however_much_it_holds', async () => {
  const calls = callsIn(redis.partitions, 3, 2)
  for (const sid of calls) await producer.store(...Array.from({ length: 50 }, (_, seq) => turn(sid, seq)))
  const { leases: taken, more } = await leases.lease([3], { ...LIMITS, calls: 1, entries: 1, bytes: 1 })
  expect(taken).toMatchObject([{ callSid: calls[0], waiting: 50 }])
  expect(more).toEqual([3])
})

test('the_call_that_has_waited_longest_is_leased_first', async () => {
  const calls = callsIn(redis.partitions, 3, 3).toReversed()
  for (const sid of calls) {
    await producer.store(turn(sid, 0))
    await sleep(2)
  }
  await producer.store(turn(calls[0]!, 1)) // more news do not put it behind the others
  expect(sids(await leaseAll(leases, redis))).toEqual(calls)
})

test('only_the_partitions_asked_for_are_looked_into', async () => {
  const [[a], [b]] = [callsIn(redis.partitions, 3, 1), callsIn(redis.partitions, 5, 1)]
  await producer.store(turn(a!, 0), turn(b!, 0))
  expect(await leases.lease([], LIMITS)).toEqual({ leases: [], more: [], gone: [] })
  expect(sids((await leases.lease([4, 5], LIMITS)).leases)).toEqual([b])
  expect(sids((await leases.lease(everywhere(redis.partitions), LIMITS)).leases)).toEqual([a])
})

test('of_the_suspects_one_is_leased_at_a_time_the_one_with_the_fewest_lapses_first', async () => {
  const calls = callsIn(redis.partitions, 3, 5)
  await producer.store(...calls.map((sid) => turn(sid, 0)))
  const lapses = [3, 2, 0, 4, 1]
  for (const [i, sid] of calls.entries()) {
    if (lapses[i]! > 0) await redis.client.hset(sessionOf(redis, sid), 'lapses', lapses[i]!)
  }
  const [a, b, c, d, e] = calls
  const none = await leases.lease([3], { ...LIMITS, calls: 1 }, false)
  expect(none.leases.map((lease) => lease.callSid)).toEqual([c])
  const rounds: (string | undefined)[][] = [[e, b], [a], [d]]
  for (const expected of rounds) {
    const { leases: taken, more } = await leases.lease([3], LIMITS)
    expect(taken.map((lease) => lease.callSid)).toEqual(expected)
    expect(more.length > 0).toBe(expected[0] !== d)
  }
})

test('suspects_stay_where_they_are_while_another_worker_tries_one', async () => {
  await producer.store(turn('CA1', 0))
  await redis.client.hset(sessionOf(redis, 'CA1'), 'lapses', 2)
  const ready = await placesOf(redis, 'CA1')
  // And nothing says that there is more to do: the worker would come back at once, again and again.
  expect(await leases.lease(everywhere(redis.partitions), LIMITS, false)).toEqual({ leases: [], more: [], gone: [] })
  expect(await placesOf(redis, 'CA1')).toEqual(ready)
})

test('calls_behind_very_many_suspects_are_found', async () => {
  const calls = callsIn(redis.partitions, 3, 250)
  await producer.store(...calls.map((sid) => turn(sid, 0)))
  const inOrder = await redis.client.zrange(redis.partitions.at(3).ready, '0', '-1')
  for (const sid of inOrder.slice(0, -1)) await redis.client.hset(sessionOf(redis, sid), 'lapses', 9)
  const { leases: taken } = await leases.lease([3], LIMITS)
  expect(taken.map((lease) => lease.callSid)).toContain(inOrder.at(-1))
  expect(taken).toHaveLength(2)
})

test('what_is_isolated_has_its_end_behind_the_cursor', async () => {
  await producer.store(turn('CA1', 0), { type: 'call.ended', call_sid: 'CA1' }, turn('CA1', 1))
  const { lease, entries } = await take(leases, redis)
  const tried = { ...lease, cursor: entries[1]![0], read: 2, finalized: true }
  expect(await leases.isolate(tried, entries[2]![0])).toBe(true)
  expect(Object.keys(await placesOf(redis, 'CA1'))).toEqual(['leased', 'ended'])
  expect(await groupOf(redis, 'CA1')).toMatchObject({ 'last-delivered-id': entries[1]![0], lag: 1 })
  expect(await leases.isolate({ ...tried, deadline: lease.deadline - 1 }, entries[2]![0])).toBe(false)
})

test('a_lost_group_is_made_again_from_the_start', async () => {
  await producer.store(turn('CA1', 0), turn('CA1', 1))
  await leases.settle([committed(await take(leases, redis))])
  await redis.client.xgroup('DESTROY', streamOf(redis, 'CA1'), 'sink')
  await producer.store(turn('CA1', 2))
  const { lease, entries } = await take(leases, redis)
  expect(lease).toMatchObject({ cursor: '0-0', waiting: 3, read: 0 })
  expect(entries).toHaveLength(3)
  await leases.settle([committed({ lease, entries })])
  expect(await groupOf(redis, 'CA1')).toMatchObject({ 'last-delivered-id': entries[2]![0], lag: 0, pending: 0 })
})

test('a_group_without_a_count_of_entries_read_is_worked_on_all_the_same', async () => {
  await producer.store(turn('CA1', 0), turn('CA1', 1), turn('CA1', 2))
  const ids = (await entriesOf(redis, 'CA1')).map(([id]) => id)
  await redis.client.xgroup('SETID', streamOf(redis, 'CA1'), 'sink', ids[1]!) // by hand: Redis forgets the count
  const { lease, entries } = await take(leases, redis)
  expect(lease).toMatchObject({ cursor: ids[1], read: -1 })
  expect(lease.waiting).toBeGreaterThanOrEqual(1)
  expect(entries.map(([id]) => id)).toEqual([ids[2]])
  await leases.settle([committed({ lease, entries })])
  expect(await groupOf(redis, 'CA1')).toMatchObject({ 'last-delivered-id': ids[2] })
  expect(Object.keys(await placesOf(redis, 'CA1'))).toEqual(['open'])
})

test('a_ready_call_whose_stream_is_gone_is_dropped', async () => {
  const [gone, foreign, there] = callsIn(redis.partitions, 3, 3) as [string, string, string]
  await producer.store(turn(gone, 0), turn(foreign, 0), turn(there, 0))
  await redis.client.del(streamOf(redis, gone))
  await redis.client.set(streamOf(redis, foreign), 'of somebody else')
  expect(sids(await leaseAll(leases, redis))).toEqual([there])
  for (const sid of [gone, foreign]) expect(Object.keys(await placesOf(redis, sid))).toEqual(['open'])
})

test('a_session_key_of_another_type_keeps_no_call_from_its_sink', async () => {
  const [before, foreign, behind] = callsIn(redis.partitions, 3, 3) as [string, string, string]
  await producer.store(turn(before, 0), turn(foreign, 0), turn(behind, 0))
  await redis.client.set(sessionOf(redis, foreign), 'of somebody else')
  const taken = await leaseAll(leases, redis)
  expect(sids(taken)).toEqual([before, foreign, behind])
  expect(taken.map((lease) => lease.waiting)).toEqual([1, 1, 1])
})

test('reading_takes_what_lies_behind_the_cursors_up_to_the_limit', async () => {
  const calls = Array.from({ length: 30 }, (_, c) => `CA${c}`)
  for (const sid of calls) await producer.store(...Array.from({ length: 120 }, (_, seq) => turn(sid, seq)))
  const all = await readAll(redis.client, await leaseAll(leases, redis), LIMITS)
  expect(all.map(({ entries }) => entries.length)).toEqual(calls.map(() => 120))
  for (const { lease, entries } of all) expect(entries).toEqual(await entriesOf(redis, lease.callSid))
  await leases.settle(all.map((each) => committed(each, 20)))
  const limited = await readAll(redis.client, await leaseAll(leases, redis), { ...LIMITS, entries: 50 })
  for (const { lease, entries } of limited) {
    expect(entries).toEqual((await entriesOf(redis, lease.callSid)).slice(20, 70))
  }
})
