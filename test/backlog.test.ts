/** The backlog: how far PostgreSQL is behind Redis, of ready and of leased calls, and what asking costs Redis. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Redis } from 'ioredis'
import { beforeEach, expect, onTestFinished, test, vi } from 'vitest'
import { connectRedis } from '../shared/redis.js'
import { Backlog } from '../sink/backlog.js'
import { Leases } from '../sink/lease.js'
import type { Overdue } from '../sink/overdue.js'
import { givenBack } from '../sink/settle.js'
import { Relay } from './support/relay.js'
import { log, type RedisDatabase } from './support/stores.js'
import {
  callsIn,
  committed,
  entriesOf,
  freshLeases,
  LIMITS,
  leaseAll,
  ownRedis,
  Producer,
  readAll,
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

/** A new one each time: an answer is kept for half a second. */
const backlog = () => new Backlog(redis.client, redis.partitions).read()

async function redisNow(client = redis.client): Promise<number> {
  const [seconds, microseconds] = await client.time()
  return Number(seconds) * 1000 + Math.floor(Number(microseconds) / 1000)
}

/** Of a Redis of the test's own. */
async function ownClient(): Promise<Redis> {
  const server = await ownRedis()
  const client = (await connectRedis(server.url, log)) as Redis
  onTestFinished(async () => {
    client.disconnect()
    await server.stop()
  })
  return client
}

/** The lag is the age of that entry, whatever the time between the questions. */
async function expectLagOf(sid: string, index: number): Promise<void> {
  const arrivedMs = Number.parseInt((await entriesOf(redis, sid))[index]![0], 10)
  const before = await redisNow()
  const { lagMs, worstPartition } = await backlog()
  expect(lagMs).toBeGreaterThanOrEqual(before - arrivedMs)
  expect(lagMs).toBeLessThanOrEqual((await redisNow()) - arrivedMs)
  expect(worstPartition).toBe(redis.partitions.of(sid).partition)
}

const NOTHING = { lagMs: 0, laggingPartitions: 0, entriesBehind: 0, readyCalls: 0, leasedCalls: 0, endedCalls: 0 }

test('nothing_is_behind_where_nothing_waits', async () => {
  expect(await backlog()).toEqual({ ...NOTHING, worstPartition: 0, openCalls: 0 })
  await producer.store(turn('CA1', 0), turn('CA2', 0))
  await leases.settle(
    (await readAll(redis.client, await leaseAll(leases, redis), LIMITS)).map((each) => committed(each)),
  )
  expect(await backlog()).toEqual({ ...NOTHING, worstPartition: 0, openCalls: 2 })
})

test('the_lag_is_the_age_of_the_oldest_entry_whoever_has_its_call', async () => {
  await producer.store(turn('CA1', 0))
  await sleep(50)
  await producer.store(turn('CA1', 1), turn('CA2', 0), turn('CA2', 1), turn('CA3', 0))
  await expectLagOf('CA1', 0)
  expect(await backlog()).toMatchObject({ readyCalls: 3, leasedCalls: 0, openCalls: 3, entriesBehind: 5 })

  const taken = await readAll(redis.client, await leaseAll(leases, redis), LIMITS)
  await expectLagOf('CA1', 0) // not since it was leased
  expect(await backlog()).toMatchObject({ readyCalls: 0, leasedCalls: 3, entriesBehind: 5 })
  await producer.store(turn('CA1', 2))
  const [first, ...others] = taken.toSorted((a, b) => (a.lease.callSid < b.lease.callSid ? -1 : 1))
  await leases.settle([committed(first!, 1)])
  await expectLagOf('CA1', 1) // ready again: since its next entry, not since it was settled
  expect(await backlog()).toMatchObject({ readyCalls: 1, leasedCalls: 2, entriesBehind: 5 })
  await leases.settle(others.map(({ lease }) => givenBack(lease)))
  await expectLagOf('CA1', 1)
  expect(await backlog()).toMatchObject({ readyCalls: 3, leasedCalls: 0, entriesBehind: 5 })
})

test('a_leased_call_counts_from_behind_its_cursor_and_not_at_all_when_all_is_committed', async () => {
  await producer.store(turn('CA1', 0))
  await sleep(20)
  await producer.store(turn('CA1', 1))
  const { lease, entries } = await take(leases, redis)
  await leases.isolate(lease, entries[1]![0]) // the cursor stays before the first one
  await expectLagOf('CA1', 0)
  await leases.isolate({ ...lease, cursor: entries[0]![0], read: 1 }, entries[1]![0])
  await expectLagOf('CA1', 1)
  expect((await backlog()).entriesBehind).toBe(1)
  await leases.isolate({ ...lease, cursor: entries[1]![0], read: 2 }, entries[1]![0])
  expect(await backlog()).toMatchObject({ lagMs: 0, leasedCalls: 1, entriesBehind: 0 })
})

