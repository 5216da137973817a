/** Who wakes sleeping sinks: whatever makes a call of an idle partition ready, once; and nothing else. */
import type { Redis } from 'ioredis'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest'
import { Partitions } from '../shared/keys.js'
import { connectRedis } from '../shared/redis.js'
import { Leases } from '../sink/lease.js'
import { Overdue } from '../sink/overdue.js'
import { givenBack } from '../sink/settle.js'
import { log, until } from './support/stores.js'
import {
  callsIn,
  committed,
  LIMITS,
  leaseAll,
  ownRedis,
  Producer,
  type Store,
  type StoreServer,
  take,
  turn,
} from './support/streams.js'

/** A single Redis has one channel, its first partition's. */
const WAKE = new Partitions(64).at(0).wake

// Channels are not part of a database: on a Redis shared with other suites, their news would be heard, too.
let server: StoreServer
let redis: Store
let subscriber: Redis
let leases: Leases
let overdue: Overdue
let heard: string[]
beforeAll(async () => {
  server = await ownRedis()
})
afterAll(() => server.stop())
beforeEach(async () => {
  redis = { client: await connectRedis(server.url, log), partitions: new Partitions(64) }
  await redis.client.flushall()
  subscriber = (await connectRedis(server.url, log)) as Redis
  leases = new Leases(redis.client, redis.partitions, LIMITS.leaseMs)
  overdue = new Overdue(redis.client, redis.partitions)
  heard = []
  subscriber.on('smessage', (_channel: string, message: string) => heard.push(message))
  await subscriber.ssubscribe(WAKE)
})
afterEach(() => {
  redis.client.disconnect()
  subscriber.disconnect()
})

const [a1, a2] = callsIn(new Partitions(64), 3, 2) as [string, string]
const [b1] = callsIn(new Partitions(64), 5, 1) as [string]

/** What was heard since the last time: messages on one channel keep their order, so everything before 'end' has arrived. */
async function news(): Promise<string[]> {
  await redis.client.spublish(WAKE, 'end')
  await until('the end is heard', () => heard.at(-1) === 'end')
  return heard.splice(0).slice(0, -1)
}

test('append_on_an_idle_partition_wakes_and_on_a_busy_one_does_not', async () => {
  const producer = new Producer(redis)
  await producer.store(turn(a1, 0))
  expect(await news(), 'an idle partition').toEqual(['3'])
  await producer.store(turn(a1, 1))
  await producer.store(turn(a2, 0))
  expect(await news(), 'there is something ready').toEqual([])
  await producer.store(turn(b1, 0))
  expect(await news(), 'another partition').toEqual(['5'])
  await leaseAll(leases, redis)
  await producer.store(turn(a1, 2))
  expect(await news(), 'news of a leased call is for its holder').toEqual([])
})

test('one_append_wakes_for_all_its_partitions_with_one_message', async () => {
  await new Producer(redis).store(turn(a1, 0), turn(b1, 0), turn(a2, 0))
  expect(await news()).toEqual(['3,5'])
})

test('settle_wakes_when_a_call_has_news_and_its_partition_was_idle', async () => {
  const producer = new Producer(redis)
  await producer.store(turn(a1, 0))
  const first = await take(leases, redis)
  await news()
  await leases.settle([committed(first)])
  expect(await news(), 'nothing new').toEqual([])

  await producer.store(turn(a1, 1))
  const second = await take(leases, redis)
  await producer.store(turn(a1, 2))
  await news()
  await leases.settle([committed(second)])
  expect(await news(), 'news came during the lease').toEqual(['3'])

  const third = await take(leases, redis)
  await producer.store(turn(a2, 0))
  expect(await news()).toEqual(['3'])
  await leases.settle([givenBack(third.lease)])
  expect(await news(), 'another call of the partition is ready').toEqual([])
})

test('giving_back_wakes', async () => {
  await new Producer(redis).store(turn(a1, 0))
  const { lease } = await take(leases, redis)
  await news()
  await leases.settle([givenBack(lease)])
  expect(await news()).toEqual(['3'])
})

test('reclaim_wakes_for_what_it_made_ready', async () => {
  await new Producer(redis).store(turn(a1, 0), turn(b1, 0))
  await leaseAll(leases, redis, { leaseMs: 1 })
  await news()
  await new Promise((resolve) => setTimeout(resolve, 10))
  expect(await overdue.reclaim(10)).toHaveLength(2)
  expect(await news()).toEqual(['3,5'])
  expect(await overdue.reclaim(10)).toEqual([])
  expect(await news()).toEqual([])
})

test('reap_wakes_for_the_ends_it_wrote', async () => {
  await new Producer(redis, { idleTimeoutMs: 20 }).store(turn(a1, 0))
  await leases.settle([committed(await take(leases, redis))])
  await news()
  await until('it is due', async () => (await overdue.reap(10)).length > 0)
  expect(await news()).toEqual(['3'])
  expect(await overdue.reap(10)).toEqual([])
  expect(await news()).toEqual([])
})

test('end_wakes_for_the_call_that_Redis_had_forgotten', async () => {
  expect(await overdue.end(a1)).toBe(true)
  expect(await news()).toEqual(['3'])
  expect(await overdue.end(a1)).toBe(false)
  expect(await news()).toEqual([])
})
