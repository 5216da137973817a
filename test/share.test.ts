/** Several sinks: each asks for its own partitions, and takes what another one leaves lying. */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterEach, beforeEach, describe, expect, onTestFinished, test } from 'vitest'
import { type Environment, readConfig } from '../shared/config.js'
import { SINKS_KEY } from '../shared/keys.js'
import { Script } from '../shared/script.js'
import { type Sink, startSink } from '../sink/sink.js'
import { figure } from './support/metrics.js'
import { Service } from './support/processes.js'
import { Relay } from './support/relay.js'
import { type Database, freshDatabase, freshRedis, log, type RedisDatabase, until } from './support/stores.js'
import { callsIn, Producer, turn } from './support/streams.js'

let redis: RedisDatabase
let database: Database
let producer: Producer
let environment: Environment
beforeEach(async () => {
  ;[redis, database] = await Promise.all([freshRedis(), freshDatabase()])
  producer = new Producer(redis)
  environment = { REDIS_URL: redis.url, DATABASE_URL: database.url, SINK_METRICS_PORT: '0' }
})
afterEach(() => Promise.all([redis.drop(), database.drop()]))

async function testSink(changes: Environment = {}): Promise<Sink> {
  const sink = await startSink(readConfig({ ...environment, ...changes }), log)
  let stopped: Promise<void> | undefined
  const stop = () => (stopped ??= sink.stop())
  onTestFinished(stop)
  return { ...sink, stop }
}

const owned = (url: string) => figure(url, 'calltape_sink_owned_partitions')
const stolen = (url: string) => figure(url, 'calltape_sink_stolen_calls_total')
const shareOf = (what: string, url: string, partitions: number) =>
  until(`${what} has ${partitions} partitions`, async () => (await owned(url)) === partitions)

/** A call in each partition. */
const everywhere = (round: number) =>
  redis.partitions.all.map(({ partition }) => callsIn(redis.partitions, partition, round + 1).at(-1)!)

async function rows(): Promise<number> {
  const { rows } = await database.pool.query<{ n: number }>('SELECT count(*)::int AS n FROM call_transcript_turns')
  return rows[0]!.n
}

async function inSets(name: 'ready' | 'leased'): Promise<number> {
  const counts = await Promise.all(redis.partitions.all.map((p) => redis.client.zcard(p[name])))
  return counts.reduce((sum, n) => sum + n, 0)
}

describe('partitions', () => {
  test('a_sink_alone_has_all_two_have_half_each_and_who_stops_gives_its_part_up', async () => {
    const first = await testSink()
    expect(await owned(first.url)).toBe(64)
    const second = await testSink()
    await shareOf('the second', second.url, 32)
    await shareOf('the first', first.url, 32)
    expect(await figure(second.url, 'calltape_sink_sinks')).toBe(2)
    await second.stop()
    expect(await redis.client.zcard(SINKS_KEY)).toBe(1)
    await shareOf('the first', first.url, 64)
  })

  test('a_Redis_that_forgets_who_lives_is_told_again', async () => {
    const [first, second] = [await testSink(), await testSink()]
    await shareOf('the first', first.url, 32)
    await redis.client.del(SINKS_KEY)
    await until('both are known again', async () => (await redis.client.zcard(SINKS_KEY)) === 2)
    await shareOf('the first', first.url, 32)
    await shareOf('the second', second.url, 32)
  })

  test('a_sink_whose_PostgreSQL_is_away_has_none_until_it_is_back', async () => {
    const relay = await Relay.start(database.url)
    onTestFinished(() => relay.stop())
    const [cutOff, other] = [await testSink({ DATABASE_URL: relay.url }), await testSink()]
    await shareOf('the other', other.url, 32)
    relay.onChunk = () => 'drop'
    const isCutOff = async () => {
      await producer.store(...everywhere(0).map((sid) => turn(sid, Date.now() % 1_000_000)))
      return (await owned(cutOff.url)) === 0
    }
    await until('the others have its part', isCutOff)
    await shareOf('the other', other.url, 64)
    relay.onChunk = undefined
    await shareOf('it', cutOff.url, 32)
  })
})

