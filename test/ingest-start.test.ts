/** What ingest wants to start: addresses, tokens, certificates, and a Redis that can keep what DURABILITY promises. */
import { spawn, spawnSync } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { request as httpsRequest } from 'node:https'
import { createServer } from 'node:net'
import { networkInterfaces, tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { TLSSocket } from 'node:tls'
import getPort from 'get-port'
import { Redis } from 'ioredis'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, onTestFinished, test } from 'vitest'
import type { Ingest } from '../ingest/ingest.js'
import { OperatorError } from '../shared/config.js'
import { Partitions } from '../shared/keys.js'
import { connectRedis } from '../shared/redis.js'
import { testIngest, Wire } from './support/ingest.js'
import { Relay } from './support/relay.js'
import { freshRedis, log, type RedisDatabase, until } from './support/stores.js'
import { eventsOf, ownRedis, seqsOf, turn } from './support/streams.js'

let redis: RedisDatabase
beforeEach(async () => {
  redis = await freshRedis()
})
afterEach(() => redis.drop())

const statusOf = async (ingest: Ingest, path: string) => (await fetch(ingest.url + path)).status

async function store(ingest: Ingest): Promise<unknown> {
  const headers = { 'Content-Type': 'application/json' }
  const body = JSON.stringify(turn('CA1', 0))
  return (await fetch(`${ingest.url}/v1/events`, { method: 'POST', headers, body })).json()
}

