/** INGEST_PROCESSES and SINK_PROCESSES: several processes that look like one. They run from dist/. */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { request } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, onTestFinished, test } from 'vitest'
import type { Environment } from '../shared/config.js'
import { Wire } from './support/ingest.js'
import { figure, scrape } from './support/metrics.js'
import { childrenOf, isAlive, lastingPort, Service } from './support/processes.js'
import { calltape } from './support/program.js'
import { Relay } from './support/relay.js'
import { type Database, freshDatabase, freshRedis, type RedisDatabase, until } from './support/stores.js'
import { Producer, turn } from './support/streams.js'

let redis: RedisDatabase
let database: Database
let folder: string
let environment: Environment
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'calltape-processes-'))
})
afterAll(() => rmSync(folder, { recursive: true, force: true }))
beforeEach(async () => {
  ;[redis, database] = await Promise.all([freshRedis(), freshDatabase()])
  environment = { REDIS_URL: redis.url, DATABASE_URL: database.url, SINK_METRICS_PORT: '0', INGEST_PORT: '0' }
})
afterEach(() => Promise.all([redis.drop(), database.drop()]))

interface Running {
  service: Service
  url: string
  logFile: string
}

let services = 0
async function run(name: 'ingest' | 'sink', changes: Environment = {}): Promise<Running> {
  const logFile = join(folder, `${name}-${++services}.log`)
  const given = { ...environment, [`${name.toUpperCase()}_PROCESSES`]: '2', ...changes }
  const service = new Service({ name, environment: given, logFile, unsupervised: true })
  onTestFinished(async () => {
    await service.stop()
    await service.end()
  })
  return { service, url: await service.serves(), logFile }
}

/** On a connection of its own: whichever process the system gives it to. */
function ask(
  url: string,
  path: string,
  body?: string,
  type = 'application/json',
): Promise<{ status: number; text: string }> {
  return new Promise((resolve, reject) => {
    const options = { agent: false, method: body === undefined ? 'GET' : 'POST', headers: { 'Content-Type': type } }
    const asked = request(url + path, options, (response) => {
      let text = ''
      response.on('data', (chunk) => (text += chunk))
      response.on('end', () => resolve({ status: response.statusCode!, text }))
    })
    asked.on('error', reject).end(body)
  })
}

const form = (url: string, path: string, fields: Record<string, string>) =>
  ask(url, path, new URLSearchParams(fields).toString(), 'application/x-www-form-urlencoded')

async function storedTurns(): Promise<number> {
  const { rows } = await database.pool.query<{ n: number }>('SELECT count(*)::int AS n FROM call_transcript_turns')
  return rows[0]!.n
}

const processesAre = (url: string, name: string, count: number) =>
  until(`${count} processes answer`, async () => {
    return (await figure(url, `calltape_${name}_processes`).catch(() => 0)) === count
  })

