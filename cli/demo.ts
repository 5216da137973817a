/** `calltape demo`: starts everything, plays calls through the real WebSocket, and checks what came of it in PostgreSQL. */
import { readFileSync } from 'node:fs'
import { chmod, mkdtemp, realpath, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { givenEnvironment, OperatorError, readConfig } from '../shared/config.js'
import { createPool, type Pool } from '../shared/postgres.js'
import { readLatency, verifyCalls } from './compare.js'
import { isClean, sessionTable, transcriptOf, verdict } from './demo-report.js'
import { count, loadShow, type Show, sampleShow } from './demo-shows.js'
import { createLiveView, type LiveView } from './live-view.js'
import { type Stack, startStack } from './stack.js'

export interface DemoOptions {
  /** Generated calls instead of the sample calls. */
  calls?: number
  /** Turns a second, of all generated calls together. */
  rate?: number
  /** Of each generated call. */
  turns: number
}

/** Shorter than in earnest, so that nobody has to wait for the call that hangs up, nor for a sink that was killed. */
const DEFAULTS = { DISCONNECT_GRACE: '2', LEASE_SECONDS: '5' }
/** Whose transcript is printed: the one with interruptions. */
const SHOWN_CALL = 'es'
const LOOK_MS = 200
/** Less often when looking takes long, because there are many rows: it must not slow down what it looks at. */
const LOOK_PAUSE = 4
const LOOK_MAX_MS = 2000
/** Beyond what grace and leases take: with nothing happening for so long, nothing more will. */
const STALL_MS = 15_000
const EXIT_GRACE_MS = 100
const EXIT_CODES = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 }

/** Somebody wants the demo to stop. */
class Interrupted extends Error {
  constructor(readonly exitCode: number) {
    super('interrupted')
  }
}

/** Sets the process's exit code: 0 only if all that was sent is in PostgreSQL, each turn once. */
export async function demo(options: DemoOptions): Promise<void> {
  if (options.rate !== undefined && options.calls === undefined) {
    throw new OperatorError('--rate is for generated calls: say how many with --calls')
  }
  const stopping = new AbortController()
  const { signal } = stopping
  // Handled for as long as the process lives: npm passes Ctrl-C on, so that it comes twice.
  for (const [name, code] of Object.entries(EXIT_CODES)) {
    process.on(name, () => stopping.abort(new Interrupted(code)))
  }
  // Nobody reads any more, as with `| head`: stop, but cleanly.
  process.stdout.on('error', (error) => stopping.abort(new OperatorError(`cannot print: ${error.message}`)))

  const view = createLiveView(process.stdout)
  const folder = await mkdtemp(join(tmpdir(), 'calltape-demo-'))
  await chmod(folder, 0o711) // under root, PostgreSQL runs as another user, who must get in
  let stack: Stack | undefined
  try {
    view.say(`Starting PostgreSQL, Redis, ingest and sink, with their data in ${folder} …`)
    stack = await startStack({ dataDir: folder, say: view.say, defaults: DEFAULTS })
    void stack.failed.then((reason) => stopping.abort(new OperatorError(reason)))
    signal.throwIfAborted()
    const isRight = await untilAborted(playAndCheck(stack, options, view, signal), signal)
    if (!isRight) {
      process.exitCode = 1
      for (const name of ['ingest', 'sink']) console.error(`\n${name} said last:\n${tail(join(folder, `${name}.log`))}`)
    }
  } catch (error) {
    const reason: unknown = signal.aborted ? signal.reason : error
    if (!(reason instanceof Interrupted)) throw reason
    process.exitCode = reason.exitCode
    view.done()
    console.error('\nstopping …')
  } finally {
    view.done()
    await stack?.stop()
    await removeFolder(folder)
    // What was not waited for may have left a connection open that would keep the process alive.
    if (signal.aborted) setTimeout(() => process.exit(), EXIT_GRACE_MS).unref()
  }
}

function tail(file: string): string {
  return readFileSync(file, 'utf8').trimEnd().split('\n').slice(-5).join('\n')
}

/** Does not wait for work that does not notice that it should stop, such as a query that hangs. */
function untilAborted<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
  const aborted = new Promise<never>((_, reject) => signal.addEventListener('abort', () => reject(signal.reason)))
  return Promise.race([work, aborted])
}

/** With PostgreSQL's data, which lies elsewhere if its user cannot reach the folder; see local-postgres.ts. */
async function removeFolder(folder: string): Promise<void> {
  const data = join(folder, 'postgres')
  const real = await realpath(data).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return data // DATABASE_URL was set, or nothing came to be started
    throw error
  })
  for (const path of [real, `${real}.bin`, folder]) await rm(path, { recursive: true, force: true })
}

