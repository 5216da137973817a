/** DATABASE_SCHEMA: calltape's tables in a schema of their own, beside another application's; and the refusal to clash with it. */
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { OperatorError, readConfig } from '../shared/config.js'
import { createPool } from '../shared/postgres.js'
import { migrate, requireSchema } from '../shared/schema.js'
import { startSink } from '../sink/sink.js'
import { botDatabase, botTables, SCHEMA } from './support/bot-database.js'
import { Calls, ended, newSid, type Row, seqs } from './support/calls.js'
import { calltape } from './support/program.js'
import { type Database, freshDatabase, freshRedis, log, startTestStack } from './support/stores.js'
import { turn } from './support/streams.js'

/** All that there is in a schema, by kind, with what it is made of and, of tables, what is in them. */
async function contentsOf({ pool }: Database, schema = 'public'): Promise<unknown> {
  const { rows } = await pool.query<Row>(
    `SELECT c.relname, c.relkind, c.oid, c.relfilenode, c.reltuples >= 0 AS analyzed, c.xmin::text,
       (SELECT json_agg(row(attname, atttypid, atttypmod, attnotnull) ORDER BY attnum) FROM pg_attribute
        WHERE attrelid = c.oid AND attnum > 0) AS columns,
       (SELECT json_agg(pg_get_constraintdef(oid) ORDER BY oid) FROM pg_constraint WHERE conrelid = c.oid) AS constraints,
       CASE WHEN relkind = 'r' THEN query_to_xml(format('SELECT xmin, ctid, * FROM %I.%I t', $1::text, relname), true, true, '')::text END AS rows
     FROM pg_class c WHERE relnamespace = to_regnamespace($1) AND relkind <> 't' ORDER BY relname`,
    [schema],
  )
  const types = `SELECT typname FROM pg_type WHERE typnamespace = to_regnamespace($1)
    UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = to_regnamespace($1) ORDER BY 1`
  return [rows.map(({ analyzed, ...row }) => row), (await pool.query(types, [schema])).rows]
}

const messageOf = (attempt: Promise<unknown>): Promise<string> =>
  attempt.then(
    () => 'no error',
    (error: Error) => {
      expect(error).toBeInstanceOf(OperatorError)
      return error.message
    },
  )

test('calls_go_all_the_way_beside_another_call_sessions_that_stays_as_it_is', { timeout: 60_000 }, async () => {
  const [redis, database] = await Promise.all([freshRedis(), botDatabase()])
  await database.pool.query(
    `INSERT INTO public.call_sessions (call_sid, lead_id, status) VALUES ('both', 1, 'initiated')`,
  )
  const before = await contentsOf(database)
  const settings = { REDIS_URL: redis.url, ...database.config }
  const stack = await startTestStack(settings)
  const calls = new Calls({ ...stack, redis, database })
  await calls.storeSettled(...seqs(20).map((seq) => turn('both', seq)), ended('both', 20))
  await calls.storeSettled(turn('both', 3), turn('both', 20)) // one sent again: through staging
  const bad = newSid()
  await calls.foreign(bad, [['e', 'no JSON']])
  await calls.settled(bad)
  expect(await calls.session('both')).toMatchObject({ status: 'completed', turn_count: 21 })
  expect(await calls.metric('staged_batches_total')).toBeGreaterThan(0)

  const run = (...args: string[]) => calltape(args, { ...settings, DATABASE_URL: database.url })
  const shown = JSON.parse((await run('show', 'both', '--json')).out) as { session: Row; turns: unknown[] }
  expect(shown.session).toMatchObject({ turn_count: 21, provider: null })
  expect(shown.turns).toHaveLength(21)
  expect(await run('verify', '--json')).toMatchObject({ code: 0, out: expect.stringMatching(/"turns": 21,/) })
  expect((await run('quarantine', 'list', '--json')).out).toMatch(`"call_sid": "${bad}"`)
  expect(await run('migrate')).toMatchObject({ code: 0, out: 'the schema is up to date\n' })

  expect(await contentsOf(database)).toEqual(before)
  await stack.end()
  await Promise.all([redis.drop(), database.drop()])
})

