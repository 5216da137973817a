/** The metrics: each one is there, counts what its help says, and adds up over several processes. */
import { once } from 'node:events'
import type { Registry } from 'prom-client'
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from 'vitest'
import { WebSocket } from 'ws'
import { startIngest } from '../ingest/ingest.js'
import { readConfig } from '../shared/config.js'
import { createIngestMetrics, createSinkMetrics } from '../shared/metrics.js'
import { Leases } from '../sink/lease.js'
import { startSink } from '../sink/sink.js'
import { Calls, ended, newSid, seqs } from './support/calls.js'
import { testIngest, Wire } from './support/ingest.js'
import { type Scrape, scrape } from './support/metrics.js'
import { Relay } from './support/relay.js'
import { freshDatabase, freshRedis, log, until } from './support/stores.js'
import { entriesOf, leaseAll, turn } from './support/streams.js'

/** What has changed, without the histograms' buckets and what the process says of itself. */
function changes(before: Scrape, after: Scrape): Record<string, number> {
  const changed: Record<string, number> = {}
  for (const [series, value] of after) {
    const by = value - (before.get(series) ?? 0)
    if (by !== 0 && series.startsWith('calltape_') && !series.includes('le="')) changed[series] = by
  }
  return changed
}

const present = (found: Scrape, name: string) => [...found.keys()].some((series) => series.split('{')[0] === name)

describe('conventions', () => {
  const cases: [string, Registry][] = [
    ['ingest', createIngestMetrics().registry],
    ['sink', createSinkMetrics().registry],
  ]
  test.each(cases)('names_helps_and_labels_of_%s_are_as_Prometheus_wants_them', async (process, registry) => {
    const metrics = await registry.getMetricsAsJSON()
    const own = metrics.filter(({ name }) => !/^(process|nodejs)_/.test(name))
    expect(own.length).toBeGreaterThan(20)
    for (const { name, help, type, values } of own) {
      expect(name).toMatch(new RegExp(`^calltape_${process}_[a-z]+(_[a-z]+)*$`))
      expect(help, name).toMatch(/^\S.*[^.\s]$/)
      expect(name.endsWith('_total'), name).toBe(String(type) === 'counter')
      expect(name).not.toMatch(/_(count|sum|bucket|info|ms|milliseconds|kb|mb)$/)
      if (String(type) === 'histogram') expect(name).toMatch(/_(seconds|events|rows|calls)$/)
      for (const label of values.flatMap(({ labels }) => Object.keys(labels))) expect(label).not.toMatch(/call|sid|__/)
    }
    expect(new Set(own.map(({ name }) => name)).size).toBe(own.length)
  })

  test.each(cases)('the_process_of_%s_tells_its_event_loop_lag_memory_and_CPU', async (_process, registry) => {
    const names = (await registry.getMetricsAsJSON()).map(({ name }) => name)
    const wanted = ['nodejs_eventloop_lag_p99_seconds', 'process_resident_memory_bytes', 'process_cpu_seconds_total']
    expect(names).toEqual(expect.arrayContaining(wanted))
  })

  test.each(cases)('counters_of_%s_with_labels_are_there_from_the_first_scrape', async (_process, registry) => {
    const later = ['calltape_ingest_webhooks_total', 'calltape_ingest_ignored_messages_total'] // once providers are known
    for (const { name, type, values } of await registry.getMetricsAsJSON()) {
      if (String(type) !== 'counter' || !name.startsWith('calltape_') || later.includes(name)) continue
      expect(values.length, name).toBeGreaterThan(0)
      for (const { value } of values) expect(value).toBe(0)
    }
  })
})

