/** Entries that kill or fail their sink again and again: they are found, quarantined, and stop nobody. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { describe, expect, test } from 'vitest'
import { Calls, ended, newSid, seqs } from './support/calls.js'
import { Service } from './support/processes.js'
import { until } from './support/stores.js'
import { sessionOf, streamOf, turn } from './support/streams.js'

/** Makes PostgreSQL do `what` (plpgsql) at every turn with the text `odd`, or whatever `when` says. */
async function atTurns(calls: Calls, what: string, when = `new.text = 'odd'`): Promise<void> {
  await calls.query(`
    CREATE FUNCTION react() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN ${what}; RETURN new; END $$;
    CREATE TRIGGER react BEFORE INSERT ON call_transcript_turns FOR EACH ROW WHEN (${when}) EXECUTE FUNCTION react()`)
}
const internalError = `RAISE EXCEPTION 'odd' USING ERRCODE = 'XX000'`
const seqsOf = async (calls: Calls, sid: string) => (await calls.turns(sid)).map((row) => row.seq)
const quarantined = async (calls: Calls, sid: string) =>
  (await calls.quarantined(sid)).map(({ reason, raw }) => [reason, JSON.parse(JSON.parse(String(raw))[1]).seq])

/** Dies of every entry that contains `odd`, and is started again. */
function mortalSink({ stack }: Calls, folder: string): Service {
  const stores = { REDIS_URL: stack.redis.url, DATABASE_URL: stack.database.url, SINK_METRICS_PORT: '0' }
  const environment = { ...stores, LEASE_SECONDS: '1', MAX_DELIVERIES: '2', CRASH_AT: 'decode@odd' }
  return new Service({ name: 'sink', logFile: join(folder, 'sink.log'), staysArmed: true, environment })
}

test('an_entry_that_kills_every_sink_is_quarantined_and_stops_nobody', async () => {
  const calls = await Calls.start({ LEASE_SECONDS: '1', MAX_DELIVERIES: '2' }, 0)
  const folder = await mkdtemp(join(tmpdir(), 'calltape-test-poison-'))
  const [sick, neighbours] = [newSid(), seqs(30).map(newSid)]
  const load = [...seqs(6), 6].map((seq) => turn(sick, seq, seq === 2 || seq === 4 ? 'odd' : 'fine'))
  await calls.producer.store(...load, ended(sick, 7), ...neighbours.flatMap((sid) => [turn(sid, 0), ended(sid, 1)]))
  const sink = mortalSink(calls, folder)
  try {
    const complete = async () =>
      Number((await calls.query('SELECT count(*) FROM call_sessions WHERE complete'))[0]!.count)
    await until('the neighbours are there', async () => (await complete()) === 30, 20_000)
    expect(await calls.quarantined(sick)).toEqual([]) // it is still going on
    await calls.settled(sick, 30_000)
    expect(await seqsOf(calls, sick)).toEqual([0, 1, 3, 5, 6])
    const reason = expect.stringMatching(/^poison: \d+ deliveries came to nothing, the last one of it alone$/)
    expect(await quarantined(calls, sick)).toEqual([
      [reason, 2],
      [reason, 4],
    ])
    expect(await calls.session(sick)).toMatchObject({ turn_count: 5, expected_turns: 7, complete: false })
    // Twice with others, then by itself, then alone: and after that only the second one alone.
    expect(sink.deaths.map((death) => death.signal)).toEqual(Array(4).fill('SIGKILL'))
    await calls.producer.store(turn(sick, 7))
    await calls.settled(sick) // nothing is left of it
    expect(sink.deaths).toHaveLength(4)
  } finally {
    await sink.end()
    await rm(folder, { recursive: true, force: true })
    await calls.stack.end()
  }
}, 90_000)