describe('ingest', () => {
  test('both_processes_take_connections_and_metrics_are_of_both_whoever_answers', async () => {
    const { service, url } = await run('ingest')
    const wires = await Promise.all(Array.from({ length: 40 }, () => Wire.open({ url })))
    for (const [n, wire] of wires.entries()) wire.send(turn(`CA${n}`, 0))
    await Promise.all(wires.map((wire) => wire.untilAcked(1)))
    for (let i = 0; i < 8; i++) {
      const { text } = await ask(url, '/metrics')
      expect(text).toMatch(/^calltape_ingest_events_acked_total 40$/m)
      expect(text).toMatch(/^calltape_ingest_connections 40$/m)
      expect(text).toMatch(/^calltape_ingest_processes 2$/m)
      expect(text).toMatch(/^calltape_ingest_processes_wanted 2$/m)
      expect((await ask(url, '/readyz')).status).toBe(200)
    }
    const [first] = childrenOf(service.pid)
    process.kill(first!, 'SIGKILL')
    const closed = () => wires.filter((wire) => wire.closed).length
    await until('its connections are gone', () => closed() > 0 && !isAlive(first!))
    // The port is held all the while, and what the dead one had counted stays counted.
    await until('there are two again', async () => {
      const { status, text } = await ask(url, '/metrics')
      expect(status).toBe(200)
      expect(text).toMatch(/^calltape_ingest_events_acked_total 40$/m)
      return /^calltape_ingest_processes 2$/m.test(text)
    })
    expect(closed()).toBeLessThan(40)
    expect(await figure(url, 'calltape_ingest_connections')).toBe(40 - closed())
    const again = await Promise.all(Array.from({ length: 20 }, () => Wire.open({ url })))
    for (const [n, wire] of again.entries()) wire.send(turn(`CB${n}`, 0))
    await Promise.all(again.map((wire) => wire.untilAcked(1)))
    expect(await figure(url, 'calltape_ingest_events_acked_total')).toBe(60)
  })

  test('a_call_whose_events_reach_both_processes_is_as_whole_as_any', async () => {
    const [{ url }] = [await run('ingest'), await run('sink')]
    const sids = Array.from({ length: 8 }, (_, n) => `CA-over-both-${n}`)
    const post = (sid: string, sequence: number, event: string, fields: Record<string, string> = {}) =>
      form(url, '/webhooks/twilio/transcription', {
        ...{ CallSid: sid, TranscriptionSid: `GT-${sid}`, SequenceId: String(sequence) },
        ...{ TranscriptionEvent: `transcription-${event}`, ...fields },
      })
    const content = (sid: string, n: number) =>
      post(sid, n, 'content', {
        ...{ Track: n % 2 ? 'inbound_track' : 'outbound_track', Final: 'true' },
        TranscriptionData: JSON.stringify({ transcript: `turn ${n}`, confidence: 1 }),
      })
    for (const sid of sids) {
      // A bound connection's end that one process sees after the other has seen its successor begin.
      const first = await Wire.open({ url }, `?call_sid=${sid}`)
      await until('its begin is stored', async () => (await ask(url, `/v1/calls/${sid}`)).text.includes('"connected"'))
      const second = await Wire.open({ url }, `?call_sid=${sid}`)
      await first.close()
      await post(sid, 1, 'started')
      await Promise.all([2, 3, 4, 5].map((n) => content(sid, n)))
      await post(sid, 6, 'stopped')
      expect(JSON.parse((await ask(url, `/v1/calls/${sid}`)).text)).toMatchObject({
        session: { connection: 'connected' },
      })
      await second.close()
      await form(url, '/webhooks/twilio/voice', { CallSid: sid, CallStatus: 'completed', SequenceNumber: '3' })
    }
    const whole = { complete: true, texts: [2, 3, 4, 5].map((n) => `turn ${n}`) }
    const sql = 'SELECT complete, full_transcript FROM call_sessions WHERE call_sid = ANY($1) AND complete'
    const calls = await until(
      'all are finalized',
      async () => {
        const { rows } = await database.pool.query<{ complete: boolean; full_transcript: { text: string }[] }>(sql, [
          sids,
        ])
        return rows.length === sids.length && rows
      },
      30_000,
    )
    for (const { complete, full_transcript: turns } of calls) {
      expect({ complete, texts: turns.map(({ text }) => text) }).toEqual(whole)
    }
  })

  test('another_ingest_on_their_port_is_refused_be_it_one_process_or_several', async () => {
    const port = String(await lastingPort())
    await run('ingest', { INGEST_PORT: port })
    for (const INGEST_PROCESSES of ['1', '3']) {
      const { code, err } = await calltape(['ingest'], { ...environment, INGEST_PORT: port, INGEST_PROCESSES })
      expect(code, err).toBe(2)
      expect(err.match(/INGEST_PORT, INGEST_HOST: cannot listen/g), 'told once').toHaveLength(1)
    }
  })

  test('they_do_not_join_one_that_is_alone_and_what_is_wrong_is_told_once', async () => {
    const port = String(await lastingPort())
    await run('ingest', { INGEST_PORT: port, INGEST_PROCESSES: '1' })
    const joined = await calltape(['ingest', '--processes', '3'], { ...environment, INGEST_PORT: port })
    expect({ code: joined.code, told: joined.err.match(/cannot listen/g)?.length }).toEqual({ code: 2, told: 1 })
    const away = await calltape(['ingest', '--processes', '3'], { ...environment, REDIS_URL: 'redis://127.0.0.1:1' })
    expect({ code: away.code, told: away.err.match(/no Redis answers/g)?.length }).toEqual({ code: 2, told: 1 })
  })

  test('a_number_of_processes_that_is_none_is_told_by_the_name_it_was_given_by', async () => {
    const option = await calltape(['ingest', '--processes', 'many'], environment)
    expect(option).toMatchObject({ code: 2, err: 'calltape: --processes wants an integer from 0 to 64, got many\n' })
    const empty = await calltape(['sink', '--processes', ''], environment)
    expect(empty).toMatchObject({ code: 2, err: expect.stringContaining('--processes wants an integer') })
    const setting = await calltape(['ingest'], { ...environment, INGEST_PROCESSES: 'many' })
    expect(setting).toMatchObject({ code: 2, err: expect.stringContaining('INGEST_PROCESSES: wants an integer') })
  })

  test.each(['a_port_that_is_given', 'any_port'])(
    'the_first_one_is_started_again_on_the_same_port_with_%s',
    async (given) => {
      const INGEST_PORT = given === 'any_port' ? '0' : String(await lastingPort())
      const { service, url, logFile } = await run('ingest', { INGEST_PORT })
      const [first, second] = childrenOf(service.pid)
      process.kill(first!, 'SIGKILL')
      const starts = () => readFileSync(logFile, 'utf8').match(/"process":0,.*ingest listens/g)?.length
      await until('the first one listens again', () => starts() === 2)
      await until('there are two again', async () => {
        return /^calltape_ingest_processes 2$/m.test((await ask(url, '/metrics')).text)
      })
      // Now nobody else has the port: who answers is the one that was started again.
      process.kill(second!, 'SIGKILL')
      await until('the other one is dead', () => !isAlive(second!))
      expect((await ask(url, '/healthz')).status).toBe(200)
      const listened = readFileSync(logFile, 'utf8').matchAll(/"url":"([^"]+)"/g)
      expect(new Set([...listened].map(([, where]) => where))).toEqual(new Set([url]))
    },
  )

  test('SIGTERM_stops_all_of_them_with_all_that_was_acked_in_Redis', async () => {
    const { service, url } = await run('ingest')
    const children = childrenOf(service.pid)
    const wires = await Promise.all(Array.from({ length: 10 }, () => Wire.open({ url })))
    for (const [n, wire] of wires.entries()) wire.send(Array.from({ length: 200 }, (_, seq) => turn(`CA${n}`, seq)))
    const death = await service.stop()
    expect(death).toMatchObject({ code: 0, signal: null })
    expect(service.lastStopMs).toBeLessThan(10_000)
    expect(children.filter(isAlive)).toEqual([])
    await Promise.all(wires.map((wire) => wire.untilClosed()))
    for (const [n, wire] of wires.entries()) {
      const sid = `CA${n}`
      const stored = await redis.client.xlen(redis.partitions.of(sid).streamPrefix + sid)
      expect(stored).toBeGreaterThanOrEqual(wire.acked)
    }
  })

  test('without_the_process_that_started_them_they_stop', async () => {
    const { service } = await run('ingest')
    const children = childrenOf(service.pid)
    expect(children).toHaveLength(2)
    service.kill()
    await until('they have stopped', () => !children.some(isAlive))
  })

  test('each_has_a_spool_and_fewer_processes_replay_what_more_have_left', async () => {
    const relay = await Relay.start(redis.url)
    onTestFinished(() => relay.stop())
    const SPOOL_DIR = join(folder, 'spool')
    const spooling = { REDIS_URL: relay.url, SPOOL_DIR }
    const { service, url } = await run('ingest', { ...spooling, INGEST_PROCESSES: '3' })
    relay.onChunk = () => 'drop'
    relay.cut()
    const post = (n: number) => ask(url, '/v1/events?spool=true', JSON.stringify(turn(`CA${n % 5}`, n)))
    const answers = await Promise.all(Array.from({ length: 40 }, (_, n) => post(n)))
    expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([202]))
    expect(await figure(url, 'calltape_ingest_spool_events')).toBe(40)
    const children = childrenOf(service.pid)
    service.kill()
    for (const child of children) process.kill(child, 'SIGKILL')
    const segments = () =>
      readdirSync(SPOOL_DIR, { recursive: true })
        .map(String)
        .filter((name) => name.endsWith('.segment'))
    expect(new Set(segments().map((name) => name.split('/')[0]))).toEqual(
      new Set(['process-0', 'process-1', 'process-2']),
    )
    relay.onChunk = undefined
    await until('they are dead', () => !children.some(isAlive))
    await run('ingest', { ...spooling, INGEST_PROCESSES: '2' })
    const stored = async () => {
      const lengths = [0, 1, 2, 3, 4].map((n) =>
        redis.client.xlen(`${redis.partitions.of(`CA${n}`).streamPrefix}CA${n}`),
      )
      return (await Promise.all(lengths)).reduce((sum, n) => sum + n, 0)
    }
    await until('Redis has all of it', async () => (await stored()) === 40)
    await until('nothing is left on the disk', () => segments().length === 0)
  })
})