/** @returns whether everything is as it should be */
async function playAndCheck(stack: Stack, options: DemoOptions, view: LiveView, signal: AbortSignal): Promise<boolean> {
  const token = readConfig().INGEST_TOKENS[0]
  const pool = createPool(stack.database, 'demo', 3)
  // An idle connection was lost. If that matters, the next query says so.
  pool.on('error', (error) => view.say(`PostgreSQL: ${error.message}`))
  try {
    const where = { ingestUrl: stack.ingestUrl, token, pool }
    const { calls, turns, rate } = options
    const show = calls === undefined ? sampleShow(where) : loadShow(where, { calls, turns, rate })
    view.say(`Playing ${count(show.calls)} calls with ${count(show.turns)} turns to ${stack.ingestUrl}:`)
    const isComplete = await watch(show, stack.sinkUrl, view, stallMs(rate), signal)
    view.done()
    if (!isComplete) console.log('\nNothing has happened for a while, although not every call is finalized: giving up.')
    return await report(show, pool, calls === undefined, signal)
  } finally {
    await pool.end()
  }
}

function stallMs(rate: number | undefined): number {
  const { DISCONNECT_GRACE, LEASE_SECONDS } = readConfig({ ...DEFAULTS, ...givenEnvironment() })
  return STALL_MS + (DISCONNECT_GRACE + LEASE_SECONDS + 2 / (rate ?? 1)) * 1000
}

/** Plays and shows how it goes; @returns false when it got stuck before every call was finalized */
async function watch(
  show: Show,
  sinkUrl: string,
  view: LiveView,
  stallMs: number,
  signal: AbortSignal,
): Promise<boolean> {
  const stop = new AbortController()
  let played = false
  let failure: Error | undefined
  void show.play(AbortSignal.any([signal, stop.signal])).then(
    () => {
      played = true
    },
    (error: Error) => {
      failure = error
    },
  )
  const began = performance.now()
  let before = ''
  let movedAt = began
  let landedMs: number | undefined
  try {
    for (;;) {
      const lookedAt = performance.now()
      const [lag] = await Promise.all([readLag(sinkUrl), show.look()])
      const now = performance.now()
      if (failure) throw failure
      const progress = show.progress()
      if (landedMs === undefined && progress.inPostgres === show.turns) landedMs = now - began
      const speed = (progress.inPostgres / (landedMs ?? now - began)) * 1000
      draw(show, `${count(Math.round(speed))} turns/s, ${lag}`, now - began, view)
      if (played && progress.finalized === show.calls) return true

      const state = JSON.stringify(progress)
      if (state !== before) movedAt = now
      before = state
      if (now - movedAt > stallMs) return false
      await sleep(Math.max(LOOK_MS, Math.min(LOOK_MAX_MS, (now - lookedAt) * LOOK_PAUSE)), undefined, { signal })
    }
  } finally {
    stop.abort()
  }
}

function draw(show: Show, pace: string, elapsedMs: number, view: LiveView): void {
  const { sent, acked, inPostgres, finalized } = show.progress()
  const turns = `${count(sent)} of ${count(show.turns)} turns sent, ${count(acked)} acked, ${count(inPostgres)} in PostgreSQL`
  const calls = `${count(finalized)} of ${count(show.calls)} calls finalized`
  const line = `${turns}; ${calls}; ${pace}`
  view.draw(
    `\n${show.screen()}\n\n  ${turns}\n  ${calls}; ${pace}\n`,
    `${(elapsedMs / 1000).toFixed(1).padStart(6)} s  ${line}`,
  )
}

/** The age of the oldest event that is not in PostgreSQL, as the sink says, in words. */
async function readLag(sinkUrl: string): Promise<string> {
  try {
    const response = await fetch(`${sinkUrl}/metrics`, { signal: AbortSignal.timeout(1000) })
    const seconds = /^calltape_sink_lag_seconds (\S+)/m.exec(await response.text())?.[1]
    return seconds === undefined ? 'lag unknown' : `lag ${Math.round(Number(seconds) * 1000)} ms`
  } catch {
    return 'the sink does not answer' // it may have been killed, to see what happens: the demo goes on
  }
}

async function report(show: Show, pool: Pool, isSample: boolean, signal: AbortSignal): Promise<boolean> {
  if (isSample) {
    const callSid = show.prefix + SHOWN_CALL
    console.log(`\ncall_sessions.full_transcript of ${callSid}:\n\n${await transcriptOf(pool, callSid)}`)
    console.log(`\ncall_sessions:\n\n${await sessionTable(pool, show.prefix)}\n`)
  }
  const found = await verifyCalls(pool, show.prefix, show.expected(), signal)
  const refusals = show.refusals()
  console.log(verdict(found, refusals, await show.repeats(), await readLatency(pool, show.prefix)))
  const { REDIS_URL, DATABASE_URL } = givenEnvironment()
  if (REDIS_URL || DATABASE_URL) {
    console.log(
      `\nIn the stores that are yours, the calls are left where they are: their call_sid begins with ${show.prefix}`,
    )
  }
  const isRight = isClean(found) && refusals.length === 0
  if (isRight)
    console.log('\nNext: npm start keeps all this running for calls of your own; README.md says how to send them.')
  return isRight
}
