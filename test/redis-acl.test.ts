/** Redis users who may do what ingest, sink and commands need, and no more. */
import { randomBytes } from 'node:crypto'
import type { Redis } from 'ioredis'
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest'
import { WebSocket } from 'ws'
import { startIngest } from '../ingest/ingest.js'
import { readConfig } from '../shared/config.js'
import { Partitions } from '../shared/keys.js'
import { readPackageFile } from '../shared/package-root.js'
import { connectRedis } from '../shared/redis.js'
import { aclRules, CLUSTER_RULES, type RedisRole } from '../shared/redis-access.js'
import { startSink } from '../sink/sink.js'
import { Calls, ended, newSid, seqs } from './support/calls.js'
import { calltape } from './support/program.js'
import { type Database, freshDatabase, log, until } from './support/stores.js'
import { ownRedis, type StoreServer, turn } from './support/streams.js'

const ROLES: RedisRole[] = ['ingest', 'sink', 'commands']
// All that a URL has to write in another way.
const PASSWORD = `p@ss/w:rd#?%${randomBytes(4).toString('hex')}`

let server: StoreServer
let admin: Redis
let database: Database
beforeAll(async () => {
  server = await ownRedis()
  admin = (await connectRedis(server.url, log)) as Redis
  database = await freshDatabase()
  for (const role of ROLES) await grant(role)
})
afterAll(async () => {
  admin.disconnect()
  await server.stop()
  await database.drop()
})

const grant = (role: RedisRole, rules = aclRules(role)) =>
  admin.acl('SETUSER', `calltape-${role}`, 'reset', 'on', `>${PASSWORD}`, ...rules)

const environmentOf = (role: RedisRole) => {
  const url = new URL(server.url)
  url.username = `calltape-${role}`
  url.password = encodeURIComponent(PASSWORD)
  return { REDIS_URL: url.href, DATABASE_URL: database.url, INGEST_PORT: '0', SINK_METRICS_PORT: '0' }
}

/** @returns what users were refused since the last time */
async function refusals(): Promise<string[]> {
  const entries = (await admin.acl('LOG')) as unknown as unknown[][]
  await admin.acl('LOG', 'RESET')
  const field = (entry: unknown[], name: string) => String(entry[entry.indexOf(name) + 1])
  return entries.map((entry) => ['username', 'reason', 'object'].map((name) => field(entry, name)).join(' '))
}

async function stack(environment: Record<string, string> = {}) {
  const config = readConfig({ ...environmentOf('ingest'), ...environment })
  const sinkConfig = readConfig({ ...environmentOf('sink'), ...environment })
  const [ingest, sink] = [await startIngest(config, log), await startSink(sinkConfig, log)]
  let isEnded = false
  const end = async () => {
    if (isEnded) return
    isEnded = true
    await ingest.stop()
    await sink.stop()
  }
  onTestFinished(end)
  const redis = { url: server.url, client: admin, partitions: new Partitions(64), drop: async () => {} }
  const wsUrl = ingest.url.replace('http', 'ws')
  return new Calls({ redis, database, config: sinkConfig, ingest, sinks: [sink], wsUrl, end })
}

const post = (calls: Calls, events: object[]) =>
  fetch(`${calls.stack.ingest.url}/v1/events`, {
    method: 'POST',
    body: JSON.stringify(events),
    headers: { 'Content-Type': 'application/json' },
  })

