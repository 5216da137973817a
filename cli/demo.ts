/** `calltape demo`: starts everything, plays calls through the real WebSocket, and checks what came of it in PostgreSQL. */
import { readFileSync } from 'node:fs'
import { chmod, mkdtemp, realpath, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Environment, givenEnvironment, OperatorError, readConfig } from '../shared/config.js'
import { createPool } from '../shared/postgres.js'
import { requireReachable, requireSchema } from '../shared/schema.js'
import { type Play, playAndCheck, type Stage } from './demo/play.js'
import { createLiveView, type LiveView } from './live-view.js'
import { type Stack, startStack } from './stack.js'

export interface DemoOptions extends Play {
  /** Of the ingest to play against; absent: everything is started. http://host:port */
  ingest?: string
  /** Of a sink beside that ingest. http://host:port */
  sink?: string
}

/** Shorter than in earnest, so that nobody has to wait for the call that hangs up, nor for a sink that was killed. */
const DEFAULTS = { DISCONNECT_GRACE: '2', LEASE_SECONDS: '5' }
/** Beyond what grace and leases take: with nothing happening for so long, nothing more will. */
const STALL_MS = 15_000
/** In an installation that runs, servers may be killed and started again meanwhile. */
const PATIENCE_MS = 120_000
const EXIT_GRACE_MS = 100
const EXIT_CODES = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 }

/** Somebody wants the demo to stop. */
class Interrupted extends Error {
  constructor(readonly exitCode: number) {
    super('interrupted')
  }
}

/**
 * Sets the process's exit code: 0 only if all that was sent is in PostgreSQL, each turn once.
 *
 * @throws OperatorError when the options do not fit together, something cannot be started, or stays away
 */
export async function demo(options: DemoOptions): Promise<void> {
  requireFit(options)
  const stopping = new AbortController()
  const { signal } = stopping
  // Handled for as long as the process lives: npm passes Ctrl-C on, so that it comes twice.
  for (const [name, code] of Object.entries(EXIT_CODES)) {
    process.on(name, () => stopping.abort(new Interrupted(code)))
  }
  // Nobody reads any more, as with `| head`: stop, but cleanly.
  process.stdout.on('error', (error) => stopping.abort(new OperatorError(`cannot print: ${error.message}`)))

  const view = createLiveView(process.stdout)
  const play = options.ingest === undefined ? playInStack : playInInstallation
  try {
    if (!(await play(options, view, stopping))) process.exitCode = 1
  } catch (error) {
    const reason: unknown = signal.aborted ? signal.reason : error
    if (!(reason instanceof Interrupted)) throw reason
    process.exitCode = reason.exitCode
  } finally {
    view.done()
    // What was not waited for may have left a connection open that would keep the process alive.
    if (signal.aborted) setTimeout(() => process.exit(), EXIT_GRACE_MS).unref()
  }
}

function requireFit({ calls, rate, ingest, sink }: DemoOptions): void {
  if (rate !== undefined && calls === undefined) {
    throw new OperatorError('--rate is for generated calls: say how many with --calls')
  }
  if (sink !== undefined && ingest === undefined) throw new OperatorError('--sink goes with --ingest')
  for (const [option, url] of Object.entries({ '--ingest': ingest, '--sink': sink })) {
    if (url !== undefined && !(/^https?:/.test(url) && URL.canParse(url))) {
      throw new OperatorError(`${option} wants http://host:port or https://host:port, got ${url}`)
    }
  }
}

/** @returns whether everything is as it should be */
async function playInStack(play: Play, view: LiveView, stopping: AbortController): Promise<boolean> {
  const { signal } = stopping
  const folder = await mkdtemp(join(tmpdir(), 'calltape-demo-'))
  await chmod(folder, 0o711) // under root, PostgreSQL runs as another user, who must get in
  let stack: Stack | undefined
  try {
    view.say(`Starting PostgreSQL, Redis, ingest and sink, with their data in ${folder} …`)
    stack = await startStack({ dataDir: folder, say: view.say, defaults: DEFAULTS })
    void stack.failed.then((reason) => stopping.abort(new OperatorError(reason)))
    signal.throwIfAborted()
    const stage: Stage = { ...stack, stallMs: stallMs(play.rate, DEFAULTS), patienceMs: 0 }
    const isRight = await untilAborted(playAndCheck(stage, play, view, signal), signal)
    if (isRight)
      console.log('\nNext: npm start keeps all this running for calls of your own; README.md says how to send them.')
    else
      for (const name of ['ingest', 'sink']) console.error(`\n${name} said last:\n${tail(join(folder, `${name}.log`))}`)
    return isRight
  } catch (error) {
    if (signal.reason instanceof Interrupted) {
      view.done()
      console.error('\nstopping …')
    }
    throw error
  } finally {
    view.done()
    await stack?.stop()
    await removeFolder(folder)
  }
}

/** With the PostgreSQL of DATABASE_URL, into which the sinks beside that ingest write. @returns as above */
async function playInInstallation(options: DemoOptions, view: LiveView, { signal }: AbortController): Promise<boolean> {
  const database = readConfig()
  const pool = createPool(database, 'demo', 1)
  try {
    await requireReachable(pool, database)
    await requireSchema(pool, database)
  } finally {
    await pool.end()
  }
  const { ingest, sink, rate } = options
  const ingestUrl = ingest!.replace(/\/+$/, '')
  const stage: Stage = {
    ...{ database, ingestUrl, sinkUrl: sink?.replace(/\/+$/, '') },
    stallMs: PATIENCE_MS + stallMs(rate, {}),
    patienceMs: PATIENCE_MS,
  }
  return await untilAborted(playAndCheck(stage, options, view, signal), signal)
}

/** @param defaults what holds where the environment says nothing */
function stallMs(rate: number | undefined, defaults: Environment): number {
  const { DISCONNECT_GRACE, LEASE_SECONDS } = readConfig({ ...defaults, ...givenEnvironment() })
  return STALL_MS + (DISCONNECT_GRACE + LEASE_SECONDS + 2 / (rate ?? 1)) * 1000
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