/** Which partitions' leases pass a relay in front of Redis. */
async function watchedRedis(): Promise<{ url: string; asked: Set<number> }> {
  const { sha } = new Script('sink/lease.lua')
  const relay = await Relay.start(redis.url)
  onTestFinished(() => relay.stop())
  const asked = new Set<number>()
  relay.onChunk = (chunk) => {
    const text = chunk.toString('latin1')
    if (text.includes(sha)) for (const [, p] of text.matchAll(/ct:\{(\d+)\}:ready/g)) asked.add(Number(p))
    return 'pass'
  }
  return { url: relay.url, asked }
}

test('news_makes_the_sink_of_its_partition_ask_and_the_other_one_sleep_on', async () => {
  const ways = [await watchedRedis(), await watchedRedis()]
  const sinks = await Promise.all(ways.map(({ url }) => testSink({ REDIS_URL: url })))
  for (const { url } of sinks) await shareOf('each', url, 32)
  const [first, second] = ways.map(({ asked }) => asked) as [Set<number>, Set<number>]
  let round = 0
  const bothAsk = async () => {
    for (const { asked } of ways) asked.clear()
    for (const sid of everywhere(round)) await producer.store(turn(sid, 0))
    round++
    await until('all is stored', async () => (await rows()) === 64 * round)
    return [...first].filter((p) => second.has(p)).length
  }
  // None, but on a machine that stands still for a quarter of a second, when one takes what the other leaves: then once more.
  await until('each partition is asked for by one of them', async () => (await bothAsk()) < 8)
})

describe('what_another_sink_leaves_lying', () => {
  async function twoProcesses(): Promise<[Service, Service]> {
    const folder = mkdtempSync(join(tmpdir(), 'calltape-share-'))
    onTestFinished(() => rmSync(folder, { recursive: true, force: true }))
    const services = ['a', 'b'].map((name) => {
      const service = new Service({ name: 'sink', environment, logFile: join(folder, name), unsupervised: true })
      onTestFinished(() => service.end())
      return service
    })
    const urls = await Promise.all(services.map((service) => service.serves()))
    for (const url of urls) await shareOf('each', url, 32)
    return services as [Service, Service]
  }

  test.each(['SIGKILL', 'SIGSTOP'] as const)(
    'after_%s_is_stored_before_anybody_knows_that_it_is_gone',
    async (signal) => {
      const [gone, other] = await twoProcesses()
      const url = await other.serves()
      gone.signal(signal)
      await producer.store(...everywhere(0).map((sid) => turn(sid, 0)))
      await until('all is stored', async () => (await rows()) === 64)
      expect(await owned(url)).toBe(32)
      expect(await stolen(url)).toBe(32)
      if (signal === 'SIGSTOP') return // as with the other from here on
      await shareOf('the other', url, 64)
      await producer.store(...everywhere(1).map((sid) => turn(sid, 0)))
      await until('all is stored', async () => (await rows()) === 128)
      expect(await stolen(url), 'they are its own now').toBe(32)
    },
  )

  test('with_a_slow_PostgreSQL_is_stored_but_for_what_it_has_in_hand', async () => {
    const relay = await Relay.start(database.url)
    onTestFinished(() => relay.stop())
    const [slow, other] = [await testSink({ DATABASE_URL: relay.url }), await testSink()]
    await shareOf('the first', slow.url, 32)
    await shareOf('the other', other.url, 32)
    relay.delayMs = 1500
    for (let round = 0; round < 5; round++) {
      await producer.store(...everywhere(round).map((sid) => turn(sid, 0)))
      await sleep(50)
    }
    let inHand = 0
    await until('everything else is stored', async () => {
      inHand = await inSets('leased')
      return (await inSets('ready')) === 0 && (await rows()) + inHand === 5 * 64
    })
    expect(inHand).toBeGreaterThan(0)
    expect(await stolen(other.url)).toBeGreaterThan(0)
    relay.delayMs = 0
    await until('all is stored', async () => (await rows()) === 5 * 64, 20_000)
  })
})