test('a_lapsed_lease_takes_nothing_from_the_age', async () => {
  await producer.store(turn('CA1', 0))
  await sleep(20)
  await leaseAll(leases, redis, { leaseMs: 1 })
  await sleep(20)
  expect(await overdue.reclaim(10)).toEqual(['CA1'])
  await expectLagOf('CA1', 0)
})

test('a_partition_lags_when_something_waits_there_for_over_a_second', async () => {
  const [a, b] = [callsIn(redis.partitions, 3, 2), callsIn(redis.partitions, 9, 1)]
  // As if it had arrived two seconds ago.
  for (const sid of [...a, ...b]) {
    await redis.client.xadd(streamOf(redis, sid), `${(await redisNow()) - 2000}-0`, 'e', '{}')
    await redis.client.zadd(redis.partitions.of(sid).ready, (await redisNow()) - 2000, sid)
  }
  await producer.store(turn(callsIn(redis.partitions, 11, 1)[0]!, 0))
  expect(await backlog()).toMatchObject({ laggingPartitions: 2, readyCalls: 4, entriesBehind: 4 })
})

test('entries_of_very_many_ready_calls_are_estimated_from_some_of_each_partition', async () => {
  const many = callsIn(redis.partitions, 5, 300)
  const few = callsIn(redis.partitions, 6, 10)
  await producer.store(...[0, 1, 2].flatMap((seq) => many.map((sid) => turn(sid, seq))))
  await producer.store(...few.map((sid) => turn(sid, 0)))
  expect(await backlog()).toMatchObject({ readyCalls: 310, entriesBehind: 910 }) // equal calls: then the estimate is exact
  await producer.store(turn(few[0]!, 1))
  expect((await backlog()).entriesBehind, 'where there are few, all are counted').toBe(911)
})

test('of_thousands_of_leased_calls_the_oldest_is_found_by_scripts_that_are_short', async () => {
  const client = await ownClient() // whose statistics are of nobody else's scripts
  const { partitions } = redis
  const calls = Array.from({ length: 1000 }, (_, c) => `CA${c}`)
  const text = (c: number) => (c % 4 === 0 ? 'x'.repeat(60_000) : 'text') // a stream's first entry is looked at whole
  await new Producer({ client, partitions }).store(...calls.map((sid, c) => turn(sid, 0, text(c))))
  const taken = await leaseAll(new Leases(client, partitions, LIMITS.leaseMs), redis, { calls: 10_000 })
  const oldestMs = Math.min(...taken.map((lease) => lease.oldestMs))
  await client.config('RESETSTAT')
  const before = await redisNow(client)
  const found = await new Backlog(client, partitions).read()
  expect(found).toMatchObject({ leasedCalls: 1000, entriesBehind: 1000 })
  expect(found.lagMs).toBeGreaterThanOrEqual(before - oldestMs)
  expect(found.lagMs).toBeLessThanOrEqual((await redisNow(client)) - oldestMs)
  const [, scripts, microseconds] = /cmdstat_evalsha:calls=(\d+),usec=(\d+)/.exec(await client.info('commandstats'))!
  expect(Number(microseconds) / Number(scripts), 'on average; a few hundred on a quiet machine').toBeLessThan(5000)
  expect(Number(scripts), 'far more than without large entries').toBeGreaterThan(40)
})

test('a_stream_that_is_gone_or_has_no_group_or_is_no_stream_stops_nobody', async () => {
  await producer.store(turn('CA1', 0), turn('CA2', 0), turn('CA3', 0), turn('CA4', 0))
  await leaseAll(leases, redis, { calls: 1000 })
  await redis.client.del(streamOf(redis, 'CA1'), streamOf(redis, 'CA3'))
  await redis.client.set(streamOf(redis, 'CA3'), 'somebody else’s')
  await redis.client.xgroup('DESTROY', streamOf(redis, 'CA2'), 'sink')
  expect(await backlog()).toMatchObject({ leasedCalls: 4, entriesBehind: 2 })
  await expectLagOf('CA2', 0)
})

test('all_who_ask_within_half_a_second_get_one_answer', async () => {
  vi.useFakeTimers({ toFake: ['performance'] })
  onTestFinished(() => void vi.useRealTimers())
  const shared = new Backlog(redis.client, redis.partitions)
  const first = await Promise.all([shared.read(), shared.read()])
  expect(first[0]).toBe(first[1])
  await producer.store(turn('CA1', 0))
  vi.advanceTimersByTime(499)
  expect(await shared.read()).toBe(first[0])
  vi.advanceTimersByTime(1)
  expect(await shared.read()).toMatchObject({ readyCalls: 1 })
})

test('a_Redis_that_hangs_is_waited_for_no_longer_than_two_seconds_and_asked_again', async () => {
  const relay = await Relay.start(redis.url)
  const client = (await connectRedis(relay.url, log)) as Redis
  onTestFinished(async () => {
    client.disconnect()
    await relay.stop()
  })
  const asked = new Backlog(client, redis.partitions)
  relay.hold()
  await expect(asked.read()).rejects.toThrow('no answer within 2000 ms')
  relay.release()
  expect(await asked.read()).toMatchObject({ readyCalls: 0 })
})
