/** `calltape config`: says what is in effect and where it comes from, and never tells a secret, however it was entered. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { type Environment, readConfig } from '../shared/config.js'
import { readPackageFile } from '../shared/package-root.js'
import { SETTING_NAMES, SETTINGS } from '../shared/settings.js'
import { changedSettings } from '../shared/settings-shown.js'
import { calltape } from '../test/support/program.js'
import { configurationTable, withTable } from './config/table.js'
import { describe as describeReport, effectiveSettings } from './config.js'

const effective = (given: Environment, stack: Environment = {}, others: string[] = []) =>
  effectiveSettings(given, stack, others)
const settingsOf = (given: Environment, stack: Environment = {}) =>
  Object.fromEntries(effective(given, stack).settings.map(({ name, value, source }) => [name, [value, source]]))
const warningsOf = (given: Environment, stack: Environment = {}) => effective(given, stack).warnings

test('README_has_the_settings_as_they_are (if this fails: npm run docs)', () => {
  const readme = readPackageFile('README.md')
  expect(readme).toBe(withTable(readme))
  for (const name of SETTING_NAMES) {
    expect({ name, isListed: readme.includes(`\n| \`${name}\` |`) }).toEqual({
      name,
      isListed: !SETTINGS[name].isInternal,
    })
  }
})

test('a_document_without_a_place_for_the_table_is_an_error', () => {
  expect(() => withTable('<!-- /config --> <!-- config -->')).toThrow('<!-- config -->')
})

test('ranges_and_defaults_are_in_the_table_with_their_units', () => {
  const rows = configurationTable().split('\n')
  const row = (name: string) => rows.find((line) => line.startsWith(`| \`${name}\``))
  expect(row('WINDOW')).toContain('| `1024` | 1 – 1000000 |')
  expect(row('IDLE_TIMEOUT')).toContain('| `1800` s (30 min) | seconds: 1 s – 30 d |')
  expect(row('MAX_BODY_BYTES')).toContain('| `16777216` B (16 MiB) | bytes: 1 KiB – 512 MiB |')
  expect(row('STREAM_RETENTION')).toContain('| `604800` s (7 d) | seconds: 0 s – 3660 d, `off` |')
  expect(row('INGEST_TOKENS')).toContain('| none |')
  expect(new Set(rows.map((line) => line.replaceAll('\\|', '').split('|').length))).toEqual(new Set([7]))
})

describe('where_a_value_comes_from', () => {
  test('the_environment_goes_before_a_running_up_and_that_before_the_default', () => {
    const stack = { REDIS_URL: 'redis://127.0.0.1:63790', DATABASE_SCHEMA: 'calls', LEGACY_CALL_SESSIONS: undefined }
    expect(settingsOf({ REDIS_URL: 'redis://other', PARTITIONS: '16' }, stack)).toMatchObject({
      REDIS_URL: ['redis://other', 'environment'],
      DATABASE_SCHEMA: ['calls', 'up'],
      LEGACY_CALL_SESSIONS: [null, 'default'],
      PARTITIONS: [16, 'environment'],
      WINDOW: [1024, 'default'],
    })
  })

  test('values_are_what_was_read_and_not_how_it_was_written', () => {
    const given = {
      WINDOW: '0x10',
      STREAM_RETENTION: 'off',
      ALLOW_UNAUTHENTICATED: 'true',
      LEGACY_CALL_SESSIONS: 'Bot.x',
    }
    expect(settingsOf(given)).toMatchObject({
      WINDOW: [16, 'environment'],
      STREAM_RETENTION: ['off', 'environment'],
      ALLOW_UNAUTHENTICATED: [true, 'environment'],
      LEGACY_CALL_SESSIONS: ['Bot.x', 'environment'],
    })
  })

  test('what_only_tests_set_is_shown_only_when_it_is_set', () => {
    expect(settingsOf({})).not.toHaveProperty('CRASH_AT')
    expect(settingsOf({ CRASH_AT: 'decode' })).toHaveProperty('CRASH_AT', ['decode', 'environment'])
  })
})

test.each([
  ['redis://user:pass@host:1/2', 'redis://user:•••@host:1/2'],
  ['redis://:pass@host', 'redis://:•••@host'],
  ['redis://pass@host', 'redis://•••@host'],
  ['rediss://a:p@h1:1, rediss://h2,rediss://:q@h3:3', 'rediss://a:•••@h1:1,rediss://h2,rediss://:•••@h3:3'],
  ['redis://host/3?family=6&password=pass&pass=word', 'redis://host/3?family=6&password=•••&•••'],
])('of_REDIS_URL=%s_there_is_to_see_%s', (url, seen) => {
  expect(settingsOf({ REDIS_URL: url }).REDIS_URL).toEqual([seen, 'environment'])
})

test.each([
  ['postgres://user@host/db', 'postgres://user@host/db'],
  ['postgresql://u:p@[::1]:5/db?sslmode=require', 'postgresql://u:•••@[::1]:5/db?sslmode=require'],
  ['postgres:///db?host=/run/pg&user=u&password=a%26b', 'postgres:///db?host=/run/pg&user=u&password=•••'],
  [
    'postgres://u:p,q@h/db?sslkey=/k&sslpassword=p&options=-c%20a.b%3Dc#d',
    'postgres://u:•••@h/db?sslkey=/k&sslpassword=•••&options=•••#•••',
  ],
])('of_DATABASE_URL=%s_there_is_to_see_%s', (url, seen) => {
  expect(settingsOf({ DATABASE_URL: url }).DATABASE_URL).toEqual([seen, 'environment'])
})

describe('no_secret_is_told', () => {
  /** Any piece of a secret between two odd characters can be recognised; nothing of ours looks like it. */
  const PIECE = 'Zqx7'
  const ODD = [...'@:/?#[]!$&\'()*+,;=%~^`|"<>\\.-_{}é😀 \t\n', '%41', '%zz', '&b=', '://', '@@', '']
  const secret = fc
    .array(fc.constantFrom(...ODD), { maxLength: 5 })
    .map((odd) => PIECE + odd.map((separator) => separator + PIECE).join(''))
  const written = secret.chain((plain) => fc.constantFrom(plain, encodeURIComponent(plain)))
  const credentials = fc.tuple(fc.constantFrom('', 'user'), written).map(([user, password]) => `${user}:${password}@`)
  const redisNode = fc.oneof(
    fc
      .tuple(fc.constantFrom('redis', 'rediss'), credentials)
      .map(([scheme, login]) => `${scheme}://${login}host:6380/1`),
    written.filter((password) => !password.includes(':')).map((password) => `redis://${password}@host`),
    written.map((password) => `redis://host?password=${password}`),
  )
  const redisUrl = fc.array(redisNode, { minLength: 1, maxLength: 3 }).map((urls) => urls.join(','))
  const databaseUrl = fc.oneof(
    credentials.map((login) => `postgres://${login}host/db?sslmode=require`),
    fc
      .tuple(fc.constantFrom('password', 'sslpassword', 'options', 'passfile', 'Password'), written)
      .map(([option, value]) => `postgresql://user@host/db?application_name=x&${option}=${value}`),
    written.map((password) => `postgres:/u:${password}@host/db`),
  )
  const secretList = fc.array(secret, { minLength: 1, maxLength: 3 }).map((values) => values.join(','))
  const lists = Object.fromEntries(
    SETTING_NAMES.filter((name) => SETTINGS[name].secret === 'all').map((name) => [name, secretList]),
  )
  const publicUrl = credentials.map((login) => `https://${login}host/path`)
  const environment = fc.record(
    { REDIS_URL: redisUrl, DATABASE_URL: databaseUrl, PUBLIC_URL: publicUrl, ...lists },
    { requiredKeys: [] },
  )

  /** All that may be said of it; and what a reader could make of that. */
  function told(given: Environment): string {
    try {
      const report = effectiveSettings(given, {}, Object.keys(given))
      const config = readConfig(given)
      const logged = (['ingest', 'sink'] as const).map((reader) => changedSettings(reader, config, given))
      return [describeReport(report, 'dir'), JSON.stringify([report, logged])].join('\n')
    } catch (error) {
      return (error as Error).message
    }
  }

  test('whatever_it_is_and_wherever_it_stands', () => {
    const kinds = { shown: 0, refused: 0 }
    fc.assert(
      fc.property(environment, (given) => {
        const output = told(given)
        kinds[output.startsWith('the configuration is wrong') ? 'refused' : 'shown']++
        expect(decodeURIComponent(output.replaceAll(/%(?![0-9a-f]{2})/gi, '%25'))).not.toMatch(/Zqx/i)
      }),
      { numRuns: 2000 },
    )
    expect(kinds.shown).toBeGreaterThan(100)
    expect(kinds.refused).toBeGreaterThan(100)
  })

  test('one_by_one', () => {
    const kinds = { shown: 0, refused: 0 }
    const one = fc.oneof(
      redisUrl.map((REDIS_URL) => ({ REDIS_URL })),
      databaseUrl.map((DATABASE_URL) => ({ DATABASE_URL })),
    )
    fc.assert(
      fc.property(one, (given) => {
        const output = told(given)
        kinds[output.startsWith('the configuration is wrong') ? 'refused' : 'shown']++
        expect(decodeURIComponent(output.replaceAll(/%(?![0-9a-f]{2})/gi, '%25'))).not.toMatch(/Zqx/i)
      }),
      { numRuns: 3000 },
    )
    expect(Math.min(kinds.shown, kinds.refused)).toBeGreaterThan(300)
  })

  test('of_other_variables_only_the_names_are', async () => {
    const environment = {
      SINK_WORKER: 'hunter2',
      REDIS_URL: 'redis://:hunter2@127.0.0.1:1',
      TWILIO_AUTH_TOKEN: 'hunter2',
    }
    for (const args of [['config'], ['config', '--json']]) {
      const { code, out, err } = await calltape(args, environment)
      expect({ code, err }).toEqual({ code: 0, err: '' })
      expect(out).toContain('redis://:•••@127.0.0.1:1')
      expect(out).toContain('SINK_WORKER is no variable of calltape: is SINK_WORKERS meant?')
      expect(out).not.toContain('hunter2')
    }
  })

  test('at_start_what_is_not_as_by_default_is_logged_without_them', async () => {
    const environment = {
      ...{
        REDIS_URL: 'redis://:hunter2@127.0.0.1:1',
        INGEST_TOKENS: 'hunter2,hunter3',
        INGEST_PORT: '0',
        WINDOW: '1024',
      },
      ...{ SINK_WORKERS: '3', DATABASE_URL: 'postgres://u:hunter2@127.0.0.1:1/x', LOG_LEVEL: 'info' },
    }
    for (const [name, settings] of [
      ['ingest', { REDIS_URL: 'redis://:•••@127.0.0.1:1', INGEST_TOKENS: '••• (2)', INGEST_PORT: 0 }],
      [
        'sink',
        { REDIS_URL: 'redis://:•••@127.0.0.1:1', DATABASE_URL: 'postgres://u:•••@127.0.0.1:1/x', SINK_WORKERS: 3 },
      ],
    ] as const) {
      const { out, err } = await calltape([name], environment)
      expect(JSON.parse(out.split('\n')[0]!)).toMatchObject({ level: 30, settings })
      expect(Object.keys(JSON.parse(out.split('\n')[0]!).settings).sort()).toEqual(Object.keys(settings).sort())
      expect(out + err).not.toContain('hunter')
    }
  })
})

