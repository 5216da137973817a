/** sweep: what looks like a call and is nobody's is found, what is merely in flight is not, and calls find home again. */
import { setTimeout as sleep } from 'node:timers/promises'
import { Redis } from 'ioredis'
import { afterAll, afterEach, beforeAll, expect, onTestFinished, test } from 'vitest'
import { SWEEP_KEY } from '../shared/keys.js'
import { createSinkMetrics } from '../shared/metrics.js'
import type { Pool } from '../shared/postgres.js'
import { connectRedis, openPartitions } from '../shared/redis.js'
import { Leases } from '../sink/lease.js'
import { ORPHAN_KINDS, type Orphan, OrphanSearch } from '../sink/orphans.js'
import { Overdue } from '../sink/overdue.js'
import { Retention } from '../sink/retention.js'
import { startSink } from '../sink/sink.js'
import { Sweep } from '../sink/sweep.js'
import { Calls, ended, seqs } from './support/calls.js'
import { calltape } from './support/program.js'
import { AT_ONCE, finalCall, isFinal, QUICKLY, retentionOf, tracesOf } from './support/retention.js'
import { log, ownRedis, until } from './support/stores.js'
import {
  callsIn,
  committed,
  LIMITS,
  leaseAll,
  Producer,
  readAll,
  sessionOf,
  streamOf,
  turn,
} from './support/streams.js'

let calls: Calls
beforeAll(async () => {
  calls = await Calls.start({ STREAM_RETENTION: 'off' })
})
afterAll(() => calls.stack.end())
afterEach(() => calls.stack.redis.client.flushdb())

const searchOf = ({ client, partitions } = calls.stack.redis) => new OrphanSearch(client, partitions, QUICKLY)

async function find(search = searchOf()): Promise<Orphan[]> {
  const found: Orphan[] = []
  for await (const orphan of search.run()) found.push(orphan)
  return found
}

const isIn = (sid: string, list: 'ready' | 'leased' | 'open' | 'ended') => calls.stack.redis.partitions.of(sid)[list]

/** Its stream and its session stay, no list knows it. */
async function forgotten(sid: string): Promise<void> {
  for (const list of ['ready', 'leased', 'open', 'ended'] as const) {
    await calls.stack.redis.client.zrem(isIn(sid, list), sid)
  }
}

/** A call of each kind, by the hand of somebody else. @returns its key by its kind */
async function oneOfEach(): Promise<Record<(typeof ORPHAN_KINDS)[number], string>> {
  const { client, partitions } = calls.stack.redis
  const [unread, unended, groupless, lost, foreign, misplaced] = callsIn(partitions, 7, 6) as [
    string,
    string,
    string,
    string,
    string,
    string,
  ]
  await calls.storeSettled(...[unread, unended, groupless].map((sid) => turn(sid, 0)))
  await calls.producer.store(turn(lost, 0))
  await calls.settled(lost)
  for (const sid of [unread, unended, groupless, lost]) await forgotten(sid)
  await client.xadd(streamOf(calls.stack.redis, unread), '*', 'e', JSON.stringify(turn(unread, 1)))
  await client.xgroup('DESTROY', streamOf(calls.stack.redis, groupless), 'sink')
  await client.del(streamOf(calls.stack.redis, lost))
  await client.set(streamOf(calls.stack.redis, foreign), 'of somebody else')
  const elsewhere = `ct:{8}:call:${misplaced}`
  await client.xadd(elsewhere, '*', 'e', 'x')
  await client.xadd('ct:{7}:call:no call sid', '*', 'e', 'x')
  return {
    unread: streamOf(calls.stack.redis, unread),
    unended: streamOf(calls.stack.redis, unended),
    no_group: streamOf(calls.stack.redis, groupless),
    lost_stream: sessionOf(calls.stack.redis, lost),
    foreign: streamOf(calls.stack.redis, foreign),
    misplaced: elsewhere,
    invalid_call_sid: 'ct:{7}:call:no call sid',
  }
}

test('every_kind_of_orphan_is_found_and_nothing_else', async () => {
  const keys = await oneOfEach()
  await finalCall(calls)
  await calls.storeSettled(turn('live', 0))
  const found = await find()
  expect(Object.fromEntries(found.map(({ kind, key }) => [kind, key]))).toEqual(keys)
  expect(found).toHaveLength(ORPHAN_KINDS.length)
})

