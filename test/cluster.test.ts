/** The protocol on a Redis Cluster of one node: no script touches two slots, and sinks are woken there, too. */
import { once } from 'node:events'
import { type AddressInfo, createServer } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { Redis } from 'ioredis'
import { afterAll, afterEach, beforeAll, beforeEach, expect, onTestFinished, test, vi } from 'vitest'
import { connectRedis, openPartitions, type RedisClient } from '../shared/redis.js'
import { AwayServers } from '../sink/away.js'
import { Backlog } from '../sink/backlog.js'
import { Leases } from '../sink/lease.js'
import { type Listening, listen } from '../sink/listen.js'
import { Overdue } from '../sink/overdue.js'
import { Wake } from '../sink/wake.js'
import { log, until } from './support/stores.js'
import {
  committed,
  eventsOf,
  groupOf,
  LIMITS,
  leaseAll,
  ownRedis,
  Producer,
  placesOf,
  readAll,
  type Store,
  type StoreServer,
  seqsOf,
  turn,
} from './support/streams.js'

let server: StoreServer
let url: string
let redis: Store
let leases: Leases
let overdue: Overdue
const clients: RedisClient[] = []

async function connected(): Promise<RedisClient> {
  const client = await connectRedis(url, log)
  clients.push(client)
  return client
}

beforeAll(async () => {
  server = await ownRedis('cluster')
  url = `${server.url},${server.url}`
  const node = new Redis(server.url) // one node by itself is refused elsewhere
  await node.call('CLUSTER', 'ADDSLOTSRANGE', '0', '16383')
  await until('the cluster is up', async () => String(await node.call('CLUSTER', 'INFO')).includes('cluster_state:ok'))
  node.disconnect()
})
afterAll(() => server.stop())
beforeEach(async () => {
  const client = await connected()
  await client.flushall()
  redis = { client, partitions: await openPartitions(client, 64) }
  leases = new Leases(client, redis.partitions, LIMITS.leaseMs)
  overdue = new Overdue(client, redis.partitions)
})
afterEach(() => {
  for (const client of clients.splice(0)) client.disconnect()
})

const calls = Array.from({ length: 200 }, (_, c) => `CA${c}`)

test('append_lease_read_and_settle_work_on_a_cluster', async () => {
  const producer = new Producer(redis)
  await producer.store(...[0, 1, 2].flatMap((seq) => calls.map((sid) => turn(sid, seq))))
  const taken = await readAll(redis.client, await leaseAll(leases, redis), LIMITS)
  expect(taken.map(({ lease }) => lease.callSid).toSorted()).toEqual(calls.toSorted())
  for (const { lease, entries } of taken) {
    expect(entries).toHaveLength(3)
    expect(await seqsOf(redis, lease.callSid)).toEqual([0, 1, 2])
  }
  expect(await leases.settle(taken.map((each) => committed(each)))).toEqual({ lapsed: 0, again: [], lost: [] })
  for (const sid of calls) expect(await groupOf(redis, sid)).toMatchObject({ lag: 0, pending: 0 })
  const backlog = await new Backlog(redis.client, redis.partitions).read()
  expect(backlog).toMatchObject({ readyCalls: 0, leasedCalls: 0, openCalls: calls.length, lagMs: 0, entriesBehind: 0 })
})

test('a_cluster_that_forgets_its_scripts_costs_nothing', async () => {
  const producer = new Producer(redis)
  await producer.store(turn('CA1', 0))
  await redis.client.script('FLUSH')
  await producer.store(...[1, 2].flatMap((seq) => calls.slice(0, 20).map((sid) => turn(sid, seq))))
  expect(await seqsOf(redis, 'CA1')).toEqual([0, 1, 2])
  expect(await seqsOf(redis, 'CA2')).toEqual([1, 2])
  await redis.client.script('FLUSH')
  expect(await leaseAll(leases, redis)).toHaveLength(20)
})

test('reclaim_works_on_a_cluster', async () => {
  await new Producer(redis).store(...calls.map((sid) => turn(sid, 0)))
  await leaseAll(leases, redis, { leaseMs: 1 })
  await new Promise((resolve) => setTimeout(resolve, 20))
  expect((await overdue.reclaim(100)).toSorted()).toEqual(calls.toSorted())
  for (const lease of await leaseAll(leases, redis)) expect(lease).toMatchObject({ lapses: 1, waiting: 1 })
})

