/** The Appender: whatever happens to the connection, every event is stored once, in its call's order, before it is settled. */
import type { Redis } from 'ioredis'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest'
import { Partitions } from '../shared/keys.js'
import { connectRedis } from '../shared/redis.js'
import { Relay } from './support/relay.js'
import { log, until } from './support/stores.js'
import { eventsOf, ownRedis, Producer, type Store, type StoreServer, seqsOf, turn } from './support/streams.js'

let server: StoreServer
/** Connected to Redis itself, and never cut. */
let direct: Store & { client: Redis }
/** Connected through a relay. */
let through: Store & { client: Redis }
let relay: Relay
beforeAll(async () => {
  server = await ownRedis()
})
afterAll(() => server.stop())
beforeEach(async () => {
  const partitions = new Partitions(64)
  direct = { client: (await connectRedis(server.url, log)) as Redis, partitions }
  await direct.client.flushall()
  relay = await Relay.start(server.url)
  through = { client: (await connectRedis(relay.url, log)) as Redis, partitions }
})
afterEach(async () => {
  direct.client.disconnect()
  through.client.disconnect()
  await relay.stop()
})

const CALLS = 40
const TURNS = 250

/** Gives 10,000 turns to the producer, in bursts of 0 to `most`, and waits until all are settled. */
async function load(producer: Producer, most: number): Promise<void> {
  const next = new Map(Array.from({ length: CALLS }, (_, c) => [`CA${c}`, 0]))
  const all: Promise<unknown>[] = []
  for (let burst = 1; next.size > 0; burst = (burst * 7 + 3) % (most + 1)) {
    const sids = [...next.keys()]
    for (let i = 0; i < burst; i++) {
      const sid = sids[(i * i + burst) % sids.length]!
      const seq = next.get(sid)
      if (seq === undefined) continue
      all.push(producer.put(turn(sid, seq, 'x'.repeat((seq * 13) % 400))))
      if (seq + 1 === TURNS) next.delete(sid)
      else next.set(sid, seq + 1)
    }
    await new Promise((resolve) => setTimeout(resolve, burst % 3))
  }
  expect((await Promise.all(all)).filter((refusal) => refusal !== undefined)).toEqual([])
}

async function expectAllOnceInOrder(producer: Producer): Promise<void> {
  const inOrder = Array.from({ length: TURNS }, (_, seq) => seq)
  for (let c = 0; c < CALLS; c++) expect(await seqsOf(direct, `CA${c}`)).toEqual(inOrder)
  expect(new Set(producer.timesSettled)).toEqual(new Set([1]))
  expect(producer.timesSettled).toHaveLength(1 + CALLS * TURNS)
}

/** Runs `disturb` again and again, each time after some progress, until the load is through. @returns how many times */
async function loadWhile(producer: Producer, disturb: () => Promise<unknown>): Promise<number> {
  let done = false
  const work = load(producer, 60).finally(() => {
    done = true
  })
  let times = 0
  for (let before = 0; !done; before = producer.settled) {
    await until('more is settled', () => producer.settled > before || done)
    await new Promise((resolve) => setTimeout(resolve, Math.random() * 4))
    await disturb()
    times++
  }
  await work
  return times
}

test('the_order_of_a_call_holds_under_load_and_every_event_is_settled_once', async () => {
  const producer = new Producer(direct)
  await load(producer, 2000)
  await expectAllOnceInOrder(producer)
  const flushes = (await producer.metrics.flushEvents.get()).values.find((v) => v.metricName?.endsWith('_count'))
  expect(flushes?.value, 'batches').toBeGreaterThan(20)
})

test('connections_cut_under_load_lose_nothing_and_double_nothing', async () => {
  const producer = new Producer(through)
  const kills = await loadWhile(producer, () => direct.client.call('CLIENT', 'KILL', 'TYPE', 'normal'))
  await expectAllOnceInOrder(producer)
  expect(kills).toBeGreaterThan(3)
  expect(await producer.failures()).toBeGreaterThan(3)
})

test('replies_lost_under_load_lose_nothing_and_double_nothing', async () => {
  const producer = new Producer(through)
  let lost = 0
  await loadWhile(producer, async () => {
    relay.holdReplies = true
    await until('Redis has executed something', () => relay.holdsReplies, 20).catch(() => undefined) // or was idle
    if (relay.holdsReplies) lost++
    relay.cut()
  })
  await expectAllOnceInOrder(producer)
  expect(lost).toBeGreaterThan(3)
})

test('a_Redis_that_forgets_its_scripts_costs_nothing', async () => {
  const producer = new Producer(direct)
  const other = (await connectRedis(server.url, log)) as Redis
  const flushes = await loadWhile(producer, () => other.script('FLUSH'))
  other.disconnect()
  await expectAllOnceInOrder(producer)
  expect(flushes).toBeGreaterThan(3)
  expect(await producer.failures()).toBeGreaterThan(3)
})

test('events_taken_while_a_batch_is_in_doubt_are_stored', async () => {
  const producer = new Producer(through)
  await producer.store(turn('CA1', 0))
  relay.holdReplies = true
  const doubtful = producer.put(turn('CA1', 1))
  await until('Redis has executed it', () => relay.holdsReplies)
  relay.cut()
  await until('the append has failed', () => producer.appender.failure)
  const later = producer.put(turn('CA1', 2))
  await Promise.all([doubtful, later])
  expect(await seqsOf(direct, 'CA1')).toEqual([0, 1, 2])
  expect(producer.appender.failure).toBeUndefined()
})