describe('ingest', () => {
  let calls: Calls
  beforeAll(async () => {
    calls = await Calls.start({}, 0)
  })
  afterAll(() => calls.stack.end())

  const I = 'calltape_ingest'

  test('counts_what_is_taken_acked_and_refused_on_a_WebSocket', async () => {
    const { ingest } = calls.stack
    const before = await scrape(ingest.url)
    const sid = newSid()
    const wire = await Wire.open(ingest)
    wire.send([turn(sid, 0), turn(sid, 1)])
    wire.send({ type: 'nonsense', call_sid: sid })
    wire.send('{"type":')
    wire.send(turn(sid, 2))
    await wire.untilAcked(5)
    const changed = changes(before, await scrape(ingest.url))
    expect(changed).toMatchObject({
      [`${I}_events_accepted_total`]: 3,
      [`${I}_events_acked_total`]: 3,
      [`${I}_events_refused_total{code="unknown_type"}`]: 1,
      [`${I}_events_refused_total{code="invalid_json"}`]: 1,
      [`${I}_connections`]: 1,
      [`${I}_flush_events_sum`]: 3,
    })
    expect(changed[`${I}_flush_seconds_count`]).toBe(changed[`${I}_flush_events_count`])
  })

  test('counts_what_POSTs_are_answered_whoever_answers_them', async () => {
    const ingest = await testIngest({
      REDIS_URL: calls.stack.redis.url,
      INGEST_TOKENS: 'secret',
      MAX_BODY_BYTES: '1024',
    })
    const before = await scrape(ingest.url)
    const post = (body: unknown, type = 'application/json', token = 'secret') =>
      fetch(`${ingest.url}/v1/events`, {
        method: 'POST',
        headers: { 'Content-Type': type, Authorization: `Bearer ${token}` },
        body: typeof body === 'string' ? body : JSON.stringify(body),
      })
    const sid = newSid()
    const answers = [
      await post([turn(sid, 0), turn(sid, 1), { type: 'turn', call_sid: sid }]),
      await post('{'),
      await post('x', 'text/plain'),
      await post([turn(sid, 2)], 'application/json', 'guess'),
      await post('x'.repeat(2000)),
    ]
    expect(answers.map(({ status }) => status)).toEqual([200, 400, 415, 401, 413])
    const changed = changes(before, await scrape(ingest.url))
    for (const status of [200, 400, 401, 413, 415]) {
      expect(changed[`${I}_requests_total{status="${status}"}`], String(status)).toBe(1)
    }
    expect(changed).toMatchObject({
      [`${I}_events_accepted_total`]: 2,
      [`${I}_events_acked_total`]: 2,
      [`${I}_events_refused_total{code="missing_field"}`]: 1,
    })
  })

  test('counts_webhooks_by_provider_and_what_they_were_answered', async () => {
    const { ingest } = calls.stack
    const before = await scrape(ingest.url)
    expect(before.get(`${I}_webhooks_total{provider="exotel",status="200"}`)).toBe(0)
    const form = new URLSearchParams({ CallSid: newSid(), Status: 'completed', EventType: 'terminal' })
    const answer = await fetch(`${ingest.url}/webhooks/exotel/status`, { method: 'POST', body: form })
    const changed = changes(before, await scrape(ingest.url))
    expect(changed[`${I}_webhooks_total{provider="exotel",status="${answer.status}"}`]).toBe(1)
    expect(changed[`${I}_events_acked_total`]).toBe(changed[`${I}_events_accepted_total`])
  })

  test('counts_every_WebSocket_and_by_which_code_it_was_closed', async () => {
    const ingest = await testIngest({ REDIS_URL: calls.stack.redis.url, WINDOW: '1' })
    const before = await scrape(ingest.url)
    const wires = await Promise.all([1, 2, 3, 4].map(() => Wire.open(ingest)))
    const provider = new WebSocket(`${ingest.url.replace('http', 'ws')}/streams/exotel`)
    onTestFinished(() => provider.terminate())
    await once(provider, 'open')
    expect((await scrape(ingest.url)).get(`${I}_connections`)).toBe(5)
    wires[0]!.socket.close(1000)
    wires[1]!.socket.terminate()
    wires[2]!.socket.close(4999)
    wires[3]!.send(seqs(10).map((seq) => turn('window', seq)))
    provider.close(1001)
    const refused = await Wire.open(ingest, '?call_sid=no+good+sid!') // turned away after it was opened
    expect((await refused.untilClosed()).code).toBe(1008)
    await until('all are closed', async () => (await scrape(ingest.url)).get(`${I}_connections`) === 0)
    expect(changes(before, await scrape(ingest.url))).toMatchObject(
      Object.fromEntries(
        ['1000', '1001', '1006', '1008', '4008', 'other'].map((code) => [
          `${I}_connections_closed_total{code="${code}"}`,
          1,
        ]),
      ),
    )
  })

  test('tells_what_waits_for_Redis_and_how_much_may', async () => {
    const { redis } = calls.stack
    const relay = await Relay.start(redis.url)
    onTestFinished(() => relay.stop())
    const ingest = await testIngest({ REDIS_URL: relay.url, MAX_QUEUE_BYTES: '12345678' })
    const idle = await scrape(ingest.url)
    expect(idle.get(`${I}_queue_max_bytes`)).toBe(12_345_678)
    expect(idle.get(`${I}_spool_max_bytes`)).toBe(0)
    expect(idle.get(`${I}_redis_up`)).toBe(1)
    relay.hold()
    const wire = await Wire.open(ingest)
    wire.send([turn(newSid(), 0)])
    const waiting = await until('it is in flight', async () => {
      const found = await scrape(ingest.url)
      return found.get(`${I}_flushes_in_flight`) === 1 && found
    })
    expect(waiting.get(`${I}_queued_events`)).toBe(1)
    expect(waiting.get(`${I}_events_acked_total`)).toBe(0)
    relay.release()
    await wire.untilAcked(1)
    expect((await scrape(ingest.url)).get(`${I}_flushes_in_flight`)).toBe(0)
    relay.onChunk = () => 'drop'
    relay.cut()
    await until('it says so', async () => (await scrape(ingest.url)).get(`${I}_redis_up`) === 0)
  })
})