test('the_users_of_the_README_may_do_all_that_is_needed_and_nothing_is_refused_to_them', async () => {
  await refusals()
  const calls = await stack({ STREAM_RETENTION: '10', SWEEP_INTERVAL: '1', IDLE_TIMEOUT: '2', DISCONNECT_GRACE: '0' })
  const [whole, presumed, replayed, erased] = [newSid(), newSid(), newSid(), newSid()]
  for (const sid of [whole, replayed, erased]) {
    expect((await post(calls, [...seqs(3).map((seq) => turn(sid, seq)), ended(sid, 3)])).status).toBe(200)
  }
  await post(calls, [turn(presumed, 0)])
  const bound = new WebSocket(`${calls.stack.wsUrl}/v1/stream?call_sid=${newSid()}`)
  await new Promise((resolve) => bound.addEventListener('message', resolve, { once: true }))
  bound.close()
  expect((await fetch(`${calls.stack.ingest.url}/v1/calls`)).status).toBe(200)
  expect((await fetch(`${calls.stack.ingest.url}/v1/calls/${whole}`)).status).toBe(200)
  await calls.settled(erased)
  const runs = async (...args: string[]) => {
    const { code, err } = await calltape(args, environmentOf('commands'))
    expect({ args, code, err }).toEqual({ args, code: 0, err: expect.any(String) })
  }
  // Together, and before retention takes away what they look at.
  await Promise.all([
    runs('show', whole),
    runs('verify'),
    runs('replay', '--all', '--dry-run'),
    runs('replay', '--call', replayed),
    runs('export', whole, '--format', 'json'),
  ])
  await runs('quarantine', 'list')
  await runs('rescue', '--match', 'nobodys*')
  await runs('erase', erased, '--rewrite-aof')
  const orphan = newSid()
  const stream = calls.stack.redis.partitions.of(orphan).streamPrefix + orphan
  await admin.xadd(stream, '*', 'e', JSON.stringify(turn(orphan, 0)))
  await runs('orphans', '--adopt')
  await until('the silent call is presumed over', async () => (await calls.session(presumed))?.finalized_at, 20_000)
  await until('retention has removed what is old', async () => (await calls.metric('purged_calls_total')) >= 3, 20_000)
  await until('a sweep has run', async () => (await calls.metric('last_sweep_timestamp_seconds')) > 0, 20_000)
  await calls.stack.end()
  expect(await refusals()).toEqual([])
})

test.each(['ingest', 'sink'] as const)('%s_names_at_its_start_what_its_user_may_not_run', async (role) => {
  onTestFinished(() =>
    grant(role)
      .then(() => refusals())
      .then(() => undefined),
  )
  await grant(role, [...aclRules(role), '-spublish', '-xgroup'])
  const start = () => (role === 'ingest' ? startIngest : startSink)(readConfig(environmentOf(role)), log)
  await expect(start()).rejects.toThrow(/^REDIS_URL: its user may not run, .*: .*xgroup\|create.*ACL SETUSER/)
  await expect(start()).rejects.toThrow(/spublish/)
  await grant(
    role,
    aclRules(role).map((rule) => (rule === '~ct:*' ? '~other:*' : rule)),
  )
  await expect(start()).rejects.toThrow(/^REDIS_URL: its user may not run, .*: get, setnx, /)
  await grant(role, ['~ct:*', '&ct:*'])
  await expect(start()).rejects.toThrow(/^REDIS_URL: Redis at .* cannot be used: NOPERM .*'info'/)
  await grant(role, [...aclRules(role), 'resetpass', '>another'])
  await expect(start()).rejects.toThrow(/^REDIS_URL: Redis at .* cannot be used: WRONGPASS/)
})

test('what_is_refused_later_is_retried_and_told_and_nothing_is_lost_or_refused_by_name', async () => {
  const calls = await stack()
  const [before, sid] = [newSid(), newSid()]
  expect((await post(calls, [turn(before, 0)])).status).toBe(200)
  await grant('ingest', [...aclRules('ingest'), '-xadd'])
  await grant('sink', [...aclRules('sink'), '-xread'])
  const refused = await post(calls, [turn(sid, 0)])
  expect(refused.status).toBe(503)
  const isReady = async (url: string) => (await fetch(`${url}/readyz`)).status === 200
  await until('ingest says so', async () => !(await isReady(calls.stack.ingest.url)), 20_000)
  await grant('ingest')
  await until(
    'ingest stores again',
    async () => (await post(calls, [turn(sid, 0), ended(sid, 1)])).status === 200,
    20_000,
  )
  await until('the sink says so', async () => /503 .*(NOPERM|permission)/.test(await calls.ready()), 20_000)
  await grant('sink')
  await calls.settled(sid, 20_000)
  expect(await calls.session(sid)).toMatchObject({ complete: true, turn_count: 1 })
  expect(await calls.quarantined(sid)).toEqual([])
  await refusals()
})

test('the_README_has_the_rules_of_a_Cluster', () => {
  expect(readPackageFile('README.md')).toContain(`\`${CLUSTER_RULES.join(' ')}\``)
})

test.each(ROLES)('the_README_has_the_rules_of_%s', (role) => {
  const readme = readPackageFile('README.md') // in one line: redis-cli knows no other way
  expect(readme).toContain(`\nACL SETUSER calltape-${role} on >PASSWORD ${aclRules(role).join(' ')}\n`)
})