describe('start', () => {
  /** What an operator reads: one line, that says what to do. */
  async function refusalOf(environment: Record<string, string>): Promise<string> {
    try {
      await testIngest({ REDIS_URL: redis.url, ...environment })
    } catch (error) {
      expect(error).toBeInstanceOf(OperatorError)
      return (error as Error).message
    }
    throw new Error('it started')
  }

  test('without_tokens_it_listens_on_loopback_only', async () => {
    const { url } = await testIngest({ REDIS_URL: redis.url })
    expect(new URL(url).hostname).toBe('127.0.0.1')
    const hasIPv6 = networkInterfaces().lo?.some(({ family }) => family === 'IPv6')
    for (const INGEST_HOST of ['127.0.0.1', 'localhost', ...(hasIPv6 ? ['::1'] : [])]) {
      const ingest = await testIngest({ REDIS_URL: redis.url, INGEST_HOST })
      expect(await statusOf(ingest, '/v1/calls'), INGEST_HOST).toBe(200)
    }
  })

  test('without_tokens_it_refuses_any_other_address_and_says_what_to_set', async () => {
    for (const INGEST_HOST of ['0.0.0.0', '::', '10.1.2.3', 'example.com', '127.0.0.1.example.com']) {
      const message = await refusalOf({ INGEST_HOST })
      expect(message).toMatch(/^INGEST_HOST is /)
      expect(message).toContain('INGEST_TOKENS')
      expect(message).toContain('ALLOW_UNAUTHENTICATED=true')
    }
    expect(await refusalOf({ INGEST_HOST: '0.0.0.0', INGEST_TOKENS: ' , ' })).toContain('INGEST_TOKENS')
    expect(await refusalOf({ INGEST_HOST: '0.0.0.0', ALLOW_UNAUTHENTICATED: 'false' })).toContain('INGEST_TOKENS')
  })

  test('ALLOW_UNAUTHENTICATED_allows_it', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url, INGEST_HOST: '0.0.0.0', ALLOW_UNAUTHENTICATED: 'true' })
    expect(await statusOf(ingest, '/v1/calls')).toBe(200)
  })

  test('with_tokens_it_listens_everywhere_and_wants_them_everywhere', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url, INGEST_TOKENS: 'secret', ALLOW_UNAUTHENTICATED: 'true' })
    expect(new URL(ingest.url).hostname).toBe('0.0.0.0')
    expect(await statusOf(ingest, '/v1/calls')).toBe(401)
  })

  // By default the library lets processes share a port that they name.
  const sharing = `const uWS = require('uWebSockets.js')
    uWS.App().listen('127.0.0.1', Number(process.argv[1]), (socket) => console.log(socket ? 'listens' : 'failed'))`
  const listeners: [string, (port: number) => Promise<unknown>][] = [
    [
      'another program',
      async (port) => {
        const other = createServer().listen(port, '127.0.0.1')
        onTestFinished(() => void other.close())
        await once(other, 'listening')
      },
    ],
    [
      'an ingest of an earlier version',
      async (port) => {
        const other = spawn(process.execPath, ['-e', sharing, String(port)], { stdio: ['ignore', 'pipe', 'inherit'] })
        onTestFinished(() => void other.kill())
        expect((await once(other.stdout, 'data')).toString().trim()).toBe('listens')
      },
    ],
    ['another ingest', (port) => testIngest({ REDIS_URL: redis.url, INGEST_PORT: String(port) })],
  ]
  test.each(listeners)('a_port_that_%s_has_taken_is_a_clear_error', async (_, listen) => {
    const port = await getPort({ host: '127.0.0.1' })
    await listen(port)
    const message = await refusalOf({ INGEST_PORT: String(port) })
    expect(message).toMatch(new RegExp(`^INGEST_PORT, .*127\\.0\\.0\\.1:${port}: it is in use`))
  })

  test('an_address_that_is_not_ours_is_a_clear_error', async () => {
    const message = await refusalOf({ INGEST_HOST: '192.0.2.1', INGEST_TOKENS: 'x' })
    expect(message).toContain('192.0.2.1')
    expect(message).toContain('INGEST_HOST')
  })

  test('no_Redis_is_a_clear_error', async () => {
    const message = await refusalOf({ REDIS_URL: 'redis://:hunter2@127.0.0.1:1' })
    expect(message).toMatch(/^REDIS_URL: no Redis answers at 127\.0\.0\.1:1: .*ECONNREFUSED/)
    expect(message).not.toContain('hunter2')
  })

  test('another_number_of_partitions_is_refused', async () => {
    await testIngest({ REDIS_URL: redis.url, PARTITIONS: '8' })
    const message = await refusalOf({ PARTITIONS: '16' })
    expect(message).toContain('PARTITIONS is 16')
    expect(message).toContain('PARTITIONS=8')
    await testIngest({ REDIS_URL: redis.url, PARTITIONS: '8' })
  })

  test.each(['setnx', 'memory', 'persistence'])('a_connection_that_breaks_at_%s_is_a_clear_error', async (cutAt) => {
    const relay = await Relay.start(redis.url)
    onTestFinished(() => relay.stop())
    relay.onChunk = (chunk) => (chunk.includes(`\r\n${cutAt}\r\n`) ? 'drop' : 'pass')
    const message = await refusalOf({ REDIS_URL: relay.url })
    expect(message).toMatch(/^REDIS_URL: Redis at 127\.0\.0\.1:\d+ cannot be used: ./)
  })

  test('a_Redis_that_refuses_to_write_is_a_clear_error', async () => {
    const user = `reader-${randomUUID()}`
    await redis.client.acl('SETUSER', user, 'on', 'nopass', '~*', '+@all', '-@write')
    onTestFinished(() => void redis.client.acl('DELUSER', user).catch(() => undefined))
    const url = new URL(redis.url)
    url.username = user
    url.password = 'any'
    expect(await refusalOf({ REDIS_URL: url.href })).toMatch(/its user may not run, .*: setnx, .*xadd.*ACL SETUSER/)
  })

  test('after_a_refusal_nothing_is_left_behind', async () => {
    const database = ` db=${new URL(redis.url).pathname.slice(1)} `
    const connections = async () => String(await redis.client.client('LIST')).split(database).length - 1
    const before = await connections()
    await testIngest({ REDIS_URL: redis.url })
    expect(await connections()).toBe(before + 1)
    for (let i = 0; i < 5; i++) await refusalOf({ PARTITIONS: '16' })
    await until('their connections are closed', async () => (await connections()) === before + 1)
  })
})

