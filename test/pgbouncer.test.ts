/** PostgreSQL behind a pooler that lends a connection for each transaction, and fewer of them than there are clients. */
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, inject, onTestFinished, test } from 'vitest'
import type { CallEvent } from '../shared/events.js'
import { createPool } from '../shared/postgres.js'
import { migrate, requireReachable, requireSchema } from '../shared/schema.js'
import { Calls, ended, newSid, seqs } from './support/calls.js'
import { findPgBouncer, PgBouncer } from './support/pgbouncer.js'
import { calltape } from './support/program.js'
import { type Database, freshDatabase, inPublic, startTestStack } from './support/stores.js'
import { turn } from './support/streams.js'

const command = await findPgBouncer()
const TURNS = 30

const through = (bouncer: PgBouncer, { url }: Database) =>
  ({ DATABASE_URL: bouncer.in(url), DATABASE_POOLER: 'transaction' }) as const
const call = (sid: string): CallEvent[] => [
  ...seqs(TURNS).map((seq) => turn(sid, seq)),
  { ...ended(sid, TURNS), id: 'end' },
]

async function messageOf(work: Promise<unknown>): Promise<string> {
  return work.then(
    () => 'nothing was refused',
    (error: Error) => error.message,
  )
}

describe.skipIf(!command)('through_pgbouncer', () => {
  let bouncer: PgBouncer
  beforeAll(async () => {
    bouncer = await PgBouncer.start(command!, inject('databaseUrl'))
  })
  afterAll(() => bouncer.stop())

  /** Two sinks of three workers each on a fresh database: eight connections, of which PostgreSQL has two. */
  async function pooledCalls(environment: Record<string, string> = {}): Promise<{ calls: Calls; database: Database }> {
    const database = await freshDatabase()
    const sinks = { SINK_WORKERS: '3', BATCH_MAX_ROWS: '200' }
    const stack = await startTestStack({ ...through(bouncer, database), ...sinks, ...environment }, 2)
    onTestFinished(async () => {
      await stack.end()
      await database.drop()
    })
    return { calls: new Calls({ ...stack, database }), database }
  }

  const otherClient = ({ url }: Database) =>
    createPool({ ...inPublic(bouncer.in(url)), DATABASE_POOLER: 'transaction' }, 'other', 2)

  /** Each call once, whole, and nothing else. */
  async function expectAll(calls: Calls, sids: string[]): Promise<void> {
    const counts = `SELECT (SELECT count(*)::int FROM call_sessions WHERE complete AND turn_count = ${TURNS}) AS complete,
      (SELECT count(*)::int FROM call_transcript_turns) AS turns, (SELECT count(*)::int FROM call_events) AS events,
      (SELECT count(*)::int FROM quarantined_events) AS quarantined`
    expect((await calls.query(counts))[0]).toEqual({
      complete: sids.length,
      turns: sids.length * TURNS,
      events: sids.length,
      quarantined: 0,
    })
  }

  async function expectNothingLeft(database: Database): Promise<void> {
    // Two other clients of the same pooler at once have both of its connections; after COMMIT, as they are without settings of ours.
    const other = otherClient(database)
    onTestFinished(() => other.end())
    const left = `COMMIT; SELECT current_setting('search_path') AS path, current_setting('statement_timeout') AS timeout,
      (SELECT count(*)::int FROM pg_prepared_statements) AS prepared, to_regclass('pg_temp.staged_turns') AS staged,
      (SELECT count(*)::int FROM pg_locks WHERE locktype = 'advisory') AS locks`
    const clients = [await other.connect(), await other.connect()]
    for (const client of clients) await client.query('BEGIN')
    const found = await Promise.all(clients.map((client) => client.query(left)))
    for (const client of clients) client.release()
    const nothing = { path: '"$user", public', timeout: '0', prepared: 0, staged: null, locks: 0 }
    expect((found as unknown as [unknown, { rows: unknown[] }][]).map(([, { rows }]) => rows)).toEqual([
      [nothing],
      [nothing],
    ])
  }

  test('everything_works_and_leaves_nothing_on_the_connections_it_was_lent', async () => {
    const { calls, database } = await pooledCalls()
    const sids = seqs(40).map(newSid)
    const events = sids.flatMap(call)
    await calls.producer.store(...events.slice(0, events.length / 2))
    await Promise.all([calls.producer.store(...events), calls.producer.store(...events.toReversed())])
    await calls.idle()
    await expectAll(calls, sids)
    const staged = await Promise.all(calls.stack.sinks.map((sink) => calls.metric('staged_batches_total', sink)))
    expect(Math.max(...staged)).toBeGreaterThan(0)
    for (const sink of calls.stack.sinks) expect(await calls.ready(sink)).toBe('200 ready')

    const environment = { ...through(bouncer, database), REDIS_URL: calls.stack.redis.url }
    for (const [args, said] of [
      [['verify'], /Everything is there/],
      [['replay', '--all', '--schema', 'rebuilt'], /./], // migrates and compares, too; exit code 0 says that they are the same
      [['show', sids[0]!], /turn_count +30/],
      [['export', sids[0]!, '--format', 'json'], /"turns"/],
      [['quarantine', 'list'], /./],
      [['erase', sids[0]!], /./],
      [['migrate'], /./],
    ] as const) {
      const { code, out, err } = await calltape([...args], environment)
      expect({ args, code, err }).toEqual({ args, code: 0, err: '' })
      expect(out).toMatch(said)
    }

    await expectNothingLeft(database)
  })

  test('what_others_leave_on_its_connections_does_no_harm', async () => {
    const { calls, database } = await pooledCalls()
    const [first, second] = [newSid(), newSid()]
    await calls.storeSettled(...call(first))
    const other = otherClient(database)
    onTestFinished(() => other.end())
    const client = await other.connect()
    for (let i = 0; i < 6; i++) {
      await client.query('BEGIN')
      await client.query(`COMMIT; SET search_path = pg_catalog; SET TimeZone = 'Asia/Kolkata';
        CREATE TEMP TABLE IF NOT EXISTS staged_turns (nothing int); DEALLOCATE ALL`)
    }
    client.release()
    await calls.storeSettled(...call(first), ...call(second))
    await calls.idle()
    await expectAll(calls, [first, second])
    const [session] = await calls.query(
      'SELECT full_transcript->0->>$2 AS at FROM call_sessions WHERE call_sid = $1',
      second,
      'timestamp',
    )
    expect(session!.at).toMatch(/\+00:00$/)
  })

  test('pgbouncer_killed_under_load_again_and_again_loses_and_doubles_nothing', async () => {
    const { calls } = await pooledCalls()
    const sids = seqs(60).map(newSid)
    const loading = (async () => {
      for (const seq of seqs(TURNS)) {
        await calls.producer.store(...sids.map((sid) => turn(sid, seq)))
        await sleep(50)
      }
      await calls.producer.store(...sids.map((sid) => ended(sid, TURNS)))
    })()
    for (let i = 0; i < 4; i++) {
      await sleep(200)
      await bouncer.kill()
      await sleep(100)
      await bouncer.restart()
    }
    await loading
    await calls.idle(20_000)
    const retries = await Promise.all(calls.stack.sinks.map((sink) => calls.metric('retries_total', sink)))
    expect(Math.max(...retries)).toBeGreaterThan(0)
    await expectAll(calls, sids)
  })

  test('migrations_run_once_although_two_begin_at_once', async () => {
    const database = await freshDatabase(false)
    onTestFinished(() => database.drop())
    const target = { ...through(bouncer, database), DATABASE_SCHEMA: 'calltape' }
    const done = await Promise.all([migrate(target), migrate(target)])
    expect(done.map((names) => names.length > 0).toSorted()).toEqual([false, true])
    expect(await migrate(target)).toEqual([])
    await expectNothingLeft(database)
  })
})