describe('sink', () => {
  let calls: Calls
  beforeAll(async () => {
    calls = await Calls.start({ IDLE_TIMEOUT: '60', LEASE_SECONDS: '2' })
  })
  afterAll(() => calls.stack.end())

  const S = 'calltape_sink'
  const sink = () => scrape(calls.stack.sinks[0]!.url)
  const differs = async (before: Scrape) => changes(before, await sink())

  test('counts_turns_events_duplicates_and_calls_by_what_became_of_them', async () => {
    const before = await sink()
    const [sold, incomplete, silent] = [newSid(), newSid(), newSid()]
    await calls.storeSettled(...seqs(3).map((seq) => turn(sold, seq)), turn(incomplete, 0), turn(silent, 0))
    await calls.storeSettled(turn(sold, 2))
    await calls.storeSettled(
      { type: 'call.ended', call_sid: sold, outcome: 'sold a boat' },
      ended(incomplete, 5),
      // As ingest and reaper write it, when nobody ends a call.
      { type: 'call.ended', call_sid: silent, source: 'calltape', reason: 'abandoned' },
    )
    await until('it is counted', async () => (await sink()).get(`${S}_lag_seconds`) === 0)
    expect(await differs(before)).toMatchObject({
      [`${S}_turns_total`]: 5,
      [`${S}_duplicate_turns_total`]: 1,
      [`${S}_staged_batches_total`]: 1,
      [`${S}_events_total`]: 3,
      [`${S}_calls_finalized_total{outcome="other"}`]: 1,
      [`${S}_calls_finalized_total{outcome="no_answer"}`]: 2,
      [`${S}_calls_incomplete_total`]: 1,
      [`${S}_calls_abandoned_total`]: 1,
      [`${S}_batch_rows_sum`]: 9,
    })
    expect((await differs(before))[`${S}_calls_refinalized_total`]).toBeUndefined()

    const final = await sink()
    await calls.storeSettled(turn(sold, 3))
    const late = await differs(final)
    expect(late).toMatchObject({ [`${S}_turns_total`]: 1, [`${S}_calls_refinalized_total`]: 1 })
    expect(Object.keys(late).filter((series) => series.includes('finalized_total{'))).toEqual([])
  })

  test('measures_each_step_of_a_batch', async () => {
    const before = await sink()
    await calls.storeSettled(turn(newSid(), 0), turn(newSid(), 0))
    const changed = await until('it is settled', async () => {
      const found = await differs(before)
      const isCounted = found[`${S}_batch_calls_sum`] === 2
      return isCounted && found[`${S}_settle_seconds_count`] === found[`${S}_write_seconds_count`] ? found : undefined
    })
    const batches = changed[`${S}_write_seconds_count`]
    for (const step of ['lease', 'read', 'copy', 'finalize', 'settle']) {
      expect(changed[`${S}_${step}_seconds_count`], step).toBe(batches)
    }
    expect(changed[`${S}_event_to_committed_seconds_count`], 'one of each call').toBe(2)
    const last = (await sink()).get(`${S}_last_commit_timestamp_seconds`)!
    expect(Math.abs(last - Date.now() / 1000)).toBeLessThan(30)
  })

  test('counts_what_went_into_quarantine_and_what_was_lost', async () => {
    const before = await sink()
    const sid = newSid()
    await calls.foreign(sid, [
      ['e', '{"type":"nonsense"}'],
      ['x', 'y'],
    ])
    await calls.settled(sid)
    const { client, partitions } = calls.stack.redis
    const gone = newSid()
    await client.zadd(partitions.of(gone).ready, Date.now(), gone)
    await calls.wake(gone)
    await until('it is missed', async () => (await differs(before))[`${S}_lost_streams_total`] === 1)
    expect(await differs(before)).toMatchObject({ [`${S}_quarantined_total`]: 2 })
  })

  test('counts_what_is_delivered_again', async () => {
    const before = await sink()
    const { redis } = calls.stack
    await calls.stop()
    const sid = newSid()
    await calls.producer.store(turn(sid, 0), turn(sid, 1))
    // Its sink dies with it.
    expect(await leaseAll(new Leases(redis.client, redis.partitions, 1), redis, { leaseMs: 1 })).toHaveLength(1)
    await calls.start()
    await calls.settled(sid)
    const after = await sink()
    expect(after.get(`${S}_reclaimed_total`)).toBe(1)
    expect(after.get(`${S}_redelivered_entries_total`)).toBe(2)
    expect(after.get(`${S}_staged_batches_total`)).toBe(1)
    expect(before.get(`${S}_redelivered_entries_total`)).toBe(0)
  })

  test('the_lag_counts_from_the_entry_while_PostgreSQL_takes_its_time_and_a_cut_connection_is_a_retry', async () => {
    const sid = newSid()
    await calls.storeSettled(turn(sid, 0))
    const before = await sink()
    const client = await calls.stack.database.pool.connect()
    onTestFinished(() => client.release(true))
    await client.query('BEGIN')
    await client.query('SELECT FROM call_sessions WHERE call_sid = $1 FOR UPDATE', [sid])
    await calls.producer.store(ended(sid), turn(sid, 1))
    const [, end] = await entriesOf(calls.stack.redis, sid)
    const arrivedMs = Number.parseInt(end![0], 10)
    // Its lease is prolonged meanwhile: by that alone, its entries would hardly be a second old.
    const held = await until('it has waited for longer than a lease lasts', async () => {
      const found = await sink()
      return found.get(`${S}_lag_seconds`)! > 2.4 && found
    })
    const lag = held.get(`${S}_lag_seconds`)!
    expect(held.get(`${S}_batches_in_hand`)).toBe(1)
    expect(lag).toBeLessThan((Date.now() - arrivedMs) / 1000 + 0.1)
    const worst = `${S}_worst_partition_lag_seconds{partition="${calls.stack.redis.partitions.of(sid).partition}"}`
    expect(held.get(worst)).toBe(lag)
    expect(Object.fromEntries(held)).toMatchObject({
      [`${S}_leased_calls`]: 1,
      [`${S}_ready_calls`]: 0,
      [`${S}_entries_behind`]: 2,
      [`${S}_lagging_partitions`]: 1,
      [`${S}_postgres_connections{state="busy"}`]: 1,
      [`${S}_gate_open`]: 1,
    })
    expect(await calls.terminate("wait_event_type = 'Lock'")).toBe(1)
    await client.query('ROLLBACK')
    await calls.settled(sid)
    expect((await differs(before))[`${S}_retries_total{class="retry"}`]).toBe(1)
    const idle = await until('nothing waits', async () => {
      const found = await sink()
      return found.get(`${S}_lag_seconds`) === 0 && found
    })
    expect(idle.get(`${S}_batches_in_hand`)).toBe(0)
    expect([...idle.keys()].filter((series) => series.includes('worst_partition'))).toHaveLength(1)
  })

  test('tells_of_the_stores', async () => {
    const sid = newSid()
    await calls.storeSettled(turn(sid, 0), ended(sid))
    const found = await until('it has ended', async () => {
      const after = await sink()
      return after.get(`${S}_ended_calls`)! > 0 && after
    })
    const used = /used_memory:(\d+)/.exec(await calls.stack.redis.client.info('memory'))![1]
    expect(found.get(`${S}_redis_memory_bytes`)! / Number(used)).toBeCloseTo(1, 0)
    expect(found.get(`${S}_redis_max_memory_bytes`)).toBe(0)
    expect(found.get(`${S}_redis_up`)).toBe(1)
    for (const state of ['busy', 'idle', 'waiting']) {
      expect(found.get(`${S}_postgres_connections{state="${state}"}`), state).toBeGreaterThanOrEqual(0)
    }
  })
})