describe('TLS', () => {
  const openssl = spawnSync('openssl', ['version']).status === 0
  let folder: string
  beforeAll(async () => {
    if (!openssl) process.stderr.write('\nSKIPPED: the tests of TLS, because there is no openssl in PATH\n')
    folder = await mkdtemp(join(tmpdir(), 'calltape-tls-'))
  })
  afterAll(() => rm(folder, { recursive: true, force: true }))

  function certificate(): { TLS_CERT_FILE: string; TLS_KEY_FILE: string } {
    const files = { TLS_CERT_FILE: join(folder, 'cert.pem'), TLS_KEY_FILE: join(folder, 'key.pem') }
    const made = spawnSync('openssl', [
      ...['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2'],
      ...['-subj', '/CN=calltape.test', '-keyout', files.TLS_KEY_FILE, '-out', files.TLS_CERT_FILE],
    ])
    if (made.status !== 0) throw new Error(made.stderr.toString())
    return files
  }

  test.skipIf(!openssl)('serves_https_and_wss', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url, ...certificate() })
    expect(ingest.url).toMatch(/^https:/)
    const body = JSON.stringify(turn('CA1', 0))
    const [status, subject] = await new Promise<[number | undefined, string]>((resolve, reject) => {
      const options = { method: 'POST', rejectUnauthorized: false, headers: { 'Content-Type': 'application/json' } }
      const request = httpsRequest(`${ingest.url}/v1/events`, options, (response) => {
        const { subject } = (response.socket as TLSSocket).getPeerCertificate()
        response.resume().on('end', () => resolve([response.statusCode, String(subject.CN)]))
      })
      request.on('error', reject).end(body)
    })
    expect([status, subject]).toEqual([200, 'calltape.test'])
    const wire = await Wire.open(ingest, '', { rejectUnauthorized: false })
    wire.send(turn('CA1', 1))
    await wire.untilAcked(1)
    expect(await eventsOf(redis, 'CA1')).toEqual([turn('CA1', 0), turn('CA1', 1)])
    await expect(fetch(`${ingest.url.replace('https', 'http')}/healthz`), 'plain HTTP').rejects.toThrow()
  })

  test.skipIf(!openssl)('a_certificate_that_cannot_be_used_is_a_clear_error', async () => {
    const good = certificate()
    const broken = join(folder, 'broken.pem')
    await writeFile(broken, 'not a certificate')
    for (const wrong of [
      { TLS_CERT_FILE: '/nowhere.pem' },
      { TLS_KEY_FILE: '/nowhere.pem' },
      { TLS_CERT_FILE: broken },
      { TLS_KEY_FILE: broken },
    ]) {
      const start = testIngest({ REDIS_URL: redis.url, ...good, ...wrong })
      await expect(start, JSON.stringify(wrong)).rejects.toThrow(OperatorError)
      await expect(start).rejects.toThrow(/TLS_CERT_FILE.*TLS_KEY_FILE|TLS_(CERT|KEY)_FILE/)
    }
  })
})

