/** The configuration: defaults that serve, and errors that name the variable and what it wants. */
import { describe, expect, test } from 'vitest'
import { childEnvironment, type Environment, givenEnvironment, OperatorError, readConfig } from './config.js'

function errorOf(env: Environment): string {
  try {
    readConfig(env)
  } catch (error) {
    expect(error).toBeInstanceOf(OperatorError)
    return (error as Error).message
  }
  throw new Error(`taken: ${JSON.stringify(env)}`)
}

test('nothing_has_to_be_set', () => {
  expect(readConfig({})).toMatchObject({
    REDIS_URL: 'redis://127.0.0.1:6379',
    DATABASE_URL: 'postgres://127.0.0.1:5432/calltape',
    INGEST_PORT: 8080,
    SINK_METRICS_PORT: 9464,
    INGEST_TOKENS: [],
    ALLOW_UNAUTHENTICATED: false,
    DURABILITY: 'redis',
    PARTITIONS: 64,
    LOG_LEVEL: 'info',
  })
})

test('a_variable_that_is_set_to_nothing_is_not_set', () => {
  const names = Object.keys(readConfig({ INGEST_HOST: 'x', TLS_CERT_FILE: 'x', TLS_KEY_FILE: 'x' }))
  expect(names.length).toBeGreaterThan(15)
  expect(readConfig(Object.fromEntries(names.map((name) => [name, ''])))).toEqual(readConfig({}))
})

test('variables_of_others_do_not_matter', () => {
  expect(readConfig({ HOME: '/', PORT: 'x', INGEST: '1', ingest_port: '-1' })).toEqual(readConfig({}))
})

test('what_is_set_counts', () => {
  const env = {
    REDIS_URL: 'rediss://user:pass@redis.example:6380/3',
    DATABASE_URL: 'postgresql://u:p@db.example/calls?sslmode=require',
    INGEST_HOST: '::',
    DURABILITY: 'replicas:12',
    TLS_CERT_FILE: '/cert.pem',
    TLS_KEY_FILE: '/key.pem',
    LOG_LEVEL: 'silent',
  }
  expect(readConfig(env)).toMatchObject(env)
  expect(readConfig({ INGEST_PORT: '0', WINDOW: '1', ALLOW_UNAUTHENTICATED: 'true' })).toMatchObject({
    INGEST_PORT: 0,
    WINDOW: 1,
    ALLOW_UNAUTHENTICATED: true,
  })
  expect(readConfig({ ALLOW_UNAUTHENTICATED: 'false' }).ALLOW_UNAUTHENTICATED).toBe(false)
})

test('a_retention_that_is_off_is_none_and_not_the_default', () => {
  expect(readConfig({}).STREAM_RETENTION).toBe(7 * 24 * 3600)
  expect(readConfig({ STREAM_RETENTION: '0' }).STREAM_RETENTION).toBe(0)
  expect(readConfig({ STREAM_RETENTION: 'off' }).STREAM_RETENTION).toBeUndefined()
})

test('several_tokens_are_separated_by_commas', () => {
  expect(readConfig({ INGEST_TOKENS: 'one, two ,,three,' }).INGEST_TOKENS).toEqual(['one', 'two', 'three'])
  expect(readConfig({}).INGEST_TOKENS).toEqual([])
})

test.each(['INGEST_TOKENS', 'TWILIO_AUTH_TOKEN', 'EXOTEL_SECRET'])(
  '%s_that_holds_nothing_does_not_open_a_door',
  (name) => {
    expect(() => readConfig({ [name]: ' , ' })).toThrow(`${name}: wants a value`)
  },
)

test('several_Redis_URLs_are_a_Cluster', () => {
  const REDIS_URL = 'redis://a:1,redis://b:2/0, redis://c/'
  expect(readConfig({ REDIS_URL }).REDIS_URL).toBe(REDIS_URL)
})

test.each([
  ['call_sessions', { schema: 'public', table: 'call_sessions' }],
  ['Bot.Calls', { schema: 'bot', table: 'calls' }],
  ['"Bot"."a ""b"" c.d"', { schema: 'Bot', table: 'a "b" c.d' }],
])('LEGACY_CALL_SESSIONS_%s_is_read_as_SQL_reads_it', (name, table) => {
  expect(readConfig({ LEGACY_CALL_SESSIONS: name }).LEGACY_CALL_SESSIONS).toEqual(table)
})

