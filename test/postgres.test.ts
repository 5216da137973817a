/** PostgreSQL away, slow, failing over, cut off in the middle: the sink waits, says why, and goes on by itself. */
import { setTimeout as sleep } from 'node:timers/promises'
import { describe, expect, test } from 'vitest'
import { createPool } from '../shared/postgres.js'
import { Calls, ended, newSid, type Row, seqs } from './support/calls.js'
import { Relay } from './support/relay.js'
import { freshDatabase, freshRedis, inPublic, startTestStack, until } from './support/stores.js'
import { groupOf, turn } from './support/streams.js'

describe.concurrent('a PostgreSQL', () => {
  /** Makes the first insertion of a turn with this text take a while, at the INSERT or at the COMMIT. */
  async function slow(calls: Calls, where: 'insert' | 'commit', seconds: number): Promise<void> {
    const when = where === 'insert' ? '' : 'DEFERRABLE INITIALLY DEFERRED'
    await calls.query(`
      CREATE SEQUENCE passed;
      CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN IF nextval('passed') = 1 THEN PERFORM pg_sleep(${seconds}); END IF; RETURN NULL; END $$;
      CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON call_transcript_turns ${when}
        FOR EACH ROW WHEN (new.text = 'slow') EXECUTE FUNCTION dawdle()`)
  }
  const dawdling = (calls: Calls, statement: string) =>
    until(`a sink dawdles over ${statement}`, async () => {
      const rows = await calls.query(
        `SELECT FROM pg_stat_activity WHERE application_name = 'calltape-sink' AND datname = current_database()
           AND wait_event = 'PgSleep' AND query LIKE $1`,
        `${statement}%`,
      )
      return rows.length > 0
    })
  async function expectAllOf(calls: Calls, sid: string, turns: number): Promise<void> {
    await calls.settled(sid)
    expect((await calls.turns(sid)).map((row) => row.seq)).toEqual(seqs(turns))
    expect(await calls.session(sid)).toMatchObject({ complete: true, turn_count: turns })
    expect(await calls.quarantined(sid)).toEqual([])
    await calls.storeSettled(turn('afterwards', 0))
    expect(await calls.ready()).toBe('200 ready')
  }
  const load = (sid: string) => [...seqs(50).map((seq) => turn(sid, seq, seq === 9 ? 'slow' : 'quick')), ended(sid, 50)]

  test.for([
    ['insert', 'COPY'],
    ['commit', 'COMMIT'],
  ] as const)('a_connection_terminated_in_the_middle_of_%s_loses_and_doubles_nothing', async ([where, statement]) => {
    const calls = await Calls.start()
    await slow(calls, where, 10)
    const sid = newSid()
    await calls.producer.store(...load(sid))
    await dawdling(calls, statement)
    expect(await calls.terminate(`query LIKE '${statement}%'`)).toBe(1)
    await expectAllOf(calls, sid, 50)
    expect(await calls.metric('retries_total')).toBeGreaterThan(0)
    await calls.stack.end()
  })

  test('a_COMMIT_whose_answer_got_lost_is_found_done_and_doubles_nothing', async () => {
    const [redis, database] = await Promise.all([freshRedis(), freshDatabase()])
    const relay = await Relay.start(database.url)
    const stack = await startTestStack({ REDIS_URL: redis.url, DATABASE_URL: relay.url })
    const calls = new Calls({ ...stack, redis, database })
    await slow(calls, 'commit', 0.5)
    const sid = newSid()
    await calls.producer.store(...load(sid))
    await dawdling(calls, 'COMMIT')
    relay.holdReplies = true
    await until('it is committed', async () => (await calls.turns(sid)).length > 0)
    expect((await groupOf(redis, sid))!.lag).toBeGreaterThan(0)
    relay.cut()
    await expectAllOf(calls, sid, 50)
    expect(await calls.metric('duplicate_turns_total')).toBe(50)
    expect(await calls.metric('staged_batches_total')).toBe(1)
    await stack.end()
    await relay.stop()
    await Promise.all([redis.drop(), database.drop()])
  })

  test('connections_terminated_over_and_over_under_load_lose_and_double_nothing', async () => {
    const calls = await Calls.start({ BATCH_MAX_ROWS: '100' })
    const sids = seqs(100).map(newSid)
    const loading = calls.producer.store(...seqs(40).flatMap((seq) => sids.map((sid) => turn(sid, seq))))
    let terminated = 0
    for (let i = 0; i < 25; i++) {
      terminated += await calls.terminate()
      await sleep(40)
    }
    await loading
    await calls.producer.store(...sids.map((sid) => ended(sid, 40)))
    await calls.idle()
    expect(terminated).toBeGreaterThan(5)
    const [{ complete }] = (await calls.query(
      'SELECT count(*)::int AS complete FROM call_sessions WHERE complete',
    )) as [Row]
    expect(complete).toBe(100)
    expect((await calls.query('SELECT FROM call_transcript_turns')).length).toBe(4000)
    await calls.stack.end()
  })

  test('out_of_reach_makes_sinks_unready_with_the_reason_and_they_recover_by_themselves', async () => {
    const calls = await Calls.start({}, 2)
    const { sinks, config } = calls.stack
    const admin = createPool(inPublic(config.DATABASE_URL.replace(/\/\w+$/, '/postgres')), 'test-admin', 1)
    await admin.query(`ALTER DATABASE ${calls.database} ALLOW_CONNECTIONS false`)
    await calls.terminate('true', admin)
    const answers = () => Promise.all(sinks.map((sink) => calls.ready(sink)))
    const gone = /^503 PostgreSQL: .*not currently accepting connections/
    await until('both know it, idle as they are', async () => (await answers()).every((answer) => gone.test(answer)))
    const sid = newSid()
    await calls.producer.store(turn(sid, 0))
    const tries = async () => (await Promise.all(sinks.map((sink) => calls.metric('retries_total', sink)))).join()
    await until('both have tried', async () => (await tries()) === '1,1')
    await sleep(3000)
    expect((await answers()).every((answer) => gone.test(answer))).toBe(true)
    expect(await tries()).toBe('1,1') // they lease nothing any more
    await admin.query(`ALTER DATABASE ${calls.database} ALLOW_CONNECTIONS true`)
    await admin.end()
    await calls.settled(sid)
    expect((await calls.turns(sid)).length).toBe(1)
    // The one that did not do the work learns from having none.
    await until('both are ready', async () => (await answers()).join() === '200 ready,200 ready', 4000)
    await calls.stack.end()
  })

  test('that_lets_nobody_in_keeps_the_sink_unready_although_a_worker_has_nothing_to_do', async () => {
    const [redis, database] = await Promise.all([freshRedis(), freshDatabase()])
    const relay = await Relay.start(database.url)
    const stack = await startTestStack({ REDIS_URL: redis.url, DATABASE_URL: relay.url })
    const calls = new Calls({ ...stack, redis, database })
    relay.cut()
    relay.holdRequests = true // connecting takes until it times out
    const sid = newSid()
    await calls.producer.store(turn(sid, 0))
    await until('it is unready and says why', async () => /^503 PostgreSQL: .*time/.test(await calls.ready()))
    for (let i = 0; i < 20; i++) {
      expect(await calls.ready()).toMatch(/^503/)
      await sleep(100)
    }
    relay.cut()
    await calls.settled(sid)
    await until('it is ready', async () => (await calls.ready()) === '200 ready')
    await stack.end()
    await relay.stop()
    await Promise.all([redis.drop(), database.drop()])
  })

  test('that_hangs_makes_the_sink_unready_although_another_worker_had_something_to_do', async () => {
    const calls = await Calls.start()
    const client = await calls.stack.database.pool.connect()
    const [stuck, other] = [newSid(), newSid()]
    // A key that is neither there nor not: whoever wants to insert it has to wait.
    await client.query('BEGIN')
    await client.query(
      `INSERT INTO call_transcript_turns (call_sid, turn_id, speaker, text, spoken_at, stream_id, ingested_at)
       VALUES ($1, '0', '', '', now(), '1-1', now())`,
      [stuck],
    )
    await calls.producer.store(turn(stuck, 0))
    await sleep(200)
    await calls.storeSettled(turn(other, 0))
    expect(await calls.ready()).toBe('200 ready')
    const unready = await until('it is unready', async () => {
      const answer = await calls.ready()
      return answer !== '200 ready' && answer
    })
    expect(unready).toBe('503 no progress: a batch is not done yet')
    await client.query('ROLLBACK')
    client.release()
    await calls.settled(stuck)
    expect(await calls.ready()).toBe('200 ready')
    await calls.stack.end()
  })

  test('that_has_become_read_only_is_left_for_the_one_that_has_not', async () => {
    const calls = await Calls.start()
    const sid = newSid()
    await calls.storeSettled(turn(sid, 0))
    // As a failover looks from here: the old connections are to a server that is a standby now.
    await calls.query(`ALTER DATABASE ${calls.database} SET default_transaction_read_only = on`)
    await calls.terminate()
    await calls.producer.store(turn(sid, 1), ended(sid, 2))
    const standby = '503 PostgreSQL: it is read-only: a standby, or a demoted primary'
    await until('it is unready and says why', async () => (await calls.ready()) === standby)
    await calls.query(`ALTER DATABASE ${calls.database} SET default_transaction_read_only = off`)
    await calls.settled(sid, 15_000)
    expect(await calls.session(sid)).toMatchObject({ complete: true, turn_count: 2 })
    expect(await calls.quarantined(sid)).toEqual([])
    expect(await calls.ready()).toBe('200 ready')
    await calls.stack.end()
  })

  test('whose_schema_does_not_fit_stops_the_sink_with_a_hint_until_it_is_mended', async () => {
    const calls = await Calls.start()
    const sids = seqs(20).map(newSid)
    await calls.query('ALTER TABLE call_transcript_turns RENAME TO elsewhere')
    await calls.producer.store(...sids.flatMap((sid) => [turn(sid, 0), ended(sid, 1)]))
    const hint = /^503 PostgreSQL: the schema does not fit this calltape: run calltape migrate .*does not exist/
    await until('it is unready with a hint', async () => hint.test(await calls.ready()))
    const tries = await calls.metric('retries_total')
    await sleep(2000)
    expect((await calls.metric('retries_total')) - tries).toBeLessThan(25) // it backs off, although PostgreSQL answers
    expect(await calls.ready()).toMatch(hint)
    await calls.query('ALTER TABLE elsewhere RENAME TO call_transcript_turns')
    await calls.idle(15_000)
    const [row] = await calls.query('SELECT count(*)::int AS n FROM call_sessions WHERE complete')
    expect(row).toEqual({ n: 20 })
    expect(await calls.query('SELECT FROM quarantined_events')).toEqual([])
    expect(await calls.ready()).toBe('200 ready')
    await calls.stack.end()
  })
})
