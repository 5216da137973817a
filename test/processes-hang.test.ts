/** A process of several that lives and does nothing: the one that started it finds out. They run from dist/. */
import { setTimeout as sleep } from 'node:timers/promises'
import { pino } from 'pino'
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest'
import { ProcessGroup } from '../cli/processes/group.js'
import { childrenOf, isAlive } from './support/processes.js'
import { freshRedis, type RedisDatabase, until } from './support/stores.js'

const PATIENCE = { everyMs: 500, questions: 4 }
const TOO_LONG_MS = PATIENCE.everyMs * PATIENCE.questions + 1000

let redis: RedisDatabase
let group: ProcessGroup
let lines: { process: number; msg: string }[] = []
beforeAll(async () => {
  redis = await freshRedis()
  group = new ProcessGroup({
    name: 'ingest',
    size: 2,
    environment: { REDIS_URL: redis.url, INGEST_PORT: '0', LOG_LEVEL: 'silent' },
    patience: PATIENCE,
    log: pino({ base: null }, { write: (line) => lines.push(JSON.parse(line)) }),
  })
  await group.start()
})
afterEach(() => {
  lines = []
})
afterAll(async () => {
  await group.stop()
  await redis.drop()
})

/** As if this process had been stopped. */
const block = (ms: number) => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms)
const processes = () => childrenOf(process.pid)
const answers = async () => /^calltape_ingest_processes 2$/m.test(await group.metrics())

test('a_process_that_hangs_is_killed_and_another_one_takes_its_place', async () => {
  const [first, second] = processes()
  process.kill(first!, 'SIGSTOP')
  await until('it is dead', () => !isAlive(first!))
  await until('there are two again', answers)
  expect(lines).toMatchObject([
    { process: 0, msg: 'a process hangs: it is killed' },
    { process: 0, msg: 'a process died: it is started again', signal: 'SIGKILL' },
  ])
  expect(processes(), 'the other one').toContain(second)
  await group.ready()
})

test('one_that_was_away_for_less_than_that_lives_on', async () => {
  const before = processes()
  for (let round = 0; round < 3; round++) {
    process.kill(before[0]!, 'SIGSTOP')
    await sleep(PATIENCE.everyMs * 2.8) // several times: together too long
    process.kill(before[0]!, 'SIGCONT')
    await until('it answers', answers)
  }
  expect({ lines, processes: processes() }).toEqual({ lines: [], processes: before })
})

test('when_this_process_itself_is_starved_nobody_is_killed', async () => {
  const before = processes()
  for (let n = 0; n < 2 * PATIENCE.questions; n++) {
    block(PATIENCE.everyMs + 50)
    await new Promise((resolve) => setImmediate(resolve)) // one round of the event loop: its timers come before what it reads
  }
  await until('they answer', answers)
  expect({ lines, processes: processes() }).toEqual({ lines: [], processes: before })
})

test('when_all_of_the_machine_was_suspended_nobody_is_killed', async () => {
  const before = processes()
  for (const pid of before) process.kill(pid, 'SIGSTOP')
  await sleep(PATIENCE.everyMs) // now they have been asked
  block(TOO_LONG_MS)
  for (const pid of before) process.kill(pid, 'SIGCONT')
  await until('they answer', answers)
  await sleep(PATIENCE.everyMs * 2)
  expect({ lines, processes: processes() }).toEqual({ lines: [], processes: before })
})