describe('sink', () => {
  test('two_processes_share_the_work_behind_one_metrics', async () => {
    const { service, url, logFile } = await run('sink')
    await until('they share', async () => (await figure(url, 'calltape_sink_sinks')) === 2)
    await until('each has its part', async () => (await figure(url, 'calltape_sink_owned_partitions')) === 64)
    const store = async (round: number) => {
      const producer = new Producer(redis)
      await producer.store(...Array.from({ length: 200 }, (_, n) => turn(`CA${n}`, round)))
      await until('all is stored', async () => (await storedTurns()) === 200 * (round + 1))
    }
    await store(0)
    await until('both have settled', async () => (await figure(url, 'calltape_sink_turns_total')) === 200)
    await until('all are known', async () => (await figure(url, 'calltape_sink_open_calls')) === 200)
    const said = await scrape(url)
    expect([...said.keys()].filter((series) => series.includes('worst_partition'))).toHaveLength(1)
    expect(said.get('calltape_sink_redis_up')).toBe(1)
    const [first] = childrenOf(service.pid)
    process.kill(first!, 'SIGKILL')
    await until('it is dead', () => !isAlive(first!))
    await until('there are two again', async () => {
      expect(await figure(url, 'calltape_sink_turns_total')).toBe(200)
      return (await figure(url, 'calltape_sink_processes')) === 2
    })
    await store(1)
    await until('all are counted', async () => (await figure(url, 'calltape_sink_turns_total')) === 400)
    expect(readFileSync(logFile, 'utf8')).toMatch(/"process":0,.*a process died: it is started again/)
  })

  test('not_ready_while_one_hangs_and_what_it_had_counted_stays_counted', async () => {
    const { service, url } = await run('sink')
    await processesAre(url, 'sink', 2)
    await new Producer(redis).store(...Array.from({ length: 100 }, (_, n) => turn(`CA${n}`, 0)))
    await until('all are counted', async () => (await figure(url, 'calltape_sink_turns_total')) === 100)
    expect(await ask(url, '/readyz')).toEqual({ status: 200, text: 'ready\n' })
    const [, second] = childrenOf(service.pid)
    process.kill(second!, 'SIGSTOP')
    try {
      expect(await ask(url, '/readyz')).toEqual({ status: 503, text: 'process 1: no answer within 2500 ms\n' })
      expect(await figure(url, 'calltape_sink_turns_total')).toBe(100)
      expect(await figure(url, 'calltape_sink_processes')).toBe(1)
      expect(await figure(url, 'calltape_sink_processes_wanted')).toBe(2)
      expect((await ask(url, '/healthz')).status).toBe(200)
    } finally {
      process.kill(second!, 'SIGCONT')
    }
    await until('it is ready again', async () => (await ask(url, '/readyz')).status === 200)
  })

  test('what_keeps_them_from_starting_is_told_once', async () => {
    const wrong = { ...environment, DATABASE_URL: 'postgres://127.0.0.1:1/x' }
    const { code, err } = await calltape(['sink', '--processes', '3'], wrong)
    expect({ code, told: err.match(/DATABASE_URL/g)?.length }, err).toEqual({ code: 2, told: 1 })
  })
})