test('a_poison_entry_deep_in_a_backlog_costs_no_more_sinks', async () => {
  const calls = await Calls.start({}, 0)
  const folder = await mkdtemp(join(tmpdir(), 'calltape-test-poison-'))
  const sid = newSid()
  await calls.producer.store(...seqs(170).map((seq) => turn(sid, seq, seq === 160 ? 'odd' : 'fine')))
  const sink = mortalSink(calls, folder)
  try {
    await calls.settled(sid, 30_000)
    expect((await calls.turns(sid)).length).toBe(169)
    expect(sink.deaths).toHaveLength(3)
  } finally {
    await sink.end()
    await rm(folder, { recursive: true, force: true })
    await calls.stack.end()
  }
}, 60_000)

describe.concurrent('an unclear error', () => {
  test('of_one_entry_quarantines_it_alone_while_others_succeed', async () => {
    const calls = await Calls.start({ MAX_DELIVERIES: '2' })
    await atTurns(calls, internalError)
    const sick = newSid()
    await calls.producer.store(...seqs(5).map((seq) => turn(sick, seq, seq === 2 ? 'odd' : 'fine')), ended(sick, 5))
    for (let i = 0; (await calls.quarantined(sick)).length === 0; i++) {
      await calls.storeSettled(turn(`sound-${i}`, 0)) // never waits for the sick one
      await sleep(50)
    }
    await calls.settled(sick)
    expect(await seqsOf(calls, sick)).toEqual([0, 1, 3, 4])
    expect(await quarantined(calls, sick)).toEqual([['fails: odd', 2]])
    expect(await calls.session(sick)).toMatchObject({ turn_count: 4, complete: false })
    expect(await calls.ready()).toBe('200 ready')
    await calls.stack.end()
  }, 60_000)

  test('of_everything_quarantines_nothing_and_makes_the_sink_unready', async () => {
    const calls = await Calls.start({ MAX_DELIVERIES: '1' })
    await atTurns(calls, internalError, 'true')
    const sids = seqs(10).map(newSid)
    await calls.producer.store(...sids.flatMap((sid) => [turn(sid, 0), ended(sid, 1)]))
    // Where, and not what: what a function says may quote what was said in a call.
    const why = '503 no progress: error XX000 raised in react'
    await until('it is unready and says why', async () => (await calls.ready()) === why, 15_000)
    await sleep(2000)
    expect(await calls.query('SELECT FROM quarantined_events')).toEqual([])
    await calls.query('DROP TRIGGER react ON call_transcript_turns')
    await calls.idle()
    const [row] = await calls.query('SELECT count(*)::int AS n FROM call_sessions WHERE complete')
    expect(row).toEqual({ n: 10 })
    expect(await calls.query('SELECT FROM quarantined_events')).toEqual([])
    expect(await calls.ready()).toBe('200 ready')
    await calls.stack.end()
  }, 60_000)

  test('of_a_turn_that_takes_longer_than_DATABASE_TIMEOUT_keeps_only_that_turn_out', async () => {
    const calls = await Calls.start({ MAX_DELIVERIES: '1', DATABASE_TIMEOUT: '1' })
    await atTurns(calls, 'PERFORM pg_sleep(5)')
    const [slow, other] = [newSid(), newSid()]
    await calls.producer.store(turn(slow, 0), turn(slow, 1, 'odd'), turn(slow, 2), turn(other, 0))
    await calls.settled(other)
    for (let i = 0; (await calls.quarantined(slow)).length === 0; i++) {
      await calls.storeSettled(turn(`sound-${i}`, 0))
      await sleep(100)
    }
    await calls.settled(slow)
    expect(await seqsOf(calls, slow)).toEqual([0, 2])
    expect(await quarantined(calls, slow)).toEqual([['fails: canceling statement due to statement timeout', 1]])
    await calls.stack.end()
  }, 60_000)
})