test('of_the_suspects_of_many_slots_one_is_leased_at_a_time', async () => {
  await new Producer(redis).store(...calls.slice(0, 20).map((sid) => turn(sid, 0)))
  for (let lapse = 0; lapse < 2; lapse++) {
    await leaseAll(leases, redis, { leaseMs: 1 })
    await new Promise((resolve) => setTimeout(resolve, 20))
    expect(await overdue.reclaim(100)).toHaveLength(20)
  }
  const everywhere = redis.partitions.all.map(({ partition }) => partition)
  const found = await leases.lease(everywhere, { ...LIMITS, suspectLapses: 2 })
  expect(found.leases).toHaveLength(1)
  const inOther = calls.slice(0, 20).filter((sid) => redis.partitions.of(sid) !== found.leases[0]!.partition)
  expect(new Set(found.more)).toEqual(new Set(inOther.map((sid) => redis.partitions.of(sid).partition)))
  for (const sid of inOther) expect(Object.keys(await placesOf(redis, sid)).sort()).toEqual(['open', 'ready'])
  // The one that may have been at fault must not be tried alone once more for that.
  const [other] = inOther
  const session = redis.partitions.of(other!).sessionPrefix + other
  await redis.client.hset(session, 'alone', '1-1')
  await leases.lease(everywhere, { ...LIMITS, suspectLapses: 2 })
  expect(await redis.client.hmget(session, 'lapses', 'alone')).toEqual(['2', '1-1'])
})

test('a_sink_that_was_held_up_itself_takes_no_server_for_away', async () => {
  const servers = AwayServers.of(redis.client)
  const place = redis.partitions.at(0)
  const asked = servers.inTime(place, redis.client.exists(place.wake))
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1200) // for longer than it waits for an answer
  expect(await asked).toBe(0)
  expect(servers.isAway(place)).toBe(false)
})

test('leases_are_settled_although_the_answer_to_their_prolonging_came_late', async () => {
  await new Producer(redis).store(turn('CA1', 0))
  const [taken] = await readAll(redis.client, await leaseAll(leases, redis), LIMITS)
  await leases.prolong([taken!.lease])
  const evalsha = redis.client.evalsha.bind(redis.client) as (...args: unknown[]) => Promise<unknown>
  const spy = vi.spyOn(redis.client, 'evalsha')
  onTestFinished(() => spy.mockRestore())
  spy.mockImplementationOnce(async (...args: unknown[]) => {
    const reply = await evalsha(...args)
    await sleep(1200) // for longer than it is waited for
    return reply
  })
  await expect(leases.prolong([taken!.lease])).rejects.toThrow('no answer')
  await sleep(500)
  expect((await leases.settle([committed(taken!)])).lapsed).toBe(0)
})

test('reap_works_on_a_cluster', async () => {
  await new Producer(redis, { idleTimeoutMs: 1 }).store(...calls.map((sid) => turn(sid, 0)))
  await new Promise((resolve) => setTimeout(resolve, 20))
  expect((await overdue.reap(100)).toSorted()).toEqual(calls.toSorted())
  for (const sid of calls) {
    expect((await eventsOf(redis, sid)).at(-1)).toMatchObject({ type: 'call.ended', reason: 'abandoned' })
    expect(Object.keys(await placesOf(redis, sid))).toEqual(['ready'])
  }
})

test('a_cluster_that_cannot_be_reached_is_refused_with_what_is_the_matter_with_each_server', async () => {
  const closes = createServer((socket) => socket.end()).listen(0, '127.0.0.1')
  onTestFinished(() => void closes.close())
  await once(closes, 'listening')
  const { port } = closes.address() as AddressInfo
  await expect(connectRedis(`redis://127.0.0.1:1,redis://127.0.0.1:${port}`, log)).rejects.toThrow(
    'REDIS_URL: no server of the Cluster answers: 127.0.0.1:1: connect ECONNREFUSED 127.0.0.1:1; ' +
      `127.0.0.1:${port}: it closes the connection, it may want TLS: rediss://`,
  )
  const single = await ownRedis()
  onTestFinished(() => single.stop())
  await expect(connectRedis(`${single.url},${single.url}`, log)).rejects.toThrow(
    `REDIS_URL: Redis at ${new URL(single.url).host} cannot be used: ERR This instance has cluster support disabled`,
  )
})

/** A sink's ears, and whose news they have heard. */
async function listener(): Promise<{ listening: Listening; wake: Wake }> {
  const wake = new Wake(redis.partitions.all.length)
  const listening = await listen(redis.client, redis.partitions, wake, connected, log)
  onTestFinished(() => listening.stop())
  wake.take() // at first there may be news everywhere
  return { listening, wake }
}

test('appends_wake_sinks_on_a_cluster', async () => {
  const { wake } = await listener()
  await new Producer(redis).store(...calls.map((sid) => turn(sid, 0)))
  const used = new Set(calls.map((sid) => redis.partitions.of(sid).partition))
  const heard = new Set<number>()
  await until('all have been heard', () => {
    for (const partition of wake.take()) heard.add(partition)
    return heard.size === used.size
  })
  expect(heard).toEqual(used)
})

test('sinks_are_woken_again_after_their_subscription_was_cut', async () => {
  const { listening, wake } = await listener()
  expect(await redis.client.call('CLIENT', 'KILL', 'TYPE', 'pubsub')).toBe(1)
  await until('it is there again, and whatever was missed is looked for', () => {
    listening.tend()
    return wake.take().size === redis.partitions.all.length
  })
  await new Producer(redis).store(turn('CA1', 0))
  await until('the wake-up is heard again', () => wake.take().has(redis.partitions.of('CA1').partition))
})