test('names_that_are_not_text_and_partitions_that_do_not_exist_are_found', async () => {
  const { client } = calls.stack.redis
  await client.xadd(Buffer.from('ct:{3}:call:\xff\xfe', 'latin1'), '*', 'e', 'x')
  await client.xadd('ct:{99}:call:CA1', '*', 'e', 'x')
  await client.set('ct:{99}:session:CA1', 'x')
  expect((await find()).map(({ kind }) => kind).toSorted()).toEqual(['foreign', 'invalid_call_sid', 'misplaced'])
})

test('an_orphan_at_one_look_alone_is_none', async () => {
  const sid = await finalCall(calls)
  await forgotten(sid)
  const { client, partitions } = calls.stack.redis
  const search = new OrphanSearch(client, partitions, { ...QUICKLY, lookAgainMs: 300 })
  const found = find(search)
  await sleep(100)
  await client.zadd(isIn(sid, 'ended'), Date.now(), sid)
  expect(await found).toEqual([])
})

test('sweep_never_reports_calls_in_flight', async () => {
  const { round } = retentionOf(calls)
  let isPlaying = true
  const play = async (caller: number) => {
    for (let c = 0; isPlaying; c++) {
      const sid = `flight-${caller}-${c}`
      await calls.producer.store(...seqs(3).map((seq) => turn(sid, seq)))
      await calls.producer.store(ended(sid, 3))
    }
  }
  const purge = async () => {
    for (; isPlaying; await sleep(20)) await round()
  }
  const playing = [...seqs(20).map(play), purge()]
  const deadline = performance.now() + 2500
  const found: Orphan[] = []
  let streams = 0
  while (performance.now() < deadline) {
    const search = new OrphanSearch(calls.stack.redis.client, calls.stack.redis.partitions, {
      ...QUICKLY,
      lookAgainMs: 0,
    })
    found.push(...(await find(search)))
    streams += search.census.streams
  }
  isPlaying = false
  await Promise.all(playing)
  expect(found).toEqual([])
  expect(streams, 'there was something to see').toBeGreaterThan(200)
  await calls.idle()
})

test('streams_are_counted_and_their_memory_is_summed', async () => {
  const sids = await Promise.all(seqs(5).map(() => finalCall(calls, 20)))
  const { client } = calls.stack.redis
  let bytes = 0
  for (const sid of sids) {
    for (const key of [streamOf(calls.stack.redis, sid), sessionOf(calls.stack.redis, sid)]) {
      bytes += (await client.memory('USAGE', key))!
    }
  }
  const search = searchOf()
  await find(search)
  expect(search.census).toMatchObject({ streams: 5, bytes })
})

test('adopt_brings_an_orphan_home', async () => {
  const keys = await oneOfEach()
  const { client, partitions } = calls.stack.redis
  const search = searchOf()
  const overdue = new Overdue(client, partitions)
  for (const orphan of await find(search)) {
    const isEnded = orphan.kind === 'lost_stream' && (await overdue.end(orphan.place.callSid))
    const isAdopted = isEnded || (await search.adopt(orphan, 1))
    expect([orphan.kind, isAdopted]).toEqual([
      orphan.kind,
      ['unread', 'unended', 'no_group', 'lost_stream'].includes(orphan.kind),
    ])
  }
  for (const kind of ['unread', 'unended', 'no_group', 'lost_stream'] as const) {
    const sid = keys[kind].replace(/^.*:/, '')
    await isFinal(calls, sid)
    expect(await calls.session(sid)).toMatchObject({ end_reason: 'abandoned', turn_count: kind === 'unread' ? 2 : 1 })
  }
  expect((await find()).map(({ kind }) => kind).toSorted()).toEqual(['foreign', 'invalid_call_sid', 'misplaced'])
})

test('a_final_call_that_its_list_has_forgotten_is_adopted_into_its_retention', async () => {
  const sid = await finalCall(calls)
  const before = await calls.session(sid)
  await forgotten(sid)
  const search = searchOf()
  const [orphan] = await find(search)
  expect(await search.adopt(orphan!, 1)).toBe(true)
  expect(await search.adopt(orphan!, 1), 'it is none any more').toBe(false)
  expect(await tracesOf(calls, sid)).toEqual(['stream', 'session', 'ended'])
  expect(await retentionOf(calls).round()).toBe(1)
  expect(await calls.session(sid)).toEqual(before)
})

test('one_sink_sweeps_and_every_sink_says_what_it_has_found', async () => {
  const sid = await finalCall(calls)
  await forgotten(sid)
  const config = { ...calls.stack.config, SWEEP_INTERVAL: 1 }
  const sinks = [await startSink(config, log), await startSink(config, log)]
  onTestFinished(async () => void (await Promise.all(sinks.map((sink) => sink.stop()))))
  for (const sink of sinks) {
    await until('it says so', async () => (await calls.metric('orphan_streams', sink)) === 1, 20_000)
    expect(await calls.metric('streams', sink)).toBe(1)
    expect(await calls.metric('stream_bytes', sink)).toBeGreaterThan(500)
    expect(await calls.metric('last_sweep_timestamp_seconds', sink)).toBeGreaterThan(Date.now() / 1000 - 60)
  }
})