describe('warnings', () => {
  test('nothing_is_said_of_the_defaults_or_of_a_usual_deployment', () => {
    expect(warningsOf({})).toEqual([])
    const usual = {
      ...{
        REDIS_URL: 'rediss://:pw@redis',
        DATABASE_URL: 'postgres://u:p@db/x',
        INGEST_TOKENS: 'a,b',
        SPOOL_DIR: '/spool',
      },
      ...{
        TWILIO_AUTH_TOKEN: 'x',
        PUBLIC_URL: 'https://calls.example.com',
        ARCHIVE_DIR: '/archive',
        SPOOL_MAX_BYTES: '1048576',
      },
    }
    expect(warningsOf(usual)).toEqual([])
  })

  test.each<[Environment, RegExp]>([
    [{ REDIS_URL: 'redis://hunter2@host' }, /^REDIS_URL has a user and no password/],
    [{ VAPI_SECRET: 'x' }, /^SPOOL_DIR is not set/],
    [{ SPOOL_MAX_BYTES: '1048576' }, /^SPOOL_MAX_BYTES is without effect/],
    [{ ALLOW_UNAUTHENTICATED: 'true' }, /^ALLOW_UNAUTHENTICATED is without effect: .*INGEST_HOST/],
    [{ ALLOW_UNAUTHENTICATED: 'true', INGEST_TOKENS: 'x' }, /^ALLOW_UNAUTHENTICATED is without effect: INGEST_TOKENS/],
    [{ ARCHIVE_DIR: '/a', STREAM_RETENTION: 'off' }, /^ARCHIVE_DIR is without effect/],
    [{ PUBLIC_URL: 'https://x.example' }, /^PUBLIC_URL is without effect/],
    [{ DISCONNECT_GRACE: '60', IDLE_TIMEOUT: '60' }, /^DISCONNECT_GRACE \(60 s\) is not shorter/],
    [{ INGEST_TOKENS: '"x"' }, /^INGEST_TOKENS begins and ends with a quotation mark/],
  ])('%j', (given, warning) => {
    expect(warningsOf(given)).toEqual([expect.stringMatching(warning)])
  })

  test('a_running_up_has_a_spool', () => {
    expect(warningsOf({ VAPI_SECRET: 'x' }, { REDIS_URL: 'redis://127.0.0.1:63790' })).toEqual([])
  })

  test.each([
    ['SINK_WORKER', 'SINK_WORKERS'],
    ['REDIS_URLS', 'REDIS_URL'],
    ['redis_url', 'REDIS_URL'],
    ['DATABSE_URL', 'DATABASE_URL'],
    ['INGEST_TOKEN', 'INGEST_TOKENS'],
    ['WINDOWS', 'WINDOW'],
  ])('%s_will_have_been_meant_for_%s', (name, meant) => {
    expect(effective({}, {}, [name]).warnings).toEqual([`${name} is no variable of calltape: is ${meant} meant?`])
  })

  test('variables_of_others_are_left_alone', () => {
    const others = [
      'PATH',
      'HOME',
      'WINDOWID',
      'LOGNAME',
      'REDIS_HOST',
      'DATABASE_HOST',
      'PORT',
      'TLS_CERT',
      'INGEST_SERVICE_PORT',
    ]
    expect(effective({}, {}, others).warnings).toEqual([])
  })
})

