/** A shard that is down, or hangs, and has no replica to take over: the others' calls go on, and its own wait for it. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { Command } from 'ioredis'
import { afterAll, beforeAll, expect, inject, onTestFinished, test } from 'vitest'
import { startIngest } from '../../ingest/ingest.js'
import { type Environment, readConfig } from '../../shared/config.js'
import { PARTITIONS_KEY, Partitions } from '../../shared/keys.js'
import { createLog } from '../../shared/log.js'
import { startSink } from '../../sink/sink.js'
import { testIngest, Wire } from '../support/ingest.js'
import { figure } from '../support/metrics.js'
import { Service } from '../support/processes.js'
import { calltape } from '../support/program.js'
import { freshDatabase, log, until } from '../support/stores.js'
import { turn } from '../support/streams.js'
import { TestCluster } from '../support/test-cluster.js'

let cluster: TestCluster
beforeAll(async () => {
  cluster = await TestCluster.start({ replicas: 0 })
})
afterAll(() => cluster?.stop())

const partitions = new Partitions(64)
const slotOf = (key: string) => new Command('exists', [key]).getSlot()

/** So many calls of a shard. */
async function callsOn(port: number, count: number): Promise<string[]> {
  const sids: string[] = []
  const owners = new Map<number, number>()
  for (const p of partitions.all) owners.set(p.partition, await cluster.masterOf(slotOf(p.ready)))
  for (let i = 0; sids.length < count; i++) {
    const sid = `CA${port}-${i}`
    if (owners.get(partitions.of(sid).partition) === port) sids.push(sid)
  }
  return sids
}

/** As `calltape ingest --processes 2`, from dist/. */
async function severalProcesses(environment: Environment): Promise<{ url: string }> {
  const folder = await mkdtemp(join(tmpdir(), 'calltape-unreachable-'))
  const given = { ...environment, INGEST_PORT: '0', INGEST_PROCESSES: '2' }
  const logFile = join(folder, 'ingest.log')
  const service = new Service({ name: 'ingest', environment: given, logFile, unsupervised: true })
  onTestFinished(async () => {
    await service.stop()
    await service.end()
    await rm(folder, { recursive: true })
  })
  return { url: await service.serves() }
}

/** To find out that a server hangs takes seconds, again and again: only in `npm run test:cluster`. */
const WAYS = inject('cluster') ? (['is_down', 'hangs'] as const) : (['is_down'] as const)