test('a_shorter_interval_holds_from_the_next_start_on', async () => {
  const { stack } = calls
  const metrics = createSinkMetrics()
  const sweepEvery = (ms: number) => new Sweep({ redis: stack.redis.client, metrics, log }, stack.redis.partitions, ms)
  const sweptAt = async () => Number(await stack.redis.client.hget(SWEEP_KEY, 'at'))
  await until('it is swept', async () => {
    await sweepEvery(3600_000).tend() // unless the sink is at it
    return (await sweptAt()) > 0
  })
  const first = await sweptAt()
  await sweepEvery(3600_000).tend()
  expect(await sweptAt()).toBe(first)
  await sleep(2)
  await sweepEvery(1).tend()
  expect(await sweptAt()).toBeGreaterThan(first)
})

test('the_command_lists_orphans_and_adopts_them', async () => {
  const { client } = calls.stack.redis
  const environment = { REDIS_URL: calls.stack.redis.url, DATABASE_URL: calls.stack.database.url }
  const sid = await finalCall(calls)
  expect(await calltape(['orphans'], environment)).toMatchObject({
    code: 0,
    out: expect.stringContaining('No orphans'),
  })
  await forgotten(sid)
  await client.set('ct:{3}:call:somebody', 'x')
  const found = await calltape(['orphans', '--json'], environment)
  const { orphans } = JSON.parse(found.out) as { orphans: Record<string, unknown>[] }
  expect(found.code).toBe(1)
  expect(orphans).toHaveLength(2)
  expect(orphans.find(({ kind }) => kind === 'unended')).toMatchObject({
    key: streamOf(calls.stack.redis, sid),
    entries: 3,
    adopted: false,
    bytes: expect.any(Number),
    age_seconds: expect.any(Number),
  })
  const adopted = await calltape(['orphans', '--adopt'], environment)
  expect(adopted).toMatchObject({ code: 1, out: expect.stringContaining('2 orphans among 1 streams, 1 adopted.') })
  expect(await tracesOf(calls, sid)).toContain('ended')
})

test('retention_and_sweep_work_on_a_cluster', async () => {
  const server = await ownRedis('cluster')
  const node = new Redis(server.url)
  await node.call('CLUSTER', 'ADDSLOTSRANGE', '0', '16383')
  await until('the cluster is up', async () => String(await node.call('CLUSTER', 'INFO')).includes('cluster_state:ok'))
  node.disconnect()
  const client = await connectRedis(`${server.url},${server.url}`, log)
  onTestFinished(async () => {
    client.disconnect()
    await server.stop()
  })
  const store = { client, partitions: await openPartitions(client, 64) }
  const sids = seqs(90).map((n) => `CA${n}`)
  await new Producer(store).store(...sids.flatMap((sid) => [turn(sid, 0), ended(sid, 1)]))
  const leases = new Leases(client, store.partitions, LIMITS.leaseMs)
  const taken = await readAll(client, await leaseAll(leases, store), LIMITS)
  await leases.settle(taken.map((each) => committed(each, 2, true)))
  await client.zrem(store.partitions.of('CA7').ended, 'CA7')
  const search = new OrphanSearch(client, store.partitions, QUICKLY)
  const [orphan, ...others] = await find(search)
  expect([orphan?.key, others]).toEqual([streamOf(store, 'CA7'), []])
  expect(search.census.streams).toBe(90)
  expect(await search.adopt(orphan!, 1)).toBe(true)
  // Of PostgreSQL is asked nothing here but whether it has them.
  const query = ({ values: [asked] }: { values: [string[]] }) =>
    Promise.resolve({ rows: asked.filter((sid) => sid !== 'CA9').map((call_sid) => ({ call_sid, counted: true })) })
  const context = { redis: client, pool: { query } as unknown as Pool, metrics: createSinkMetrics(), log }
  expect(await new Retention(context, store.partitions, AT_ONCE).round()).toBe(89)
  expect(await client.exists(streamOf(store, 'CA7'))).toBe(0)
  expect(await client.exists(streamOf(store, 'CA9'))).toBe(1)
  expect((await context.metrics.shared.keptCalls.get()).values[0]?.value).toBe(1)
})