describe('what_is_wrong_is_named', () => {
  test.each<[string, string, RegExp]>([
    ['REDIS_URL', 'localhost:6379', /redis:\/\/.*host:port.*rediss:\/\/.*Cluster/],
    ['REDIS_URL', 'http://localhost', /redis:\/\//],
    ['REDIS_URL', 'redis://', /redis:\/\//],
    ['REDIS_URL', 'redis://a:1,b:2', /redis:\/\//],
    ['REDIS_URL', 'redis://a:1,,redis://b:2', /redis:\/\//],
    ['REDIS_URL', 'redis://a:99999', /redis:\/\//],
    ['REDIS_URL', 'redis://a b', /redis:\/\//],
    ['REDIS_URL', 'redis://u:p%@h', /%25/],
    ['REDIS_URL', 'redis://a,rediss://b', /both redis:\/\/ and rediss:\/\//],
    ['REDIS_URL', 'redis://a,redis://b/1', /names a database/],
    ['REDIS_URL', 'redis://a/1,redis://b/1', /names a database/],
    ['REDIS_URL', 'redis://h,redis://u:1/2@h', /%2F/],
    ['DATABASE_URL', 'postgres://u:1?2@h/x', /%3F/],
    ['DATABASE_URL', 'mysql://localhost/x', /postgres:\/\//],
    ['DATABASE_URL', 'calltape', /postgres:\/\//],
    ['DATABASE_URL', 'postgres://a:99999/x', /postgres:\/\//],
    ...['pg_own', 'Calls', '1st', 'a-b', 'information_schema', 'x'.repeat(64)].map(
      (name) => ['DATABASE_SCHEMA', name, /wants a plain name/] as [string, string, RegExp],
    ),
    ...['a.b.c', 'a b', '.a', '"a', 'a;', '1a'].map(
      (name) => ['LEGACY_CALL_SESSIONS', name, /wants schema\.table/] as [string, string, RegExp],
    ),
    ['INGEST_PORT', '65536', /65535/],
    ['INGEST_PORT', '-1', /0/],
    ['INGEST_PORT', '80.5', /int/],
    ['INGEST_PORT', 'http', /wants an integer from 0 to 65535/],
    ['SINK_METRICS_PORT', '70000', /65535/],
    ['ALLOW_UNAUTHENTICATED', 'yes', /true.*false/],
    ['ALLOW_UNAUTHENTICATED', '1', /true.*false/],
    ['DURABILITY', 'disk', /redis, fsync or replicas:N/],
    ['DURABILITY', 'replicas', /replicas:N/],
    ['DURABILITY', 'replicas:0', /replicas:N/],
    ['DURABILITY', 'replicas:-1', /replicas:N/],
    ['DURABILITY', ' redis', /redis, fsync or replicas:N/],
    ['PARTITIONS', '0', /1/],
    ['PARTITIONS', '5000', /4096/],
    ['WINDOW', '0', /1/],
    ['MAX_MESSAGE_BYTES', '10', /1024/],
    ['MAX_BODY_BYTES', '1e12', /536870912/],
    ['MAX_QUEUE_BYTES', '1', /1048576/],
    ['SPOOL_MAX_BYTES', '1', /1048576/],
    ['IDLE_TIMEOUT', '0', /1/],
    ['DISCONNECT_GRACE', '-1', /0/],
    ['LOG_LEVEL', 'verbose', /info/],
  ])('%s=%s', (name, value, wants) => {
    const lines = errorOf({ [name]: value }).split('\n')
    expect(lines).toHaveLength(2)
    expect(lines[1]).toMatch(new RegExp(`^ *${name}: `))
    expect(lines[1]).toMatch(wants)
  })

  test('all_of_it_at_once', () => {
    const message = errorOf({ INGEST_PORT: 'x', DURABILITY: 'x', LOG_LEVEL: 'x', WINDOW: '5', TLS_KEY_FILE: 'x' })
    for (const name of ['INGEST_PORT', 'DURABILITY', 'LOG_LEVEL', 'TLS_CERT_FILE and TLS_KEY_FILE'])
      expect(message).toContain(`${name}: `)
    expect(message).not.toContain('WINDOW')
  })

  test('without_the_secrets_that_are_in_it', () => {
    expect(errorOf({ REDIS_URL: 'redis:/user:hunter2@host' })).not.toContain('hunter2')
    expect(errorOf({ DATABASE_URL: 'postgre://user:hunter2@host/db' })).not.toContain('hunter2')
  })

  test('TLS_needs_a_certificate_and_its_key', () => {
    for (const env of [{ TLS_CERT_FILE: 'cert.pem' }, { TLS_KEY_FILE: 'key.pem' }]) {
      expect(errorOf(env)).toMatch(/TLS_CERT_FILE and TLS_KEY_FILE: .*both or neither/)
    }
  })
})

test('only_our_variables_that_are_set_are_given_on', () => {
  const env = { REDIS_URL: 'redis://a', INGEST_PORT: 'wrong', WINDOW: '', HOME: '/', DATABASE_URL: undefined }
  expect(givenEnvironment(env)).toEqual({ REDIS_URL: 'redis://a', INGEST_PORT: 'wrong' })
})

test('a_child_gets_our_environment_with_overrides', () => {
  expect(childEnvironment({ INGEST_PORT: '1' })).toEqual({ ...process.env, INGEST_PORT: '1' })
})
