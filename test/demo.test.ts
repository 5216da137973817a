/** `calltape demo` against an installation that runs, and `calltape health`, which tells how its parts are. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createServer } from 'node:http'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { startIngest } from '../ingest/ingest.js'
import { childEnvironment } from '../shared/config.js'
import { lastingPort } from './support/processes.js'
import { calltape, PROGRAM } from './support/program.js'
import { log, startTestStack, type TestStack, until } from './support/stores.js'

let stack: TestStack
beforeAll(async () => {
  stack = await startTestStack({ INGEST_TOKENS: 'test-token', INGEST_HOST: '127.0.0.1', DISCONNECT_GRACE: '1' })
})
afterAll(async () => await stack.end())

const environment = (token = 'test-token') => ({
  DATABASE_URL: stack.database.url,
  REDIS_URL: stack.redis.url,
  INGEST_TOKENS: token,
})
const LOAD = ['--calls', '10', '--turns', '20']

test('the_demo_plays_against_a_running_installation', async () => {
  const where = ['--ingest', `${stack.ingest.url}/`, '--sink', stack.sinks[0]!.url]
  const { code, out, err } = await calltape(['demo', ...where, ...LOAD], environment())
  expect(err).toBe('')
  expect(out).toContain('Everything is there, each turn once.')
  expect(out).not.toContain('Starting PostgreSQL')
  expect(code).toBe(0)
})

test('the_demo_waits_for_an_ingest_that_is_away', async ({ onTestFinished }) => {
  const port = await lastingPort()
  const child = spawn(process.execPath, [PROGRAM, 'demo', '--ingest', `http://127.0.0.1:${port}`, ...LOAD], {
    env: childEnvironment(environment()),
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const ended = once(child, 'close') as Promise<[number]>
  let out = ''
  child.stdout.on('data', (data) => (out += data))
  await until('the demo misses ingest', () => /ingest is away: .*trying again/.test(out), 60_000)
  const ingest = await startIngest({ ...stack.config, INGEST_PORT: port }, log)
  onTestFinished(() => ingest.stop())
  expect(await ended).toEqual([0, null])
  expect(out).toContain('ingest is back')
  expect(out).toContain('Everything is there, each turn once.')
}, 120_000)

test('a_wrong_token_is_told_and_not_tried_again', async () => {
  const { code, err } = await calltape(['demo', '--ingest', stack.ingest.url, ...LOAD], environment('another'))
  expect(err).toMatch(/^calltape: INGEST_TOKENS: .*401/)
  expect(code).toBe(2)
})

test.each([
  [['--sink', 'http://127.0.0.1:1'], '--sink goes with --ingest'],
  [['--ingest', '127.0.0.1:8080'], '--ingest wants http'],
])('options_that_do_not_fit_are_told: %s', async (args, words) => {
  const { code, err } = await calltape(['demo', ...args], environment())
  expect(err).toContain(words)
  expect(code).toBe(2)
})

test.each(['ingest', 'sink'] as const)('health_tells_that_%s_is_well', async (role) => {
  const url = new URL(role === 'ingest' ? stack.ingest.url : stack.sinks[0]!.url)
  const port = { [role === 'ingest' ? 'INGEST_PORT' : 'SINK_METRICS_PORT']: url.port }
  expect(await calltape(['health', role, '--ready'], port)).toMatchObject({ code: 0 })
  expect(await calltape(['health', role], port)).toMatchObject({ code: 0 })
})

test('health_of_what_does_not_answer_is_1_with_the_reason', async () => {
  const { code, out } = await calltape(['health', 'sink'], { SINK_METRICS_PORT: '1' })
  expect(out).toContain('ECONNREFUSED')
  expect(code).toBe(1)
})

test('health_of_a_sink_that_cannot_do_its_job_is_1_only_when_asked_whether_it_is_ready', async () => {
  const server = createServer((request, response) =>
    request.url === '/healthz' ? response.end('ok\n') : response.writeHead(503).end('PostgreSQL: it is away\n'),
  ).listen(0, '127.0.0.1')
  await once(server, 'listening')
  const port = { SINK_METRICS_PORT: String((server.address() as { port: number }).port) }
  expect(await calltape(['health', 'sink', '--ready'], port)).toMatchObject({
    code: 1,
    out: 'PostgreSQL: it is away\n',
  })
  expect(await calltape(['health', 'sink'], port)).toMatchObject({ code: 0, out: 'ok\n' })
  server.close()
})