describe('migrate', () => {
  let database: Database
  beforeEach(async () => {
    database = await freshDatabase(false)
  })
  afterEach(() => database.drop())

  const own = () => ({ ...database.config, DATABASE_SCHEMA: SCHEMA })

  test.for([
    ['CREATE TABLE call_sessions (id int)', 'call_sessions (table)'],
    [
      'CREATE TABLE quarantined_events (id int); CREATE TABLE call_events ()',
      'call_events (table), quarantined_events (table)',
    ],
    ['CREATE VIEW call_sessions AS SELECT 1 AS call_sid', 'call_sessions (view)'],
    ['CREATE MATERIALIZED VIEW call_sessions AS SELECT 1 AS call_sid', 'call_sessions (materialized view)'],
    ['CREATE SEQUENCE call_events', 'call_events (sequence)'],
    [`CREATE TYPE call_events AS ENUM ('a')`, 'call_events (type)'],
    ['CREATE TYPE call_sessions AS (a int)', 'call_sessions (type)'],
    ['CREATE TABLE t (a int); CREATE INDEX call_sessions_live ON t (a)', 'call_sessions_live (index)'],
    ['CREATE VIEW calltape_migrations AS SELECT now() AS run_on, 1 AS name', 'calltape_migrations (view)'],
    ['CREATE TABLE calltape_migrations (version int)', 'calltape_migrations (table)'],
  ] as const)('%s_is_refused_and_nothing_is_touched', async ([sql, names]) => {
    await database.pool.query(sql)
    const before = await contentsOf(database)
    const message = await messageOf(migrate(database.config))
    expect(message).toContain(`DATABASE_SCHEMA: schema public has ${names}, which `)
    expect(message).toMatch(/not calltape's.*set DATABASE_SCHEMA=calltape to put/)
    expect(await contentsOf(database)).toEqual(before)
    await migrate(own())
    expect(await contentsOf(database)).toEqual(before)
  })

  test('what_is_not_migrated_but_another_applications_is_called_so_by_every_command', { timeout: 60_000 }, async () => {
    await database.pool.query(botTables())
    const redis = await freshRedis()
    const settings = { REDIS_URL: redis.url, DATABASE_URL: database.url, SINK_METRICS_PORT: '0' }
    const refusal =
      /DATABASE_SCHEMA: schema public has call_sessions \(table\), which is not calltape's.*DATABASE_SCHEMA=calltape/
    expect(await messageOf(startSink(readConfig(settings), log))).toMatch(refusal)
    for (const args of [['verify'], ['quarantine', 'list'], ['migrate'], ['show', 'x']]) {
      expect(await calltape(args, settings), args.join(' ')).toMatchObject({
        code: 2,
        err: expect.stringMatching(refusal),
      })
    }
    await redis.drop()
  })

  test('that_fails_half_way_leaves_nothing', async () => {
    await database.pool.query(`
      CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not today'; END $$;
      CREATE EVENT TRIGGER refuse ON ddl_command_start WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION refuse()`)
    const before = await contentsOf(database)
    for (const config of [database.config, own()]) await expect(migrate(config)).rejects.toThrow('not today')
    expect(await contentsOf(database)).toEqual(before)
    expect((await database.pool.query('SELECT FROM pg_namespace WHERE nspname = $1', [SCHEMA])).rows).toEqual([])
    await database.pool.query('DROP EVENT TRIGGER refuse')
    expect((await migrate(own())).length).toBeGreaterThan(1)
  })

  test('from_four_places_at_once_makes_one_schema', async () => {
    const done = await Promise.all([1, 2, 3, 4].map(() => migrate(own())))
    expect(done.map((names) => names.length > 0).sort()).toEqual([false, false, false, true])
  })

  test('beside_another_applications_migrations_of_the_same_tool_neither_waits_nor_makes_them_fail', async () => {
    const client = await database.pool.connect()
    const lock = '7241865325823964' // that of node-pg-migrate
    await client.query(`SELECT pg_advisory_lock(${lock})`)
    await migrate(own())
    await client.query('SELECT pg_advisory_unlock_all()')
    client.release()
    await database.pool.query('CREATE TABLE pgmigrations (id serial PRIMARY KEY, name varchar(255), run_on timestamp)')
    await database.pool.query(`INSERT INTO pgmigrations (name, run_on) VALUES ('0001_calls_and_turns', now())`)
    expect((await migrate(database.config)).length).toBeGreaterThan(1) // theirs are not taken for ours
  })

  test.for([
    ['LOGIN', 'CREATE TABLE call_sessions (id int); CREATE VIEW call_events AS SELECT 1 AS call_sid', true],
    ['LOGIN', 'CREATE TABLE calls (id int); CREATE TABLE t (a int); CREATE INDEX call_sessions_live ON t (a)', false],
    ['NOLOGIN', 'CREATE TABLE call_sessions (id int)', false],
  ] as const)('in_a_schema_named_like_a_role_with_%s_beside_%s_warns_%s', async ([login, sql, warns]) => {
    const role = `calltape_namesake_${process.pid}`
    await database.pool.query(`CREATE ROLE ${role} ${login}; ${sql}`)
    const config = { ...database.config, DATABASE_SCHEMA: role }
    const said: string[] = []
    const done = await migrate(config, (line) => said.push(line))
    await migrate(config, (line) => said.push(line)) // once
    await migrate({ ...config, DATABASE_SCHEMA: 'another' }, (line) => said.push(line))
    await database.pool.query(`DROP ROLE ${role}`)
    expect(done.length).toBeGreaterThan(1)
    const warning = `DATABASE_SCHEMA: there is a role ${role}, too. Once it may use schema ${role}, it finds calltape's tables there before public.call_events, public.call_sessions. `
    expect(said).toEqual(warns ? [expect.stringContaining(warning)] : [])
  })

  test('by_a_user_who_may_not_create_schemas_wants_one_that_is_there', async () => {
    const role = `calltape_test_${process.pid}`
    await database.pool.query(`CREATE ROLE ${role} LOGIN PASSWORD 'calltape'`)
    const url = new URL(database.url)
    url.username = role
    url.password = 'calltape'
    const config = { DATABASE_URL: url.href, DATABASE_SCHEMA: SCHEMA }
    const lacking = await messageOf(migrate(config))
    await database.pool.query(`CREATE SCHEMA ${SCHEMA}`)
    const unseen = await messageOf(migrate(config))
    await database.pool.query(`GRANT USAGE ON SCHEMA ${SCHEMA} TO ${role}`)
    const unmade = await messageOf(migrate(config))
    await database.pool.query(`GRANT CREATE ON SCHEMA ${SCHEMA} TO ${role}`)
    const done = await migrate(config)
    await database.pool.query(`REASSIGN OWNED BY ${role} TO CURRENT_USER; DROP OWNED BY ${role}; DROP ROLE ${role}`)
    expect(lacking).toMatch(/^DATABASE_URL: its user lacks a privilege: permission denied for database/)
    expect(unseen).toMatch(/^DATABASE_SCHEMA: .*USAGE on schema calltape/)
    expect(unmade).toMatch(/^DATABASE_SCHEMA: .*CREATE on schema calltape/)
    expect(done.length).toBeGreaterThan(1)
  })
})

describe('an_unqualified_name', () => {
  let database: Database
  beforeEach(async () => {
    database = await botDatabase()
  })
  afterEach(() => database.drop())

  test('is_never_anothers_table_although_ours_is_gone', async () => {
    await database.pool.query('DROP TABLE call_sessions')
    await expect(database.pool.query('SELECT FROM call_sessions')).rejects.toMatchObject({ code: '42P01' })
  })

  test('stays_ours_although_DATABASE_URL_has_options_of_its_own', async () => {
    const url = new URL(database.url)
    url.searchParams.set('options', '-c search_path=public -c work_mem=3MB')
    const pool = createPool({ ...database.config, DATABASE_URL: url.href }, 'test', 1)
    const { rows } = await pool.query(
      `SELECT current_setting('search_path') AS path, current_setting('work_mem') AS memory`,
    )
    await pool.end()
    expect(rows).toEqual([{ path: SCHEMA, memory: '3MB' }])
  })

  test('of_connections_that_do_not_get_their_search_path_is_refused', async () => {
    const pool = createPool({ ...database.config, DATABASE_SCHEMA: 'public' }, 'test', 1) // as through such a pooler
    const message = await messageOf(requireSchema(pool, database.config))
    await pool.end()
    expect(message).toMatch(/^DATABASE_SCHEMA: connections ask for the search_path calltape and get public: a pooler/)
  })
})