test('two_of_each_add_up', async () => {
  const calls = await Calls.start({}, 2)
  onTestFinished(() => calls.stack.end())
  const second = await startIngest(calls.stack.config, log)
  onTestFinished(() => second.stop())
  const sids = seqs(60).map(newSid)
  const wires = [await Wire.open(calls.stack.ingest), await Wire.open(second)]
  for (const [c, sid] of sids.entries()) wires[c % 2]!.send([turn(sid, 0), turn(sid, 1), ended(sid)])
  await Promise.all(wires.map((wire) => wire.untilAcked(90)))
  await calls.idle()
  const ingests = await Promise.all([calls.stack.ingest, second].map(({ url }) => scrape(url)))
  const sum = (found: Scrape[], series: string) => found.reduce((total, each) => total + each.get(series)!, 0)
  expect(sum(ingests, 'calltape_ingest_events_accepted_total')).toBe(180)
  expect(sum(ingests, 'calltape_ingest_events_acked_total')).toBe(180)
  expect(sum(ingests, 'calltape_ingest_connections')).toBe(2)
  const sinks = await until('both have seen the end', async () => {
    const found = await Promise.all(calls.stack.sinks.map(({ url }) => scrape(url)))
    return found.every((each) => each.get('calltape_sink_ended_calls') === 60) && found
  })
  expect(sum(sinks, 'calltape_sink_turns_total')).toBe(120)
  expect(sum(sinks, 'calltape_sink_events_total')).toBe(60)
  expect(sum(sinks, 'calltape_sink_calls_finalized_total{outcome="no_answer"}')).toBe(60)
  for (const each of sinks) {
    expect(each.get('calltape_sink_open_calls')).toBe(0) // all calls, not half of them
    expect(each.get('calltape_sink_lag_seconds')).toBe(0)
  }
})

