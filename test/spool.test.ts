/** The spool in a real ingest, with a Redis that is killed, hangs and comes back. Needs a built dist/ for what is killed itself. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import getPort from 'get-port'
import type { Redis } from 'ioredis'
import { beforeEach, describe, expect, onTestFinished, test } from 'vitest'
import { childEnvironment, OperatorError, readConfig } from '../shared/config.js'
import type { Turn } from '../shared/events.js'
import { Partitions } from '../shared/keys.js'
import { PACKAGE_ROOT } from '../shared/package-root.js'
import { connectRedis } from '../shared/redis.js'
import { startSink } from '../sink/sink.js'
import { testIngest } from './support/ingest.js'
import { KillableStore } from './support/killable-stores.js'
import { figure } from './support/metrics.js'
import { freshDatabase, log, until } from './support/stores.js'
import { eventsOf, type Store, turn } from './support/streams.js'

const partitions = new Partitions(64)

let redis: KillableStore
let SPOOL_DIR: string
let environment: Record<string, string>
beforeEach(async () => {
  redis = await KillableStore.redis()
  onTestFinished(() => redis.end())
  const folder = await mkdtemp(join(tmpdir(), 'calltape-spool-'))
  onTestFinished(() => rm(folder, { recursive: true, force: true }))
  SPOOL_DIR = join(folder, 'below', 'spool')
  environment = { REDIS_URL: redis.url, SPOOL_DIR }
})

/** A look into that Redis, while it is there. */
async function openStore(): Promise<Store & { client: Redis }> {
  const client = (await connectRedis(redis.url, log)) as Redis
  onTestFinished(() => client.disconnect())
  return { client, partitions }
}

interface Reply {
  status: number
  retryAfter: string | null
  body: { accepted: number; spooled?: true; rejected: unknown[]; error?: { code: string; message: string } }
}

async function post(url: string, events: unknown, query = '?spool=true'): Promise<Reply> {
  const init = { method: 'POST', body: JSON.stringify(events), headers: { 'Content-Type': 'application/json' } }
  const response = await fetch(`${url}/v1/events${query}`, init)
  const body = (await response.json()) as Reply['body']
  return { status: response.status, retryAfter: response.headers.get('retry-after'), body }
}

/** By an event that is nobody's: nothing knows that a server is gone before it is used. */
async function noticeThatRedisIsGone(url: string): Promise<void> {
  const init = {
    method: 'POST',
    body: JSON.stringify(turn('probe', 0)),
    headers: { 'Content-Type': 'application/json' },
  }
  await fetch(`${url}/v1/events`, { ...init, signal: AbortSignal.timeout(200) }).catch(() => undefined)
}

async function untilReplayed(url: string): Promise<void> {
  await until('the spool is empty', async () => (await figure(url, 'calltape_ingest_spool_bytes')) === 0)
  await until('events go directly again', async () => (await post(url, turn('probe', 1))).status === 200)
}

const segments = async () => (await readdir(SPOOL_DIR)).filter((name) => name.endsWith('.segment'))

/** The sequence in which a call's turns came first. */
async function firstSeqs(store: Store, sid: string): Promise<(number | undefined)[]> {
  return [...new Set((await eventsOf(store, sid)).map((event) => (event as Turn).seq))]
}