describe.concurrent('what cannot be told apart at first', () => {
  test('a_failure_that_PostgreSQL_seems_to_have_got_over_again_and_again_is_isolated_in_the_end', async () => {
    const calls = await Calls.start({ MAX_DELIVERIES: '1' })
    await atTurns(calls, `RAISE EXCEPTION 'odd' USING ERRCODE = '58030'`) // an I/O error, it says
    const [sick, sound] = [newSid(), newSid()]
    await calls.producer.store(turn(sick, 0, 'odd'), turn(sound, 0), ended(sound, 1))
    await calls.settled(sound, 20_000)
    expect(await calls.session(sound)).toMatchObject({ complete: true })
    for (let i = 0; (await calls.quarantined(sick)).length === 0; i++) {
      await calls.producer.store(turn(`sound-${i}`, 0))
      await sleep(200)
    }
    await calls.settled(sick)
    await calls.stack.end()
  }, 60_000)

  test('a_call_whose_row_fails_for_an_unclear_reason_is_quarantined_entry_by_entry_and_stops_nobody', async () => {
    const calls = await Calls.start({ MAX_DELIVERIES: '1' })
    const sick = newSid()
    await calls.query(`
      CREATE FUNCTION react() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN ${internalError}; END $$;
      CREATE TRIGGER react BEFORE INSERT ON call_sessions FOR EACH ROW WHEN (new.call_sid = '${sick}') EXECUTE FUNCTION react()`)
    await calls.producer.store(turn(sick, 0))
    for (let i = 0; (await calls.quarantined(sick)).length === 0; i++) {
      await calls.storeSettled(turn(`sound-${i}`, 0))
      await sleep(100)
    }
    await calls.settled(sick)
    expect(await calls.ready()).toBe('200 ready')
    await calls.stack.end()
  }, 60_000)

  test('an_entry_that_fails_once_when_it_is_tried_alone_is_innocent', async () => {
    const calls = await Calls.start({ MAX_DELIVERIES: '1' })
    await calls.query('CREATE SEQUENCE tries')
    await atTurns(calls, `IF nextval('tries') = 1 THEN ${internalError}; END IF`)
    const sid = newSid()
    await calls.storeSettled(turn('sound', 0)) // so it is not all of them that fail
    await calls.stack.redis.client.hset(sessionOf(calls.stack.redis, sid), 'lapses', 9)
    await calls.storeSettled(turn(sid, 0, 'odd'))
    expect(await calls.quarantined(sid)).toEqual([])
    expect(await seqsOf(calls, sid)).toEqual([0])
    expect(await calls.metric('retries_total')).toBe(1)
    await calls.stack.end()
  })

  test('slow_calls_occupy_one_worker_and_not_all_of_them', async () => {
    const calls = await Calls.start({ MAX_DELIVERIES: '20', DATABASE_TIMEOUT: '3' })
    const slow = seqs(4).map(newSid)
    await calls.storeSettled(...slow.map((sid) => turn(sid, 0)))
    const client = await calls.stack.database.pool.connect()
    await client.query('BEGIN')
    await client.query('SELECT FROM call_sessions WHERE call_sid = ANY($1) FOR UPDATE', [slow])
    await calls.producer.store(...slow.map((sid) => ended(sid)))
    const { client: redis, partitions } = calls.stack.redis
    const lapses = () =>
      Promise.all(slow.map((sid) => redis.hget(partitions.of(sid).sessionPrefix + sid, 'lapses').then(Number)))
    await until('they are suspects', async () => (await lapses()).every((n) => n >= 2), 30_000)
    const waits: number[] = []
    for (let i = 0; i < 20; i++) {
      const from = performance.now()
      await calls.storeSettled(turn(`sound-${i}`, 0))
      waits.push(performance.now() - from)
      await sleep(100)
    }
    expect(Math.max(...waits)).toBeLessThan(2000)
    await client.query('ROLLBACK')
    client.release()
    for (const sid of slow) await calls.settled(sid, 20_000)
    expect(await calls.query('SELECT FROM quarantined_events')).toEqual([])
    await calls.stack.end()
  }, 60_000)

  test('an_entry_that_was_stored_before_its_sink_died_is_innocent', async () => {
    const calls = await Calls.start({}, 0)
    const { redis } = calls.stack
    const sid = newSid()
    await calls.producer.store(turn(sid, 0), turn(sid, 1))
    await calls.start()
    await calls.settled(sid)
    await calls.stop()
    // As a sink leaves it that dies between the COMMIT of an entry tried alone and what comes next.
    const [first, second] = await redis.client.xrange(streamOf(redis, sid), '-', '+')
    await redis.client.xgroup('SETID', streamOf(redis, sid), 'sink', first![0], 'ENTRIESREAD', 1)
    await redis.client.hset(sessionOf(redis, sid), { lapses: 9, alone: second![0] })
    await redis.client.zadd(redis.partitions.of(sid).ready, Date.now(), sid)
    await calls.start()
    await calls.settled(sid)
    expect(await calls.quarantined(sid)).toEqual([])
    expect(await redis.client.hmget(sessionOf(redis, sid), 'lapses', 'alone')).toEqual([null, null])
    await calls.stack.end()
  })
})

