/** `calltape rescue --watch`: an unmodified bot's calls are kept from now on, told of by the server or found by scanning. */
import { setTimeout as sleep } from 'node:timers/promises'
import { Redis } from 'ioredis'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, onTestFinished, test } from 'vitest'
import { keyOfCall, MissedEnds } from '../cli/rescue/missed.js'
import { callSidInKey } from '../cli/rescue/session.js'
import { Source } from '../cli/rescue/source.js'
import { readConfig } from '../shared/config.js'
import { Partitions } from '../shared/keys.js'
import { connectRedis } from '../shared/redis.js'
import { type Sink, startSink } from '../sink/sink.js'
import { KillableStore } from './support/killable-stores.js'
import { LegacyBot, RescueProcess, said, session, sessionKey, utcNow } from './support/legacy-bot.js'
import type { StoreServer } from './support/store-server.js'
import { type Database, freshDatabase, log, ownRedis, until } from './support/stores.js'
import { Producer, turn } from './support/streams.js'

/** Longer than any test: what is found before was not found by the scan. */
const NO_SCAN = ['--every', '1000']

let database: Database
let server: StoreServer
let redis: Redis
let bot: LegacyBot
let sink: Sink
let environment: Record<string, string>
beforeAll(async () => {
  ;[server, database] = await Promise.all([ownRedis(), freshDatabase()])
  environment = { REDIS_URL: server.url, DATABASE_URL: database.url, SINK_METRICS_PORT: '0' }
  sink = await startSink(readConfig(environment), log)
  redis = (await connectRedis(server.url, log)) as Redis
  bot = new LegacyBot(redis)
})
afterAll(async () => {
  redis.disconnect()
  await sink.stop()
  await Promise.all([server.stop(), database.drop()])
})

let names = 0
const newSid = () => `CA-watched-${names++}`

async function watching(args: string[], more: Record<string, string> = {}): Promise<RescueProcess> {
  const process = await RescueProcess.watching(args, { ...environment, ...more })
  onTestFinished(async () => {
    if (!process.hasExited) await process.end('SIGKILL')
  })
  return process
}

const textsOf = async (sid: string) =>
  (
    await database.pool.query<{ text: string }>(
      'SELECT text FROM call_transcript_turns WHERE call_sid = $1 ORDER BY spoken_at, text',
      [sid],
    )
  ).rows.map(({ text }) => text)
const callOf = async (sid: string) =>
  (await database.pool.query('SELECT * FROM call_sessions WHERE call_sid = $1', [sid])).rows[0]
const isFinal = (sid: string) =>
  until(
    `${sid} is final`,
    async () => {
      const call = await callOf(sid)
      return call?.finalized_at instanceof Date ? call : undefined
    },
    15_000,
  )
const hasTurns = (sid: string, count: number) =>
  until(`${sid} has ${count} turns`, async () => (await textsOf(sid)).length === count, 15_000)
const getCalls = async () => Number(/cmdstat_get:calls=(\d+)/.exec(await redis.info('commandstats'))?.[1] ?? 0)