test('a_first_batch_that_fails_is_not_taken_for_applied_because_the_second_was', async () => {
  await direct.client.script('FLUSH')
  const producer = new Producer(through)
  relay.holdReplies = true
  const first = producer.put(turn('CA1', 0))
  await until('Redis has said that it does not know the script', () => relay.holdsReplies)
  relay.holdRequests = true
  const second = producer.put(turn('CA1', 1))
  await until('the second batch is on its way', () => relay.holdsRequests)
  const another = new Producer(direct) // another ingest process tells Redis the script
  await another.store(turn('CA2', 0))
  relay.release()
  await Promise.all([first, second])
  expect(await seqsOf(direct, 'CA1')).toEqual([0, 1])
})

test('a_Redis_that_lost_its_last_writes_does_not_stop_appends', async () => {
  const producer = new Producer(direct)
  for (let seq = 0; seq < 5; seq++) await producer.store(turn('CA1', seq))
  const [key] = await direct.client.keys('*producer*')
  expect(await direct.client.get(key!)).toBe('5')
  await direct.client.set(key!, '3') // as after a restart with its append-only file of a second ago
  await producer.store(turn('CA1', 5))
  await direct.client.del(key!)
  await producer.store(turn('CA1', 6))
  expect(await seqsOf(direct, 'CA1')).toEqual([0, 1, 2, 3, 4, 5, 6])
})

test('an_append_that_is_not_confirmed_is_not_settled_and_is_applied_once', async () => {
  let confirms = 0
  const confirm = async () => {
    if (++confirms <= 3) throw new Error('not on disk yet')
  }
  await new Producer(direct).store(turn('CA0', 0)) // Redis knows the script
  const producer = new Producer(direct, { confirm })
  await producer.store(turn('CA1', 0), turn('CA1', 1))
  expect(confirms).toBe(4)
  expect(await producer.failures()).toBe(3)
  expect(await seqsOf(direct, 'CA1')).toEqual([0, 1])
})

test('an_append_waits_while_another_is_confirmed_and_then_takes_along_what_has_come_since', async () => {
  const confirmations: (() => void)[] = []
  let isSlow = false
  const confirm = async () => {
    if (isSlow) await new Promise<void>((resolve) => confirmations.push(resolve))
  }
  const producer = new Producer(direct, { confirm })
  await producer.put(turn('CA1', 0)) // now Redis knows the script
  isSlow = true
  const first = producer.put(turn('CA1', 1))
  await until('it is being confirmed', () => confirmations.length === 1)
  const others = [producer.put(turn('CA1', 2)), producer.put(turn('CA1', 3))]
  await new Promise(setImmediate) // sent, if they are not held back
  expect(await seqsOf(direct, 'CA1')).toEqual([0, 1])
  confirmations[0]!()
  await first
  await until('the others are being confirmed', () => confirmations.length === 2)
  confirmations[1]!()
  await Promise.all(others)
  expect(confirmations).toHaveLength(2)
  expect(await seqsOf(direct, 'CA1')).toEqual([0, 1, 2, 3])
})

test('the_queue_is_full_while_Redis_is_away_and_empties_when_it_is_back', async () => {
  const producer = new Producer(through, { maxQueueBytes: 1000 })
  relay.holdRequests = true
  const all = Array.from({ length: 20 }, (_, seq) => producer.put(turn('CA1', seq, 'x'.repeat(100))))
  expect(producer.appender.isFull).toBe(true)
  await until('an append is on its way', () => relay.holdsRequests)
  relay.cut()
  await Promise.all(all)
  await producer.appender.drain()
  expect(producer.appender.isFull).toBe(false)
  expect(await eventsOf(direct, 'CA1')).toHaveLength(20)
})

test.each([
  ['the last append has failed', 1e9, true],
  ['it hangs', 1e9, false],
  ['the queue is full', 100, false],
])('Redis_is_away_while %s', async (_, maxQueueBytes, fails) => {
  const producer = new Producer(through, { maxQueueBytes })
  await producer.store(turn('CA1', 0))
  expect(producer.appender.isAway).toBe(false)
  relay.holdRequests = true
  const waiting = producer.put(turn('CA1', 1))
  await until('the append is on its way', () => relay.holdsRequests)
  expect(producer.appender.isAway).toBe(producer.appender.isFull)
  if (fails) relay.cut()
  await until('it is away', () => producer.appender.isAway)
  expect(producer.appender.failure !== undefined, 'long before its silence is taken for a failure').toBe(fails)
  relay.holdRequests = false
  relay.release()
  await waiting
  await until('it is back', () => !producer.appender.isAway)
})

test('an_origin_that_throws_is_a_bug_and_no_append_that_failed', async () => {
  const producer = new Producer(direct)
  await producer.store(turn('CA1', 0)) // Redis knows the script
  const failures = await producer.failures()
  const thrown = uncaught()
  const origin = {
    settle: () => {
      throw new Error('a bug')
    },
    settled: () => undefined,
  }
  const event = turn('CA1', 1)
  producer.appender.append(event, JSON.stringify(event), origin, 0)
  expect((await thrown).message).toBe('a bug')
  expect(await producer.failures()).toBe(failures)
  await producer.store(turn('CA1', 2))
  expect(await seqsOf(direct, 'CA1')).toEqual([0, 1, 2])
})

/** The next error that nobody catches; it would end the process. */
function uncaught(): Promise<Error> {
  const usual = process.listeners('unhandledRejection')
  process.removeAllListeners('unhandledRejection')
  return new Promise<Error>((resolve) => {
    process.once('unhandledRejection', (error) => {
      for (const listener of usual) process.on('unhandledRejection', listener)
      resolve(error as Error)
    })
  })
}