describe.skipIf(!command)('without_DATABASE_POOLER', () => {
  test('a_pooler_that_refuses_or_drops_settings_is_named_with_what_to_set', async () => {
    const database = await freshDatabase()
    onTestFinished(() => database.drop())
    const refusing = await PgBouncer.start(command!, inject('databaseUrl'))
    const dropping = await PgBouncer.start(command!, inject('databaseUrl'), { ignore_startup_parameters: 'options' })
    const check = async (bouncer: PgBouncer) => {
      const config = inPublic(bouncer.in(database.url))
      const pool = createPool(config, 'test', 1)
      const message = await messageOf(requireReachable(pool, config).then(() => requireSchema(pool, config)))
      await pool.end()
      return message
    }
    onTestFinished(async () => {
      await Promise.all([refusing.stop(), dropping.stop()])
    })
    expect(await check(refusing)).toMatch(
      /^DATABASE_URL: no PostgreSQL answers .*options, a pooler: set DATABASE_POOLER=transaction$/,
    )
    expect(await check(dropping)).toMatch(/^DATABASE_SCHEMA: .*a pooler .*set DATABASE_POOLER=transaction$/)
    // The names are right all the same; but statements prepared on one connection would be looked for on another.
    const { pathname } = new URL(database.url)
    await database.pool.query(`ALTER DATABASE ${pathname.slice(1)} SET search_path = public`)
    await dropping.kill()
    await dropping.restart()
    expect(await check(dropping)).toMatch(/^DATABASE_URL: .*a pooler drops them, set DATABASE_POOLER=transaction$/)
  })
})