describe.each([
  ['with_notifications', 'K$gx', NO_SCAN],
  ['with_scans_alone', '', ['--every', '0.3']],
] as const)('%s', (_, flags, args) => {
  beforeEach(async () => {
    await redis.flushdb()
    await redis.config('SET', 'notify-keyspace-events', flags)
  })
  afterEach(() => redis.config('SET', 'notify-keyspace-events', ''))

  test('turns_are_there_while_the_call_goes_on_and_its_end_when_the_key_expires', async () => {
    const [before, sid] = [newSid(), newSid()]
    await bot.begin(before, [said(before, 0)])
    const rescue = await watching([...args])
    await hasTurns(before, 1)
    await bot.begin(sid)
    for (let n = 0; n < 3; n++) {
      await bot.say(sid, said(sid, n))
      await hasTurns(sid, n + 1)
    }
    expect((await callOf(sid)).finalized_at).toBeNull()
    await redis.pexpire(sessionKey(sid), 1)
    await redis.del(sessionKey(before))
    expect(await isFinal(sid)).toMatchObject({ end_reason: 'expired', turn_count: 3, conversation_stage: 'discovery' })
    expect(await isFinal(before)).toMatchObject({ end_reason: 'expired', turn_count: 1 })
    const { code, report } = await rescue.end('SIGTERM')
    expect(report).toMatchObject({
      clean: true,
      sessions: 2,
      turns: 4,
      new: 4,
      ended: 2,
      expired: 0,
      interrupted: false,
    })
    expect(code).toBe(0)
  })

  test('a_call_that_went_silent_is_over_and_live_again_when_it_goes_on', async () => {
    const sid = newSid()
    const old = Date.now() - 60_000
    await watching([...args], { IDLE_TIMEOUT: '10' })
    await redis.set(
      sessionKey(sid),
      JSON.stringify(session(sid, [said(sid, 0, old)], { last_interaction_time: utcNow(old) })),
    )
    expect(await isFinal(sid)).toMatchObject({ end_reason: 'expired', turn_count: 1 })
    await bot.say(sid, said(sid, 1))
    await hasTurns(sid, 2)
    await until('it is live again', async () => (await callOf(sid)).finalized_at === null)
    await redis.rename(sessionKey(sid), `elsewhere:${sid}`)
    expect(await isFinal(sid)).toMatchObject({ turn_count: 2 })
  })

  test('a_call_whose_key_is_written_is_not_silent_however_its_bots_clock_is_set', async () => {
    const sid = newSid()
    const old = Date.now() - 5 * 3_600_000
    const begun = session(sid, [said(sid, 0, old)], { last_interaction_time: utcNow(old) })
    await watching([...args], { IDLE_TIMEOUT: '10' })
    await redis.set(sessionKey(sid), JSON.stringify(begun))
    await isFinal(sid)
    const more = [said(sid, 0, old), said(sid, 1, old + 1000)]
    await redis.set(sessionKey(sid), JSON.stringify({ ...begun, transcript_history: more }))
    await hasTurns(sid, 2)
    await until('it is live again', async () => (await callOf(sid)).finalized_at === null)
    await sleep(2500) // silent calls are looked for every second
    expect((await callOf(sid)).finalized_at).toBe(null)
  })

  test('what_cannot_be_read_is_reported_until_it_can', async () => {
    const sid = newSid()
    const whole = JSON.stringify(session(sid, [said(sid, 0), said(sid, 1)]))
    await redis.set(sessionKey(`${sid}-x`), '???')
    const rescue = await watching([...args])
    await redis.set(sessionKey(sid), whole.slice(0, whole.indexOf('says 1')))
    await hasTurns(sid, 1)
    await redis.set(sessionKey(sid), whole)
    await hasTurns(sid, 2)
    const { code, report } = await rescue.end('SIGINT')
    expect(report).toMatchObject({ sessions: 2, truncated: 0, unreadable: 1, turns: 2 })
    expect([code, report!.findings.map(({ key }) => key)]).toEqual([1, [sessionKey(`${sid}-x`)]])
  })
})

test('it_says_which_way_it_watches_and_how_to_switch_notifications_on_but_does_not', async () => {
  await redis.config('SET', 'notify-keyspace-events', 'Eg')
  const scanning = await watching([])
  const { host, port } = redis.options
  expect(scanning.err).toContain('all keys are read every 2 s')
  expect(scanning.err).toContain(`redis-cli -h ${host} -p ${port} CONFIG SET notify-keyspace-events '`)
  const [, flags] = /notify-keyspace-events '(.*?)'/.exec(scanning.err)!
  expect((await redis.config('GET', 'notify-keyspace-events')) as string[]).toHaveLength(2)
  expect(((await redis.config('GET', 'notify-keyspace-events')) as string[])[1]!.split('').toSorted()).toEqual([
    'E',
    'g',
  ])
  await scanning.end('SIGTERM')
  await redis.config('SET', 'notify-keyspace-events', flags!)
  const told = await watching([])
  expect(told.err).toContain('watching: keyspace notifications, and all keys are read every 30 s')
  await told.end('SIGTERM')
  await redis.config('SET', 'notify-keyspace-events', '')
})

test('a_server_that_does_not_let_itself_be_asked_is_scanned', async () => {
  const sid = newSid()
  await redis.call('ACL', 'SETUSER', 'limited', 'on', '>secret', '~*', '&*', '+@all', '-config')
  const url = new URL(server.url)
  url.username = 'limited'
  url.password = 'secret'
  const rescue = await watching(['--source', url.href, '--every', '0.3'])
  expect(rescue.err).toContain('cannot be asked')
  expect(rescue.err).not.toContain('secret')
  await bot.begin(sid, [said(sid, 0)])
  await hasTurns(sid, 1)
})