describe.concurrent('leases', () => {
  test('are_prolonged_while_a_batch_takes_longer_than_they_last', async () => {
    const calls = await Calls.start({ LEASE_SECONDS: '1' }, 2)
    await atTurns(calls, 'PERFORM pg_sleep(3)')
    const sids = seqs(20).map(newSid)
    await calls.producer.store(...sids.map((sid, i) => turn(sid, 0, i === 7 ? 'odd' : 'fine')))
    await calls.idle(20_000)
    expect((await calls.query('SELECT FROM call_transcript_turns')).length).toBe(20)
    for (const sink of calls.stack.sinks) {
      for (const name of ['reclaimed_total', 'duplicate_turns_total', 'staged_batches_total', 'retries_total']) {
        expect([name, await calls.metric(name, sink)]).toEqual([name, 0])
      }
    }
    await calls.stack.end()
  })
})

describe.concurrent('what a rule of the database refuses', () => {
  test('as_the_first_entry_of_a_call_does_not_keep_its_row_from_being_made', async () => {
    const calls = await Calls.start()
    await calls.query(`ALTER TABLE call_transcript_turns ADD CHECK (text <> 'odd')`)
    const sid = newSid()
    await calls.storeSettled(turn(sid, 0, 'odd'), turn(sid, 1))
    expect(await seqsOf(calls, sid)).toEqual([1])
    expect(await calls.session(sid)).toMatchObject({ status: 'in-progress', finalized_at: null })
    await calls.stack.end()
  })

  test('as_the_end_of_a_call_does_not_leave_it_live_for_ever', async () => {
    const calls = await Calls.start()
    await calls.query(`ALTER TABLE call_events ADD CHECK (event->>'reason' <> 'odd')`)
    const sid = newSid()
    await calls.producer.store(turn(sid, 0), { type: 'call.ended', call_sid: sid, reason: 'odd' })
    const row = await until('it is finalized', async () => {
      const session = await calls.session(sid)
      return session?.finalized_at ? session : undefined
    })
    expect(row).toMatchObject({ end_reason: 'abandoned', turn_count: 1 })
    expect(await calls.quarantined(sid)).toHaveLength(1)
    await calls.stack.end()
  })

  test('as_every_end_there_can_be_is_not_tried_for_ever', async () => {
    const calls = await Calls.start()
    await calls.query(`ALTER TABLE call_events ADD CHECK (type <> 'call.ended')`)
    const sid = newSid()
    await calls.producer.store(turn(sid, 0), ended(sid, 1))
    await until('our own end is in quarantine, too', async () => (await calls.quarantined(sid)).length === 2)
    await sleep(3000)
    expect(await calls.quarantined(sid)).toHaveLength(2)
    await calls.stack.end()
  })
})