/** `calltape ingest`; @param prefix what the shell does first */
async function ingestProcess(extra: Record<string, string> = {}, prefix = '') {
  const command = `${prefix} exec "${process.execPath}" "${join(PACKAGE_ROOT, 'dist/cli/calltape.js')}" ingest`
  const INGEST_PORT = String(await getPort({ host: '127.0.0.1' }))
  const env = childEnvironment({ ...environment, INGEST_PORT, ...extra })
  const child = spawn('bash', ['-c', command], { env, stdio: ['ignore', 'pipe', 'inherit'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  let output = ''
  child.stdout.on('data', (data: Buffer) => {
    output += data.toString()
  })
  const exited = once(child, 'exit') as Promise<[code: number | null, signal: string | null]>
  const url = `http://127.0.0.1:${INGEST_PORT}`
  await Promise.race([
    until('it is ready', async () => (await fetch(`${url}/readyz`).catch(() => undefined))?.status === 200),
    exited.then(() => expect.unreachable(output)),
  ])
  return { url, exited, kill: () => child.kill('SIGKILL') }
}

describe('with Redis well', () => {
  test('spool_true_answers_as_always_and_writes_nothing', async () => {
    const { url } = await testIngest(environment)
    const store = await openStore()
    await store.client.set(`${partitions.of('CA2').streamPrefix}CA2`, 'somebody else’s')
    const keyless = { type: 'turn', call_sid: 'CA1', speaker: 'agent', text: 'hello' }
    const from = Date.now()
    const reply = await post(url, [turn('CA1', 0), 5, keyless, turn('CA2', 0), keyless])
    expect(reply).toMatchObject({
      status: 200,
      body: {
        accepted: 3,
        rejected: [
          { index: 1, code: 'not_an_object' },
          { index: 3, code: 'not_stored' },
        ],
      },
    })
    expect(reply.body).not.toHaveProperty('spooled')
    const stored = await eventsOf(store, 'CA1')
    expect(stored.map(({ id, ts, ...given }) => given)).toEqual([turn('CA1', 0), keyless, keyless])
    expect(stored[0], 'has its key').not.toHaveProperty('id')
    expect(new Set(stored.map(({ id }) => id)).size).toBe(3)
    for (const { ts } of stored) expect(ts).toBeGreaterThanOrEqual(from)
    expect(await post(url, [])).toMatchObject({ status: 200, body: { accepted: 0, rejected: [] } })
    expect(await readdir(SPOOL_DIR)).toEqual(['owner'])
  })

  test('anything_else_than_true_or_false_is_400', async () => {
    const { url } = await testIngest(environment)
    for (const wrong of ['1', 'yes', 'TRUE', '']) {
      const { status, body } = await post(url, turn('CA1', 0), `?spool=${wrong}`)
      expect([status, body.error?.code], wrong).toEqual([400, 'invalid_query'])
    }
    expect((await post(url, turn('CA1', 0), '?spool=false')).status).toBe(200)
    const [event] = await eventsOf(await openStore(), 'CA1')
    expect(event).toEqual(turn('CA1', 0))
  })

  test('a_SPOOL_DIR_that_cannot_be_used_is_a_clear_error', async () => {
    const file = join(tmpdir(), `calltape-file-${process.pid}`)
    await writeFile(file, '')
    onTestFinished(() => rm(file))
    const start = testIngest({ ...environment, SPOOL_DIR: join(file, 'spool') })
    await expect(start).rejects.toThrow(OperatorError)
    await expect(start).rejects.toThrow(/^SPOOL_DIR: /)
  })

  test('a_second_ingest_that_cannot_start_leaves_the_spool_to_the_first', async () => {
    const first = await testIngest(environment)
    await expect(testIngest({ ...environment, INGEST_PORT: new URL(first.url).port })).rejects.toThrow('INGEST_PORT')
    await redis.kill()
    await noticeThatRedisIsGone(first.url)
    expect((await post(first.url, turn('CA1', 0))).status).toBe(202)
    await redis.start()
  })
})

describe('while Redis is away', () => {
  test('what_comes_is_on_the_disk_and_comes_in_order_once_it_is_back_and_plain_requests_are_as_always', async () => {
    const { url } = await testIngest(environment)
    const without = await testIngest({ REDIS_URL: redis.url })
    expect((await post(url, turn('CA1', 0))).status).toBe(200)
    await redis.kill()
    const plain = [
      post(url, turn('CA2', 0), ''),
      post(url, turn('CA2', 1), '?spool=false'),
      post(without.url, turn('CA2', 2)),
    ]
    for (let seq = 1; seq < 20; seq++) {
      const reply = await post(url, [turn('CA1', seq), 'x', turn('CA3', seq)])
      expect(reply).toMatchObject({ status: 202, body: { accepted: 2, spooled: true, rejected: [{ index: 1 }] } })
    }
    expect((await segments()).length).toBeGreaterThan(0)
    expect(await figure(url, 'calltape_ingest_spooled_events_total')).toBe(38)
    expect((await fetch(`${url}/readyz`)).status).toBe(503)
    for (const reply of await Promise.all(plain)) {
      expect([reply.status, reply.body.error?.code, reply.retryAfter]).toEqual([503, 'unavailable', '2'])
    }
    expect(await figure(url, 'calltape_ingest_spooled_events_total'), 'without the plain ones').toBe(38)
    await redis.start()
    await untilReplayed(url)
    const store = await openStore()
    expect(await firstSeqs(store, 'CA1')).toEqual([...Array(20).keys()])
    expect(await firstSeqs(store, 'CA3')).toEqual([...Array(20).keys()].slice(1))
    expect(await post(url, turn('CA1', 20))).toMatchObject({ status: 200 })
    expect(await segments()).toEqual([])
  })

  test('and_comes_and_goes_under_traffic_nothing_acked_is_missing_and_each_call_keeps_its_order', async () => {
    const { url } = await testIngest(environment)
    let isOver = false
    const acked = new Map<string, number[]>()
    const statuses = new Set<number>()
    const producers = Array.from({ length: 16 }, async (_, n) => {
      const seqs: number[] = []
      acked.set(`CA${n}`, seqs)
      for (let seq = 0; !isOver; seq++) {
        const { status } = await post(url, turn(`CA${n}`, seq))
        statuses.add(status)
        if (status < 300) seqs.push(seq)
      }
    })
    for (const pause of [100, 300, 2500]) {
      await sleep(200)
      await redis.kill()
      await sleep(pause)
      await redis.start()
    }
    await until('events go directly again', async () => (await post(url, turn('probe', 1))).status === 200)
    isOver = true
    await Promise.all(producers)
    await untilReplayed(url)
    const store = await openStore()
    for (const [sid, seqs] of acked) expect(await firstSeqs(store, sid), sid).toEqual(seqs)
    expect([...statuses].sort()).toEqual([200, 202])
  })

  test('a_full_spool_is_503_with_Retry_After_until_it_has_been_replayed', async () => {
    const { url } = await testIngest({ ...environment, SPOOL_MAX_BYTES: String(1024 * 1024) })
    await redis.kill()
    await noticeThatRedisIsGone(url)
    const statuses: number[] = []
    for (let seq = 0; seq < 30; seq++) {
      const reply = await post(url, turn('CA1', seq, 'x'.repeat(60_000)))
      statuses.push(reply.status)
      if (reply.status !== 202) expect([reply.status, reply.retryAfter]).toEqual([503, '2'])
    }
    const taken = statuses.filter((status) => status === 202).length
    expect(taken).toBeGreaterThan(10)
    expect(statuses.slice(taken)).toEqual(Array(30 - taken).fill(503))
    expect(await figure(url, 'calltape_ingest_spool_bytes')).toBeLessThanOrEqual(1024 * 1024)
    await redis.start()
    await untilReplayed(url)
    expect(await firstSeqs(await openStore(), 'CA1')).toEqual([...Array(taken).keys()])
    expect((await post(url, turn('CA1', 99))).status).toBe(200)
  })

  test('an_event_without_a_key_that_went_both_ways_is_one_row', async () => {
    const database = await freshDatabase()
    onTestFinished(() => database.drop())
    const { url } = await testIngest(environment)
    await redis.freeze()
    const keyless = { type: 'turn', call_sid: 'CA1', speaker: 'agent', text: 'hello' }
    const reply = await post(url, [keyless, { type: 'call.status', call_sid: 'CA1', status: 'ringing' }, keyless])
    expect(reply).toMatchObject({ status: 202, body: { accepted: 3, spooled: true } })
    await redis.thaw()
    await untilReplayed(url)
    const store = await openStore()
    const [first, second, third, ...again] = await eventsOf(store, 'CA1')
    expect(again, 'the copies are the same').toEqual([first, second, third])
    const settings = { REDIS_URL: redis.url, DATABASE_URL: database.url, SINK_METRICS_PORT: '0' }
    const sink = await startSink(readConfig(settings), log)
    onTestFinished(() => sink.stop())
    await post(url, { type: 'call.ended', call_sid: 'CA1', turn_count: 2 })
    const call = await until('the call is finalized', async () => {
      const { rows } = await database.pool.query('SELECT * FROM call_sessions WHERE finalized_at IS NOT NULL')
      return rows[0] as { turn_count: number; complete: boolean }
    })
    expect(call).toMatchObject({ turn_count: 2, complete: true })
    const { rows } = await database.pool.query('SELECT 1 FROM call_events')
    expect(rows).toHaveLength(2)
  })

  test('of_two_ingests_on_one_directory_the_later_one_spools_and_nothing_acked_is_missing', async () => {
    const former = await testIngest(environment)
    await redis.kill()
    await noticeThatRedisIsGone(former.url)
    expect((await post(former.url, turn('CA1', 0))).status).toBe(202)
    await redis.start()
    const latter = await testIngest(environment)
    await redis.kill()
    await Promise.all([former, latter].map(({ url }) => noticeThatRedisIsGone(url)))
    expect(await post(former.url, turn('CA1', 10))).toMatchObject({ status: 503, retryAfter: '2' })
    const plain = post(former.url, turn('CA1', 11))
    for (let seq = 1; seq < 4; seq++) expect((await post(latter.url, turn('CA1', seq))).status).toBe(202)
    await redis.start()
    expect((await plain).status, 'as without a spool').toBe(200)
    await untilReplayed(latter.url)
    const stored = await firstSeqs(await openStore(), 'CA1')
    expect(stored.filter((seq) => seq! < 10)).toEqual([0, 1, 2, 3])
    expect(stored).toContain(11)
  })
})

describe('an ingest that is killed', () => {
  test.each(['before-spool:3', 'after-spool:3', 'before-replay', 'after-replay'])(
    '%s_has_told_nobody_what_is_not_replayed_by_the_next_one',
    async (CRASH_AT) => {
      const { url, exited } = await ingestProcess({ CRASH_AT })
      await redis.kill()
      await noticeThatRedisIsGone(url)
      const acked: number[] = []
      for (let seq = 0; seq < 6; seq++) {
        const reply = await post(url, turn('CA1', seq)).catch(() => undefined)
        if (reply?.status === 202) acked.push(seq)
      }
      expect(acked).toEqual(CRASH_AT.includes('replay') ? [0, 1, 2, 3, 4, 5] : [0, 1])
      await redis.start()
      expect(await exited).toEqual([null, 'SIGKILL'])
      const next = await ingestProcess()
      await untilReplayed(next.url)
      const stored = await firstSeqs(await openStore(), 'CA1')
      expect(stored).toEqual(CRASH_AT === 'after-spool:3' ? [...acked, 2] : acked)
      expect((await post(next.url, turn('CA1', 9))).status).toBe(200)
    },
  )

  test('has_on_its_disk_what_waited_for_Redis_before_what_came_behind_it', async () => {
    const { url, exited, kill } = await ingestProcess()
    await redis.kill()
    const first = post(url, turn('CA1', 0))
    await until(
      'it knows that Redis is gone',
      async () => (await figure(url, 'calltape_ingest_flush_failures_total')) > 0,
    )
    const replies = await Promise.all([first, post(url, turn('CA1', 1))])
    expect(replies.map(({ status }) => status)).toEqual([202, 202])
    kill()
    await exited
    await redis.start()
    const next = await ingestProcess()
    await untilReplayed(next.url)
    expect(await firstSeqs(await openStore(), 'CA1')).toEqual([0, 1])
  })

  test('when_told_to_stop_does_not_wait_for_a_long_spool', async () => {
    const first = await testIngest(environment)
    await redis.kill()
    await noticeThatRedisIsGone(first.url)
    const body = Array.from({ length: 30_000 }, (_, seq) => turn('CA1', seq))
    expect((await post(first.url, body)).status).toBe(202)
    const stopped = first.stop()
    await Promise.race([stopped, sleep(20_000).then(() => expect.unreachable('stop() waits for Redis'))])
    await redis.start()
    const next = await testIngest(environment)
    await untilReplayed(next.url)
    expect(await firstSeqs(await openStore(), 'CA1')).toEqual(body.map(({ seq }) => seq))
  })
})

describe('a disk that fails', () => {
  // A file may not grow beyond 64 KiB: the system refuses the write with EFBIG after a part of it, as it does on a full disk.
  test('in_the_middle_of_a_write_is_503_and_all_that_was_acked_is_replayed', async () => {
    const { url } = await ingestProcess({}, 'ulimit -f 64;')
    await redis.kill()
    await noticeThatRedisIsGone(url)
    const acked: number[] = []
    const refused: Reply[] = []
    for (let seq = 0; seq < 20; seq++) {
      const reply = await post(url, turn('CA1', seq, 'x'.repeat(10_000)))
      if (reply.status === 202) acked.push(seq)
      else refused.push(reply)
    }
    expect(acked.length).toBeGreaterThan(3)
    expect(refused.length).toBeGreaterThan(0)
    for (const { status, retryAfter } of refused) expect([status, retryAfter]).toEqual([503, '2'])
    expect(await figure(url, 'calltape_ingest_spool_failures_total')).toBeGreaterThan(0)
    await until('the disk is tried again', async () => {
      const reply = await post(url, turn('CA1', 100))
      return reply.status === 202
    })
    expect((await fetch(`${url}/healthz`)).status).toBe(200)
    await redis.start()
    await untilReplayed(url)
    expect(await firstSeqs(await openStore(), 'CA1')).toEqual([...acked, 100])
    expect(await figure(url, 'calltape_ingest_spool_damaged_records_total')).toBe(0)
  })
})