test('a_burst_of_writes_is_read_a_few_times', async () => {
  const sid = newSid()
  await redis.config('SET', 'notify-keyspace-events', 'K$gx')
  await watching(NO_SCAN)
  await bot.begin(sid, [said(sid, 0)])
  await hasTurns(sid, 1)
  const transcript = Array.from({ length: 300 }, (_, n) => said(sid, n))
  const [before, started] = [await getCalls(), performance.now()]
  for (let n = 1; n <= 300; n++) {
    await redis.set(sessionKey(sid), JSON.stringify(session(sid, transcript.slice(0, n))))
    if (n % 10 === 0) await sleep(10)
  }
  await hasTurns(sid, 301)
  const reads = (await getCalls()) - before
  // Each look is a GET, and each append has one in its script.
  expect(reads).toBeLessThanOrEqual(4 + 2 * Math.ceil((performance.now() - started) / 500))
  await redis.config('SET', 'notify-keyspace-events', '')
})

test('what_was_written_while_its_subscription_was_cut_is_found', async () => {
  const sid = newSid()
  await redis.config('SET', 'notify-keyspace-events', 'K$gx')
  await watching(NO_SCAN)
  await bot.begin(sid, [said(sid, 0)])
  await hasTurns(sid, 1)
  const turn = said(sid, 1)
  const blob = JSON.parse((await redis.get(sessionKey(sid)))!)
  blob.transcript_history.push(turn)
  // In one transaction: it cannot be subscribed again in between.
  await redis.multi().call('CLIENT', 'KILL', 'TYPE', 'pubsub').set(sessionKey(sid), JSON.stringify(blob)).exec()
  await hasTurns(sid, 2)
  await redis.config('SET', 'notify-keyspace-events', '')
})

test('a_call_whose_key_went_while_no_rescue_was_running_is_ended_and_no_other_one_is', async () => {
  const client = await connectRedis(server.url, log)
  onTestFinished(() => client.disconnect())
  await redis.flushdb()
  const partitions = new Partitions(64)
  const [gone, there, others, elsewhere] = [newSid(), newSid(), newSid(), newSid()]
  const [first, second] = [await watching(['--every', '0.3']), await watching(['--every', '0.3', '--match', 'other:*'])]
  await redis.set(`other:${elsewhere}`, JSON.stringify(session(elsewhere, [said(elsewhere, 0)])))
  for (const sid of [gone, there]) await bot.begin(sid, [said(sid, 0)])
  await new Producer({ client, partitions }).store(turn(others, 0))
  for (const sid of [gone, there, others, elsewhere]) await hasTurns(sid, 1)
  for (const process of [first, second]) await process.end('SIGKILL')
  await redis.del(sessionKey(gone))
  // Whatever the scan met: a key that came since, or cannot be read, is there.
  await redis.hset(sessionKey('hash'), 'a', 'b')
  const missed = new MissedEnds(client, partitions, new Source(client, 'session:*'))
  expect(await missed.withoutKey([gone, there, 'hash'])).toEqual([gone])
  await redis.del(sessionKey('hash'))
  for (const match of ['session:*:*', `session:x${gone}*`]) {
    const { report } = await (await watchingOnce(match)).end('SIGTERM')
    expect(report).toMatchObject({ ended: 0, interrupted: false })
  }
  const { report } = await (await watchingOnce('session:*')).end('SIGTERM')
  expect(report).toMatchObject({ sessions: 1, new: 0, ended: 1, interrupted: false })
  expect(await isFinal(gone)).toMatchObject({ end_reason: 'expired', turn_count: 1 })
  for (const sid of [there, others, elsewhere]) expect((await callOf(sid)).finalized_at).toBeNull()
  const again = await watchingOnce('session:*')
  expect((await again.end('SIGTERM')).report).toMatchObject({ ended: 0 })
})

/** `--watch`, when its first scan, and what it does once after that, are behind it. */
async function watchingOnce(match: string): Promise<RescueProcess> {
  const scans = async () => Number(/cmdstat_scan:calls=(\d+)/.exec(await redis.info('commandstats'))?.[1] ?? 0)
  const before = await scans()
  const rescue = await watching(['--every', '0.3', '--match', match])
  await until('it has scanned again', async () => (await scans()) > before + 3)
  return rescue
}

test.each([
  ['session:*', 'CA1', 'session:CA1'],
  ['session:CA*', 'CA1', 'session:CA1'],
  ['session:CA*', 'XB1', undefined],
  ['bots/7:*:v1', 'CA1:v1', 'bots/7:CA1:v1'],
  ['bots/7:*:v1', 'CA1', undefined],
  ['*', 'CA1', 'CA1'],
  ['CA*', 'CA1', 'CACA1'],
  ['CA*', '1', 'CA1'],
  ['session:*:*', 'CA1:1', undefined],
  ['session:C?*', 'CA1', undefined],
  ['session:[CD]*', 'CA1', undefined],
  ['session:CA1', 'CA1', undefined],
])('with_%s_the_key_of_%s_is_%s', (pattern, callSid, key) => {
  expect(keyOfCall(callSid, pattern)).toBe(key)
  if (key !== undefined) expect(callSidInKey(key, pattern)).toBe(callSid)
})