test('while_Redis_is_away_a_scrape_has_what_is_the_process_s_own_and_nothing_of_what_only_Redis_knows', async () => {
  const [redis, database] = await Promise.all([freshRedis(), freshDatabase()])
  const relay = await Relay.start(redis.url)
  const config = readConfig({ REDIS_URL: relay.url, DATABASE_URL: database.url, SINK_METRICS_PORT: '0' })
  const sink = await startSink(config, log)
  onTestFinished(async () => {
    relay.onChunk = undefined
    await sink.stop()
    await relay.stop()
    await Promise.all([redis.drop(), database.drop()])
  })
  const shared = [
    ...['lag_seconds', 'worst_partition_lag_seconds', 'lagging_partitions', 'entries_behind', 'ready_calls'],
    ...['leased_calls', 'open_calls', 'ended_calls', 'redis_memory_bytes', 'redis_max_memory_bytes'],
  ].map((name) => `calltape_sink_${name}`)
  const own = ['calltape_sink_turns_total', 'calltape_sink_gate_open', 'nodejs_eventloop_lag_p99_seconds']
  const there = await scrape(sink.url)
  for (const name of [...shared, ...own]) expect(present(there, name), name).toBe(true)

  relay.onChunk = () => 'drop'
  relay.cut()
  const away = await until('the last answer is too old', async () => {
    const found = await scrape(sink.url)
    return found.get('calltape_sink_redis_up') === 0 && !present(found, 'calltape_sink_lag_seconds') && found
  })
  for (const name of shared) expect(present(away, name), name).toBe(false)
  for (const name of own) expect(present(away, name), name).toBe(true)
  relay.onChunk = undefined
  const back = await until('it is back', async () => {
    const found = await scrape(sink.url)
    return present(found, 'calltape_sink_lag_seconds') && found
  })
  for (const name of shared) expect(present(back, name), name).toBe(true)
})