for (const way of WAYS) {
  test(`while_a_shard_${way}_the_others_go_on_and_its_own_events_wait`, { timeout: 60_000 }, async () => {
    await cluster.flush()
    const database = await freshDatabase()
    onTestFinished(() => database.drop())
    const environment = {
      REDIS_URL: cluster.url,
      DATABASE_URL: database.url,
      SINK_METRICS_PORT: '0',
      LEASE_SECONDS: '2',
    }
    const ingest = await testIngest(environment)
    const sinks = [await startSink(readConfig(environment), log)]
    onTestFinished(async () => void (await Promise.all(sinks.map((sink) => sink.stop()))))

    const needed = await cluster.masterOf(slotOf(PARTITIONS_KEY))
    const [dead, other] = (await cluster.masters()).filter((port) => port !== needed)
    const onDead = await callsOn(dead!, 10)
    const [deadCalls, deadCallsOfSeveral] = [onDead.slice(0, 5), onDead.slice(5)]
    const liveCalls = [...(await callsOn(other!, 5)), ...(await callsOn(needed, 5))]
    const wires = new Map<string, Wire>()
    for (const sid of [...deadCalls, ...liveCalls]) wires.set(sid, await Wire.open(ingest, `?call_sid=${sid}`))
    const say = (sids: string[], seq: number) => {
      for (const sid of sids) wires.get(sid)!.send(turn(sid, seq))
    }
    const stored = async (sids: string[], turns: number) => {
      const sql = 'SELECT count(*)::int AS n FROM call_transcript_turns WHERE call_sid = ANY($1)'
      const { rows } = await database.pool.query<{ n: number }>(sql, [sids])
      return rows[0]!.n === sids.length * turns
    }
    const all = [...deadCalls, ...liveCalls]
    const several = await severalProcesses(environment)
    say(all, 0)
    await until('all are stored', () => stored(all, 1))

    if (way === 'is_down') await cluster.kill(dead!)
    else await cluster.server(dead!).signal('SIGSTOP')
    onTestFinished(() => (way === 'is_down' ? undefined : cluster.server(dead!).signal('SIGCONT')))
    const wiresOfSeveral = await Promise.all(deadCallsOfSeveral.map(() => Wire.open(several)))
    for (const [i, sid] of deadCallsOfSeveral.entries()) wiresOfSeveral[i]!.send(turn(sid, 0))
    for (let seq = 1; seq <= 5; seq++) {
      say(all, seq)
      await until(`turn ${seq} of the others is acked and stored`, async () => {
        const areAcked = liveCalls.every((sid) => wires.get(sid)!.acked === seq + 1)
        return areAcked && (await stored(liveCalls, seq + 1))
      })
      await sleep(300)
    }
    expect(
      deadCalls.map((sid) => wires.get(sid)!.acked),
      'no ack',
    ).toEqual(deadCalls.map(() => 1))
    // One that starts meanwhile serves the others, too.
    sinks.push(await startSink(readConfig(environment), log))
    const second = await testIngest(environment)
    const late = await Wire.open(second)
    late.send(turn(liveCalls[0]!, 6))
    await late.untilAcked(1)
    await until('ingest has waited for it for some time', async () => {
      const answer = await fetch(`${ingest.url}/readyz`)
      return answer.status === 200 && JSON.stringify(await answer.json()).includes('waiting')
    })
    const theirs = new Set(deadCallsOfSeveral.map((sid) => partitions.of(sid).partition))
    const waiting = await until('several processes have, too', async () => {
      const answer = await fetch(`${several.url}/readyz`)
      if (answer.status !== 200) throw new Error(await answer.text())
      const { waiting } = (await answer.json()) as { waiting?: { partitions: number[]; reason: string } }
      return waiting?.partitions.length === theirs.size && waiting
    })
    expect(new Set(waiting.partitions)).toEqual(theirs)
    expect(waiting.reason).toMatch(/\S/)

    if (way === 'is_down') {
      const { code, out, err } = await calltape(['verify'], environment)
      expect({ code, out, err }, 'what cannot be seen does not count as whole').toEqual({
        ...{ code: 2, out: '' },
        err: expect.stringMatching(`^calltape: REDIS_URL: .*:${dead} does not answer`),
      })
    }

    if (way === 'is_down') await cluster.restore()
    else await cluster.server(dead!).signal('SIGCONT')
    await until('its events are acked', () => deadCalls.every((sid) => wires.get(sid)!.acked === 6), 20_000)
    await until('its events are stored', () => stored(deadCalls, 6), 20_000)
    await until('those of several processes, too', () => stored(deadCallsOfSeveral, 1), 20_000)
    for (const sink of sinks) expect(await figure(sink.url, 'calltape_sink_lost_streams_total')).toBe(0)
    expect((await fetch(`${sinks[0]!.url}/readyz`)).status).toBe(200)
  })
}

test('what_waits_for_a_dead_shard_fills_its_part_of_the_queue_and_the_others_have_theirs', async () => {
  await cluster.flush()
  const ingest = await testIngest({ REDIS_URL: cluster.url, MAX_QUEUE_BYTES: String(1024 * 1024) })
  const [dead, other] = await cluster.masters()
  const deadCalls = await callsOn(dead!, 100) // of all its partitions: together they would fill all there is, many times over
  const [liveCall] = await callsOn(other!, 1)
  const live = await Wire.open(ingest, `?call_sid=${liveCall}`)
  await cluster.kill(dead!)
  onTestFinished(() => cluster.restore())
  const text = 'x'.repeat(1000)
  const wires = new Map<string, Wire>()
  for (const sid of deadCalls) {
    const wire = await Wire.open(ingest)
    wires.set(sid, wire)
    for (let seq = 0; !wire.closed; seq++) {
      wire.send(turn(sid, seq, text))
      await sleep(2) // the first of them has to fail before it is known that the others will wait
    }
  }
  expect([...wires.values()].map(({ closed }) => closed?.code)).toEqual(deadCalls.map(() => 1013))
  const back = await Wire.open(ingest, `?call_sid=${deadCalls[0]}`)
  expect(await back.untilClosed(), 'and who comes back is not greeted').toMatchObject({ code: 1013 })
  const post = (sid: string) =>
    fetch(`${ingest.url}/v1/events`, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify([turn(sid, 0, text)]),
    })
  expect((await post(deadCalls[0]!)).status).toBe(503)
  for (let seq = 0; seq < 200; seq++) live.send(turn(liveCall!, seq, text))
  await live.untilAcked(200)
  expect((await post(liveCall!)).status).toBe(200)
  await cluster.restore()
  const answer = await until('the dead one has come back', async () => {
    const { status } = await post(deadCalls[0]!)
    return status === 200
  })
  expect(answer).toBe(true)
})