/** A Redis that can be killed, with a database and a sink of its own; and how many turns there are. */
async function mortalStores() {
  const [store, other] = await Promise.all([KillableStore.redis(), freshDatabase()])
  onTestFinished(async () => {
    await store.end()
    await other.drop()
  })
  const stores = { REDIS_URL: store.url, DATABASE_URL: other.url, SINK_METRICS_PORT: '0' }
  const itsSink = await startSink(readConfig(stores), log)
  onTestFinished(() => itsSink.stop())
  const count = async () => (await other.pool.query('SELECT count(*)::int AS n FROM call_transcript_turns')).rows[0].n
  return { store, stores, count }
}

test('a_redis_that_goes_away_is_waited_for', async () => {
  const { store, stores, count } = await mortalStores()
  const write = async (sid: string) => {
    const client = new Redis(store.url)
    await new LegacyBot(client).begin(sid, [said(sid, 0)])
    client.disconnect()
  }
  const rescue = await watching(['--every', '0.3'], stores)
  await write('CA-1')
  await until('the first is there', async () => (await count()) === 1)
  await store.kill()
  await until('it has noticed', () => rescue.err.includes('trying again'))
  await store.start()
  await write('CA-2')
  await until('the second is there, too', async () => (await count()) === 2, 20_000)
  const { code, report } = await rescue.end('SIGTERM')
  expect([code, report!.turns, report!.ended]).toEqual([0, 2, 0])
  expect(rescue.err).toContain('answers again')
}, 60_000)

test('what_the_bot_says_while_calltapes_own_redis_is_away_is_appended_when_it_is_back', async () => {
  const { store, stores, count } = await mortalStores()
  const sid = newSid()
  const rescue = await watching(['--source', server.url, '--match', `session:${sid}*`, '--every', '0.3'], stores)
  await store.kill()
  await bot.begin(sid, [said(sid, 0)])
  await sleep(1000) // it tries meanwhile
  await bot.say(sid, said(sid, 1))
  await store.start()
  await until('all of it is there', async () => (await count()) === 2, 20_000)
  expect(await rescue.end('SIGTERM')).toMatchObject({ code: 0, report: { turns: 2, new: 2, sessions: 1 } })
}, 60_000)

test('stopped_while_it_cannot_store_it_says_so', async () => {
  const [store, sid] = [await KillableStore.redis(), newSid()]
  onTestFinished(() => store.end())
  const args = ['--source', server.url, '--match', `session:${sid}*`, '--every', '0.3']
  const rescue = await watching(args, { REDIS_URL: store.url })
  await store.kill()
  await bot.begin(sid, [said(sid, 0)])
  await sleep(1000) // it has it in hand
  const { code, report } = await rescue.end('SIGTERM')
  expect([code, report!.interrupted, report!.turns]).toEqual([1, true, 0])
}, 60_000)

test('of_a_Cluster_every_master_is_scanned_and_read', async () => {
  const cluster = await ownRedis('cluster')
  onTestFinished(() => cluster.stop())
  const node = new Redis(cluster.url)
  await node.call('CLUSTER', 'ADDSLOTSRANGE', '0', '16383')
  await until('the cluster is up', async () => String(await node.call('CLUSTER', 'INFO')).includes('cluster_state:ok'))
  const keys = Array.from({ length: 250 }, (_, i) => sessionKey(`CA${i}`))
  for (const key of keys) await node.set(key, key)
  await node.hset(sessionKey('hash'), 'a', 'b')
  node.disconnect()
  const client = await connectRedis(`${cluster.url},${cluster.url}`, log)
  onTestFinished(() => client.disconnect())
  const source = new Source(client, 'session:*')
  const found = new Map<string, unknown>()
  for await (const page of source.scan()) {
    for await (const read of source.read(page)) {
      for (const { source: each, found: its } of read) found.set(each.key, 'text' in its ? its.text : its)
    }
  }
  const wrongType = { reason: expect.stringContaining('WRONGTYPE') }
  expect(found).toEqual(
    new Map<string, unknown>([...keys.map((key) => [key, key] as const), [sessionKey('hash'), wrongType]]),
  )
})
