import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import { runner } from 'node-pg-migrate'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { OperatorError, readConfig } from '../shared/config.js'
import { PACKAGE_ROOT } from '../shared/package-root.js'
import type { Pool, PoolClient } from '../shared/postgres.js'
import { migrate, requireSchema } from '../shared/schema.js'
import { startSink } from '../sink/sink.js'
import { type Database, freshDatabase, freshRedis, inPublic, log, until } from './support/stores.js'

const MIGRATIONS = readdirSync(join(PACKAGE_ROOT, 'migrations')).map((file) => file.replace(/\.sql$/, ''))

const tablesOf = async (pool: Pool) =>
  (
    await pool.query(
      `SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' ORDER BY 1`,
    )
  ).rows.map((row) => row.relname as string)

const OURS = [
  ...['call_events', 'call_sessions', 'call_transcript_turns', 'calltape_migrations', 'legacy_held'],
  'quarantined_events',
]

describe('migrate', () => {
  let database: Database
  beforeEach(async () => {
    database = await freshDatabase(false)
  })
  afterEach(() => database.drop())

  test('an_empty_database_and_once_more', async () => {
    expect(await tablesOf(database.pool)).toEqual([])
    expect(await migrate(database.config)).toEqual(MIGRATIONS)
    expect(await tablesOf(database.pool)).toEqual(OURS)
    await database.pool.query(`INSERT INTO call_sessions (call_sid) VALUES ('kept')`)
    expect(await migrate(database.config)).toEqual([])
    expect((await database.pool.query('SELECT call_sid FROM call_sessions')).rows).toEqual([{ call_sid: 'kept' }])
  })

  test('from_four_places_at_once_runs_each_migration_once', async () => {
    const done = await Promise.all([1, 2, 3, 4].map(() => migrate(database.config)))
    expect(done.flat().sort()).toEqual(MIGRATIONS)
    expect(await tablesOf(database.pool)).toEqual(OURS)
    const { rows } = await database.pool.query('SELECT name FROM calltape_migrations')
    expect(rows.map((row) => row.name)).toEqual(MIGRATIONS)
  })

  test('of_a_newer_database_refuses_and_changes_nothing', async () => {
    await migrate(database.config)
    await database.pool.query(`INSERT INTO calltape_migrations (name, run_on) VALUES ('9999_from_the_future', now())`)
    const refusal = await migrate(database.config).catch((error: Error) => error)
    expect(refusal).toBeInstanceOf(OperatorError)
    expect((refusal as Error).message).toMatch(/^DATABASE_URL: .*newer.*9999_from_the_future.*Update calltape/)
  })

  test('of_a_database_that_is_not_there_says_which', async () => {
    const nowhere = 'postgres://127.0.0.1:1/calltape'
    const refusals = [nowhere, database.url.replace(/\/\w+$/, '/no_such_database')].map((url) =>
      migrate(inPublic(url)).catch((error: Error) => error),
    )
    const [refused, unknown] = (await Promise.all(refusals)) as [Error, Error]
    expect(refused).toBeInstanceOf(OperatorError)
    expect(refused.message).toMatch(/^DATABASE_URL: no PostgreSQL answers at 127\.0\.0\.1:1\/calltape: .*ECONNREFUSED/)
    expect(unknown.message).toMatch(/^DATABASE_URL: .*\/no_such_database: .*does not exist/)
  })

  /** Takes the last `count` of them back. */
  async function down(count: number): Promise<void> {
    const client = await database.pool.connect()
    const logger = { debug() {}, info() {}, warn() {}, error() {} }
    const dir = join(PACKAGE_ROOT, 'migrations')
    await runner({
      dbClient: client,
      dir,
      migrationsTable: 'calltape_migrations',
      direction: 'down',
      count,
      logger,
    })
    client.release()
  }

  describe('of_tables_that_somebody_reads_for_long', () => {
    let reader: PoolClient
    beforeEach(async () => {
      await migrate(database.config)
      await down(1)
      reader = await database.pool.connect()
      await reader.query(`SET application_name = 'a-report'; BEGIN; SELECT FROM call_sessions`)
    })
    afterEach(() => reader.release(true))

    test('waits_for_them_and_keeps_nobody_from_writing_meanwhile', async () => {
      const said: string[] = []
      const migrated = migrate(database.config, (line) => said.push(line), { lockMs: 300, pauseMs: 300, forMs: 60_000 })
      const waits = async () => {
        const sql = `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`
        return (await database.pool.query(sql)).rows.length > 0
      }
      for (let n = 0; n < 3; n++) {
        await until('it waits', waits)
        await database.pool.query(
          `SET statement_timeout = '10s'; INSERT INTO call_sessions (call_sid) VALUES ('CA${n}')`,
        )
      }
      await reader.query('COMMIT')
      expect(await migrated).toEqual(MIGRATIONS.slice(-1))
      expect(said).toEqual([
        expect.stringMatching(
          /^waits: calltape's tables are in use, by the transaction of process \d+ \(a-report, since .*Z\); sinks go on meanwhile$/,
        ),
      ])
    })

    test('gives_up_after_a_while_and_says_who_it_was', async () => {
      const refusal = await migrate(database.config, () => {}, { lockMs: 100, pauseMs: 100, forMs: 500 }).catch(
        (error: Error) => error,
      )
      expect(refusal).toBeInstanceOf(OperatorError)
      expect((refusal as Error).message).toMatch(/^DATABASE_URL: calltape's tables are in use, by .*a-report.*: end it/)
      const { rows } = await database.pool.query('SELECT name FROM calltape_migrations')
      expect(rows.map((row) => row.name)).toEqual(MIGRATIONS.slice(0, -1))
    })
  })

  test('down_leaves_nothing', async () => {
    await migrate(database.config)
    await down(999)
    await database.pool.query('DROP TABLE calltape_migrations')
    const { rows } = await database.pool.query(`
      SELECT 'relation ' || relname AS left FROM pg_class WHERE relnamespace = 'public'::regnamespace
      UNION ALL SELECT 'type ' || typname FROM pg_type WHERE typnamespace = 'public'::regnamespace
      UNION ALL SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace`)
    expect(rows).toEqual([])
    expect(await migrate(database.config)).toEqual(MIGRATIONS)
  })
})

describe('a_sink_refuses', () => {
  let database: Database
  beforeEach(async () => {
    database = await freshDatabase(false)
  })
  afterEach(() => database.drop())

  /** What it says. */
  async function refusal(): Promise<string> {
    const redis = await freshRedis()
    const environment = { REDIS_URL: redis.url, DATABASE_URL: database.url, SINK_METRICS_PORT: '0' }
    const error = await startSink(readConfig(environment), log).then(
      () => undefined,
      (reason: Error) => reason,
    )
    await redis.drop()
    expect(error).toBeInstanceOf(OperatorError)
    return error!.message
  }

  test('a_database_that_was_not_migrated_and_says_what_to_do', async () => {
    expect(await refusal()).toMatch(/^DATABASE_URL: .*older.*missing: 0001_calls_and_turns.*Run: calltape migrate$/)
    expect(await tablesOf(database.pool)).toEqual([])
  })

  test('a_newer_database_and_says_what_to_do', async () => {
    await migrate(database.config)
    await database.pool.query(`INSERT INTO calltape_migrations (name, run_on) VALUES ('9999_from_the_future', now())`)
    expect(await refusal()).toMatch(/^DATABASE_URL: .*newer.*9999_from_the_future.*Update calltape\.$/)
  })

  test('a_database_that_is_not_there_and_names_it', async () => {
    const { url } = database
    database.url = url.replace(/\/\w+$/, '/no_such_database')
    expect(await refusal()).toMatch(
      /^DATABASE_URL: no PostgreSQL answers at 127\.0\.0\.1:\d+\/no_such_database: .*does not exist/,
    )
    database.url = url
  })
})

describe('the_contract', () => {
  let database: Database
  beforeAll(async () => {
    database = await freshDatabase()
  })
  afterAll(() => database.drop())

  const columnsOf = async (table: string) =>
    Object.fromEntries(
      (
        await database.pool.query(
          `SELECT column_name, data_type, is_nullable, column_default FROM information_schema.columns
           WHERE table_schema = 'public' AND table_name = $1`,
          [table],
        )
      ).rows.map((row) => [
        row.column_name,
        [row.data_type, row.is_nullable === 'NO' && 'not null', row.column_default].filter(Boolean).join(' '),
      ]),
    )

  test('the_schema_fits', async () => {
    await expect(requireSchema(database.pool, database.config)).resolves.toBeUndefined()
  })

  test('call_transcript_turns', async () => {
    expect(await columnsOf('call_transcript_turns')).toEqual({
      call_sid: 'text not null',
      turn_id: 'text not null',
      seq: 'integer',
      speaker: 'text not null',
      text: 'text not null',
      spoken_at: 'timestamp with time zone not null',
      started_at: 'timestamp with time zone',
      ended_at: 'timestamp with time zone',
      confidence: 'real',
      language: 'text',
      interrupted: 'boolean',
      meta: 'jsonb',
      stream_id: 'text not null',
      ingested_at: 'timestamp with time zone not null',
      persisted_at: 'timestamp with time zone not null now()',
    })
  })

  test('call_sessions', async () => {
    expect(await columnsOf('call_sessions')).toEqual({
      call_sid: 'text not null',
      provider: 'text',
      direction: 'text',
      from_number: 'text',
      to_number: 'text',
      status: 'text',
      outcome: 'text',
      initiated_at: 'timestamp with time zone',
      answered_at: 'timestamp with time zone',
      ended_at: 'timestamp with time zone',
      duration_seconds: 'integer',
      recording_url: 'text',
      conversation_stage: 'text',
      collected_data: 'jsonb',
      objections_encountered: 'jsonb',
      full_transcript: 'jsonb',
      turn_count: 'integer',
      expected_turns: 'integer',
      complete: 'boolean',
      end_reason: 'text',
      meta: 'jsonb',
      last_event_at: 'timestamp with time zone',
      finalized_at: 'timestamp with time zone',
    })
  })

  test('quarantined_events_hold_what_it_was_where_and_why_and_when', async () => {
    expect(await columnsOf('quarantined_events')).toMatchObject({
      stream_key: 'text not null',
      entry_id: 'text not null',
      reason: 'text not null',
      raw: 'bytea not null',
      quarantined_at: 'timestamp with time zone not null now()',
    })
  })

  test('primary_keys_and_their_collation', async () => {
    const { rows } = await database.pool.query(`
      SELECT i.indrelid::regclass::text AS name, string_agg(a.attname, ', ' ORDER BY k.place) AS key,
        string_agg(DISTINCT c.collname, ', ') AS compared_as
      FROM pg_index i
      CROSS JOIN LATERAL unnest(i.indkey, i.indcollation) WITH ORDINALITY AS k(attnum, compared_as, place)
      JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
      LEFT JOIN pg_collation c ON c.oid = k.compared_as
      WHERE i.indisprimary AND i.indrelid::regclass::text LIKE 'call\\_%' GROUP BY i.indrelid ORDER BY 1`)
    expect(rows).toEqual([
      { name: 'call_events', key: 'call_sid, event_id', compared_as: 'C' },
      { name: 'call_sessions', key: 'call_sid', compared_as: 'C' },
      { name: 'call_transcript_turns', key: 'call_sid, turn_id', compared_as: 'C' },
    ])
  })

  test('the_same_entry_is_quarantined_once', async () => {
    const insert = `INSERT INTO quarantined_events (stream_key, entry_id, reason, raw) VALUES ('k', '1-1', '', '')`
    await database.pool.query(insert)
    await expect(database.pool.query(insert)).rejects.toMatchObject({ code: '23505' })
  })
})