test('while_the_shard_with_the_partition_count_is_down_a_start_says_what_it_waits_for_and_goes_on_when_it_is_back', async () => {
  const database = await freshDatabase()
  onTestFinished(() => database.drop())
  const stores = { REDIS_URL: cluster.url, DATABASE_URL: database.url, SINK_METRICS_PORT: '0', INGEST_PORT: '0' }
  const config = readConfig(stores)
  const needed = await cluster.masterOf(slotOf(PARTITIONS_KEY))
  await cluster.kill(needed)
  onTestFinished(() => cluster.restore())
  const lines: string[] = []
  const loud = createLog('test', 'warn', { write: (line: string) => void lines.push(line) })
  const starts = [startIngest(config, loud), startSink(config, loud)]
  for (const start of starts) onTestFinished(async () => await (await start).stop())
  const waiting = `"redis":"127.0.0.1:${needed}"`
  const said = () => lines.filter((line) => line.includes('cannot start before') && line.includes(waiting))
  await until('both say what they wait for', () => said().length === 2)
  await sleep(500)
  expect(said(), 'once').toHaveLength(2)
  await cluster.restore()
  await Promise.all(starts)
}, 60_000)

const hangClaim = 'while_a_shard_hangs_turns_of_the_others_calls_are_committed_as_soon_as_ever'
test(hangClaim, { timeout: 60_000 }, async () => {
  await cluster.flush()
  const database = await freshDatabase()
  onTestFinished(() => database.drop())
  const stores = { REDIS_URL: cluster.url, DATABASE_URL: database.url }
  const environment = { ...stores, SINK_METRICS_PORT: '0', LEASE_SECONDS: '2', SINK_WORKERS: '1' }
  const ingest = await testIngest(environment)
  const sink = await startSink(readConfig(environment), log)
  onTestFinished(() => sink.stop())
  const needed = await cluster.masterOf(slotOf(PARTITIONS_KEY))
  const [hung, other] = (await cluster.masters()).filter((port) => port !== needed)
  const sids = { hung: await callsOn(hung!, 10), live: [...(await callsOn(other!, 5)), ...(await callsOn(needed, 5))] }
  const wires = new Map<string, Wire>()
  for (const sid of [...sids.hung, ...sids.live]) wires.set(sid, await Wire.open(ingest, `?call_sid=${sid}`))
  let turns = 0
  const talk = async (ms: number) => {
    for (const end = Date.now() + ms; Date.now() < end; turns++, await sleep(50)) {
      for (const [sid, wire] of wires) wire.send(turn(sid, turns))
    }
  }
  const away = async () => [
    await figure(ingest.url, 'calltape_ingest_partitions_away'),
    await figure(sink.url, 'calltape_sink_partitions_away'),
  ]
  const stored = async (calls: string[]) => {
    const sql = `SELECT count(*)::int AS n, max(extract(epoch FROM persisted_at - ingested_at))::float AS longest
                 FROM call_transcript_turns WHERE call_sid = ANY($1)`
    const { rows } = await database.pool.query<{ n: number; longest: number }>(sql, [calls])
    return rows[0]!
  }
  await talk(500)
  expect(await away()).toEqual([0, 0])
  const server = cluster.server(hung!)
  await server.signal('SIGSTOP')
  onTestFinished(() => server.signal('SIGCONT'))
  const theirs = new Set(sids.hung.map((sid) => partitions.of(sid).partition))
  // As if they had been heard just before: the sink asks the server that hangs, again and again.
  const hints = setInterval(() => {
    void cluster.client(other!).call('SPUBLISH', partitions.of(sids.live[0]!).wake, [...theirs].join())
  }, 50)
  await talk(6000)
  clearInterval(hints)
  const [ofIngest, ofSink] = await away()
  expect(ofIngest, 'those that have events waiting').toBe(theirs.size)
  expect(ofSink, 'all of the server').toBeGreaterThanOrEqual(theirs.size)
  const whole = sids.live.length * turns
  await until('all of the others are stored', async () => (await stored(sids.live)).n === whole)
  expect((await stored(sids.live)).longest, 'seconds').toBeLessThan(3)
  await server.signal('SIGCONT')
  await until('its own are stored', async () => (await stored(sids.hung)).n === sids.hung.length * turns, 20_000)
  await until('nothing is away any more', async () => (await away()).join() === '0,0')
})