describe('the_command', () => {
  test('names_all_that_is_wrong_and_exits_with_2', async () => {
    const wrong = { WINDOW: 'hunter2', REDIS_URL: 'hunter2', TLS_KEY_FILE: 'hunter2', INGEST_TOKENS: ',' }
    const { code, out, err } = await calltape(['config'], wrong)
    expect({ code, out }).toEqual({ code: 2, out: '' })
    const lines = err.trim().split('\n')
    expect(lines[0]).toBe('calltape: the configuration is wrong:')
    expect(lines.slice(1).map((line) => line.trim().split(':')[0])).toEqual([
      ...['REDIS_URL', 'INGEST_TOKENS', 'WINDOW', 'TLS_CERT_FILE and TLS_KEY_FILE'],
    ])
    expect(err).not.toContain('hunter2')
  })

  test('asks_the_up_of_its_folder', async () => {
    const data = await mkdtemp(join(tmpdir(), 'calltape-config-'))
    onTestFinished(() => rm(data, { recursive: true }))
    const running = { pid: process.pid, REDIS_URL: 'redis://127.0.0.1:1', DATABASE_URL: 'postgres://u:pw@h/x' }
    await writeFile(join(data, 'up.json'), JSON.stringify(running))
    const environment = { REDIS_URL: '', DATABASE_URL: '' }
    const { out } = await calltape(['config', '--json', '--data', data], environment)
    const { settings } = JSON.parse(out) as { settings: { name: string }[] }
    expect(settings.find(({ name }) => name === 'REDIS_URL')).toEqual({
      ...{ name: 'REDIS_URL', value: 'redis://127.0.0.1:1', source: 'up', group: 'Stores' },
    })
    const text = (await calltape(['config', '--data', data], environment)).out
    expect(text).toMatch(new RegExp(`DATABASE_URL +postgres://u:•••@h/x +up in ${data}\n`))
  })

  test('prints_the_table_of_the_README', async () => {
    const { code, out } = await calltape(['config', '--table'], { WINDOW: 'wrong' })
    expect({ code, out }).toEqual({ code: 0, out: `${configurationTable()}\n` })
  })

  test('is_in_the_help_of_what_it_configures', async () => {
    for (const command of ['ingest', 'sink', 'verify']) {
      expect((await calltape([command, '--help'], {})).out).toContain('`calltape config`')
    }
  })
})
