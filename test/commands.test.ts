/** What is the same of all commands: at a terminal, in a pipe, and with a `calltape up` beside them. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdtemp, open, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, beforeEach, describe, expect, onTestFinished, test } from 'vitest'
import { childEnvironment } from '../shared/config.js'
import { ArchiveWriter } from '../sink/archive.js'
import { Calls, ended, newSid, seqs } from './support/calls.js'
import { calltape, PROGRAM } from './support/program.js'
import { until } from './support/stores.js'
import { turn } from './support/streams.js'

let calls: Calls
let folder: string
beforeAll(async () => {
  calls = await Calls.start()
  folder = await mkdtemp(join(tmpdir(), 'calltape-test-commands-'))
})
afterAll(async () => {
  await calls.stack.end()
  await rm(folder, { recursive: true, force: true })
})

const stores = () => ({ REDIS_URL: calls.stack.redis.url, DATABASE_URL: calls.stack.database.url })
/** For a process whose standard error is a terminal of 80 columns. */
const AT_A_TERMINAL = ['--import', 'data:text/javascript,Object.assign(process.stderr, { isTTY: true, columns: 80 })']
const HIDDEN_CURSOR = '\u001B[?25l'

function start(args: string[], { before = [] as string[], stdout = 'pipe' as 'pipe' | number } = {}) {
  const child = spawn(process.execPath, [...before, PROGRAM, ...args], {
    env: childEnvironment(stores()),
    stdio: ['ignore', stdout, 'pipe'],
  })
  const said = { out: '', err: '' }
  child.stdout?.on('data', (data) => (said.out += data))
  child.stderr!.on('data', (data) => (said.err += data))
  return { child, said, closed: once(child, 'close') as Promise<[code: number | null, signal: string | null]> }
}

let sid: string
beforeEach(() => {
  sid = newSid()
})

describe('at a terminal', () => {
  test('ctrl_c_ends_a_replay_with_its_report', async () => {
    // More than two batches: at this rate the second one waits, and what is in hand when it is stopped is stored to its end.
    await calls.producer.store(...seqs(12_000).map((n) => turn(sid, n)))
    await calls.settled(sid)
    await calls.query('DELETE FROM call_transcript_turns WHERE call_sid = $1', sid)
    const { child, said, closed } = start(['replay', '--call', sid, '--rate', '100'], { before: AT_A_TERMINAL })
    await until('it shows how far it is', () => said.err.includes(HIDDEN_CURSOR))
    child.kill('SIGINT')
    expect(await closed).toEqual([130, null])
    expect(said.out).toContain('Stopped before the end')
  })

  test('ctrl_c_ends_a_rescue_with_its_report', async () => {
    const { child, said, closed } = start(['rescue', '--watch'], { before: AT_A_TERMINAL })
    await until('it shows how far it is', () => said.err.includes(HIDDEN_CURSOR))
    child.kill('SIGINT')
    await closed
    expect(said.out).toMatch(/sessions +0/)
  })
})

describe('in a pipe', () => {
  const exportOf = async (stdout: 'pipe' | number) => {
    await calls.producer.store(...seqs(3000).map((n) => turn(sid, n)), ended(sid, 3000))
    await calls.settled(sid)
    return start(['export', sid, '--format', 'json'], { stdout })
  }

  test('that_nobody_reads_any_more_is_no_failure', async () => {
    const { child, said, closed } = await exportOf('pipe')
    child.stdout!.destroy()
    expect(await closed).toEqual([0, null])
    expect(said.err).toBe('')
  })

  test.runIf(existsSync('/dev/full'))('what_cannot_be_written_is_told_and_is_not_exit_code_0', async () => {
    const full = await open('/dev/full', 'w')
    onTestFinished(() => full.close())
    const { said, closed } = await exportOf(full.fd)
    expect(await closed).toEqual([2, null])
    expect(said.err).toMatch(/^calltape: cannot print: ENOSPC/)
  })
})

test.each(['streams.gz', 'streams.txt', '.ndjson'])(
  'an_archive_that_would_not_be_found_again_is_refused: %s',
  async (name) => {
    const { code, err } = await calltape(['replay', '--all', '--archive', join(folder, name)], stores())
    expect(err).toContain('--archive wants a name that ends in .ndjson')
    expect(code).toBe(2)
    expect(await readdir(folder)).not.toContain(name)
  },
)

async function archive(path: string, callSid: string): Promise<void> {
  const writer = await ArchiveWriter.open(path)
  await writer.write(callSid, [{ id: '1700000000000-0', fields: ['e', JSON.stringify(turn(callSid, 0))] }])
  await writer.endCall(callSid, 1)
  await writer.close()
}

test('a_call_that_is_not_in_the_archive_is_not_called_replayed', async () => {
  const file = join(folder, 'one.ndjson')
  await archive(file, sid)
  const other = newSid()
  const replayed = await calltape(['replay', '--from-archive', file, '--call', other], stores())
  expect(replayed).toMatchObject({ code: 2, out: '' })
  expect(replayed.err).toContain(`there is no entry of call ${other}`)
  expect(await calltape(['replay', '--from-archive', file, '--call', sid], stores())).toMatchObject({ code: 0 })
})

test('erase_reaches_the_archives_of_the_up_that_it_asks', async () => {
  const [data, archives] = [join(folder, 'up'), await mkdtemp(join(folder, 'archives-'))]
  await archive(join(archives, 'one.ndjson.gz'), sid)
  const up = spawn(process.execPath, [PROGRAM, 'up', '--data', data], {
    env: childEnvironment({ ...stores(), ARCHIVE_DIR: archives, INGEST_PORT: '0', SINK_METRICS_PORT: '0' }),
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const stopped = once(up, 'close')
  onTestFinished(async () => {
    up.kill('SIGTERM')
    await stopped
  })
  let out = ''
  up.stdout.on('data', (part) => (out += part))
  await until('it is up', () => out.includes('calltape is up'))
  expect(out).toContain(`npx calltape show my-first-call --data ${data}\n`)
  const erased = await calltape(['erase', sid, '--data', data], { REDIS_URL: '', DATABASE_URL: '' })
  expect(erased).toMatchObject({ code: 0, err: '' })
  expect(erased.out).toMatch(/archives +entries +1/)
  expect(await readdir(archives)).toEqual([])
})
