/** The examples of README.md, run as they stand there; only the address is that of a stack of our own. */
import { execFile, spawnSync } from 'node:child_process'
import { promisify } from 'node:util'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { PACKAGE_ROOT, readPackageFile } from '../shared/package-root.js'
import { startTestStack, type TestStack, until } from './support/stores.js'

const run = promisify(execFile)
let stack: TestStack
beforeAll(async () => {
  stack = await startTestStack()
})
afterAll(async () => await stack.end())

/** The first code block of that language which has `marker` in it. */
function example(language: string, marker: string): string {
  const blocks = [...readPackageFile('README.md').matchAll(/```(\w+)\n([\s\S]*?)```/g)]
  const block = blocks.find(([, name, code]) => name === language && code!.includes(marker))
  if (!block) throw new Error(`README.md has no ${language} example with ${marker}`)
  return block[2]!.replaceAll('127.0.0.1:8080', new URL(stack.ingest.url).host)
}

const transcript = (callSid: string) =>
  until(`${callSid} is finalized`, async () => {
    const sql = 'SELECT complete, full_transcript FROM call_sessions WHERE call_sid = $1 AND finalized_at IS NOT NULL'
    const { rows } = await stack.database.pool.query<{ complete: boolean; full_transcript: { text: string }[] }>(sql, [
      callSid,
    ])
    return rows[0] && { complete: rows[0].complete, texts: rows[0].full_transcript.map((turn) => turn.text) }
  })

test('the_curl_example_stores_a_call', async () => {
  const [curl] = example('sh', 'my-first-call').split('npx calltape')
  const { stdout } = await run('bash', ['-c', curl!])
  expect(JSON.parse(stdout)).toEqual({ accepted: 2, rejected: [] })
  expect(await transcript('my-first-call')).toEqual({ complete: true, texts: ['Hello, can you hear me?'] })
})

test('the_typescript_example_stores_a_call', async () => {
  await run('node', ['--input-type=module', '-e', example('ts', 'my-second-call')], { cwd: PACKAGE_ROOT })
  expect(await transcript('my-second-call')).toEqual({ complete: true, texts: ['Is anybody there?', 'Always.'] })
})

const hasPython = spawnSync('python3', ['--version']).status === 0
test.skipIf(!hasPython)('the_python_example_stores_a_call (skipped where there is no python3)', async () => {
  await run('python3', ['-c', example('python', 'my-third-call')])
  expect(await transcript('my-third-call')).toEqual({ complete: true, texts: ['नमस्ते!', 'Hello.'] })
})

/** Runs curl examples; any that is refused fails (`curl -f`, and bash stops there). */
const runCurls = (marker: string) => run('bash', ['-euo', 'pipefail', '-c', example('sh', marker)])

const session = (callSid: string) =>
  until(`${callSid} is in call_sessions`, async () => {
    const { rows } = await stack.database.pool.query('SELECT * FROM call_sessions WHERE call_sid = $1', [callSid])
    return rows[0] as Record<string, unknown> | undefined
  })

test('the_exotel_examples_store_a_call', async () => {
  await runCurls('webhooks/exotel')
  await transcript('my-exotel-call')
  const digits = async () => ((await session('my-exotel-call')).collected_data as { digits?: string } | null)?.digits
  await until('the digits are there', async () => (await digits()) === '42')
  expect(await session('my-exotel-call')).toMatchObject({ status: 'completed', duration_seconds: 42 })
})

test('the_twilio_examples_store_a_complete_call', async () => {
  await runCurls('webhooks/twilio')
  expect(await transcript('CA-my-call')).toEqual({ complete: true, texts: ['Hello?'] })
  await until('its recording is there', async () => (await session('CA-my-call')).recording_url !== null)
  expect(await session('CA-my-call')).toMatchObject({ status: 'completed', duration_seconds: 35, direction: 'inbound' })
})

test('the_other_providers_examples_store_a_call_each', async () => {
  await runCurls('my-vapi-call')
  for (const [callSid, ...texts] of [
    ['my-vapi-call', 'Is anybody there?'],
    ['my-retell-call', 'Hello.', 'Wrong number.'],
    ['my-elevenlabs-call', 'Hello.'],
    ['my-telnyx-call'],
    ['my-plivo-call'],
    ['CON-my-vonage-call'],
    ['my-jambonz-call'],
    ['my-cloud-call', 'Hello?'],
  ]) {
    expect({ callSid, ...(await transcript(callSid!)) }).toMatchObject({ callSid, texts })
  }
  for (const callSid of ['my-livekit-call', 'my-pipecat-call']) {
    const sql = 'SELECT text FROM call_transcript_turns WHERE call_sid = $1'
    const turn = async () => (await stack.database.pool.query<{ text: string }>(sql, [callSid])).rows[0]
    expect(await until(`${callSid} has its turn`, turn)).toEqual({ text: 'Hello?' })
  }
})

test('the_sql_example_runs', async () => {
  for (const statement of example('sql', 'my-third-call')
    .split(';')
    .filter((sql) => sql.trim() !== '')) {
    await expect(stack.database.pool.query(statement)).resolves.toBeDefined()
  }
})