describe('DURABILITY', () => {
  const withArgs = async (...args: string[]) => {
    const server = await ownRedis('single', ...args)
    onTestFinished(() => server.stop())
    return server
  }
  const hasWaitAof = async (url: string) => {
    const client = await connectRedis(url, log)
    const [, major, minor] = /redis_version:(\d+)\.(\d+)/.exec(await client.info('server'))!
    client.disconnect()
    return Number(major) > 7 || (major === '7' && Number(minor) >= 2)
  }

  test('fsync_is_refused_without_an_append_only_file', async () => {
    const { url } = await withArgs('--appendonly', 'no')
    const start = testIngest({ REDIS_URL: url, DURABILITY: 'fsync' })
    await expect(start).rejects.toThrow(OperatorError)
    await expect(start).rejects.toThrow(/DURABILITY=fsync.*appendonly yes/)
  })

  test('fsync_is_refused_where_the_system_decides_when_to_sync', async () => {
    const { url } = await withArgs('--appendfsync', 'no')
    const start = testIngest({ REDIS_URL: url, DURABILITY: 'fsync' })
    await expect(start).rejects.toThrow(OperatorError)
    await expect(start).rejects.toThrow(/DURABILITY=fsync.*appendfsync everysec or always/)
  })

  test('fsync_wants_WAITAOF_where_Redis_syncs_every_second', async () => {
    const { url } = await withArgs()
    const start = testIngest({ REDIS_URL: url, DURABILITY: 'fsync' })
    if (await hasWaitAof(url)) {
      expect(await store(await start)).toEqual({ accepted: 1, rejected: [] })
    } else {
      await expect(start).rejects.toThrow(OperatorError)
      await expect(start).rejects.toThrow(/DURABILITY=fsync.*7\.2.*appendfsync always/)
    }
  })

  test('fsync_an_ack_waits_until_Redis_has_synced (skipped before Redis 7.2)', async ({ skip }) => {
    const { url } = await withArgs()
    skip(!(await hasWaitAof(url)), 'this Redis has no WAITAOF')
    const client = (await connectRedis(url, log)) as Redis
    onTestFinished(() => client.disconnect())
    const wire = await Wire.open(await testIngest({ REDIS_URL: url, DURABILITY: 'fsync' }))
    wire.send(turn('CA1', 0))
    await wire.untilAcked(1)
    await client.config('SET', 'appendfsync', 'no')
    wire.send(turn('CA1', 1))
    const stored = { client, partitions: new Partitions(64) }
    await until('Redis has it', async () => (await eventsOf(stored, 'CA1')).length === 2)
    await sleep(3500) // longer than it waits for a sync: it has been sent again meanwhile
    expect(wire.acked).toBe(1)
    await client.config('SET', 'appendfsync', 'everysec')
    await wire.untilAcked(2)
    expect(await eventsOf(stored, 'CA1')).toEqual([turn('CA1', 0), turn('CA1', 1)])
  })

  test('fsync_works_with_appendfsync_always', async () => {
    const { url } = await withArgs('--appendfsync', 'always')
    const ingest = await testIngest({ REDIS_URL: url, DURABILITY: 'fsync' })
    expect(await store(ingest)).toEqual({ accepted: 1, rejected: [] })
  })

  test('replicas_are_refused_where_there_are_too_few', async () => {
    for (const DURABILITY of ['replicas:1', 'replicas:3']) {
      const start = testIngest({ REDIS_URL: redis.url, DURABILITY })
      await expect(start).rejects.toThrow(OperatorError)
      await expect(start).rejects.toThrow(`DURABILITY=${DURABILITY}, but this Redis has 0 replicas`)
    }
  })

  test('on_a_Cluster_replicas_are_refused_where_no_master_has_so_many', async () => {
    const cluster = await ownRedis('cluster')
    onTestFinished(() => cluster.stop())
    const node = new Redis(cluster.url)
    onTestFinished(() => node.disconnect())
    await node.call('CLUSTER', 'ADDSLOTSRANGE', '0', '16383')
    await until('the cluster is up', async () =>
      String(await node.call('CLUSTER', 'INFO')).includes('cluster_state:ok'),
    )
    const REDIS_URL = `${cluster.url},${cluster.url}`
    const start = testIngest({ REDIS_URL, DURABILITY: 'replicas:1' })
    await expect(start).rejects.toThrow('DURABILITY=replicas:1, but this Redis has 0 replicas')
    const ingest = await testIngest({ REDIS_URL })
    const wire = await Wire.open(ingest)
    wire.send(Array.from({ length: 500 }, (_, n) => turn(`CA${n % 100}`, n)))
    await wire.untilAcked(500)
    const stored = { client: await connectRedis(REDIS_URL, log), partitions: new Partitions(64) }
    onTestFinished(() => stored.client.disconnect())
    expect(await seqsOf(stored, 'CA7')).toEqual([7, 107, 207, 307, 407])
    expect(await statusOf(ingest, '/readyz')).toBe(200)
  })

  test('replicas_an_answer_means_that_a_replica_has_it_even_if_the_append_had_to_be_sent_again', async () => {
    const primary = await withArgs('--repl-diskless-sync-delay', '0')
    const replica = await withArgs('--replicaof', primary.peer.host, String(primary.peer.port))
    const client = (await connectRedis(primary.url, log)) as Redis
    onTestFinished(() => client.disconnect())
    await until('the replica is online', async () => /state=online/.test(await client.info('replication')))
    const ingest = await testIngest({ REDIS_URL: primary.url, DURABILITY: 'replicas:1' })
    expect(await store(ingest)).toEqual({ accepted: 1, rejected: [] })

    await replica.signal('SIGSTOP')
    onTestFinished(() => replica.signal('SIGCONT'))
    const wire = await Wire.open(ingest)
    wire.send(turn('CA1', 1))
    const onPrimary = { client, partitions: new Partitions(64) }
    await until('the primary has it', async () => (await eventsOf(onPrimary, 'CA1')).length === 2)
    await client.call('CLIENT', 'KILL', 'TYPE', 'normal', 'SKIPME', 'yes') // before the replica has answered
    await sleep(3500) // longer than it waits for the replica
    expect(wire.acked, 'no ack').toBe(0)
    expect(await eventsOf(onPrimary, 'CA1'), 'applied once').toHaveLength(2)
    await replica.signal('SIGCONT')
    await wire.untilAcked(1)
    const second = (await connectRedis(replica.url, log)) as Redis
    onTestFinished(() => second.disconnect())
    expect(await eventsOf({ ...onPrimary, client: second }, 'CA1')).toEqual([turn('CA1', 0), turn('CA1', 1)])
  })
})
