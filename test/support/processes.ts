/** ingest and sink as real processes, to be killed: a supervisor starts again what dies, and writes down how it died. */
import { type ChildProcess, fork } from 'node:child_process'
import { closeSync, openSync, readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import getPort, { portNumbers } from 'get-port'
import { childEnvironment, type Environment } from '../../shared/config.js'
import { PROGRAM } from './program.js'

/** Below the range from which the system takes ports for outgoing connections: who connects to a dead server's port gets it. */
const PORTS = [15_000, 30_000] as const
/** Between a death and the next start; a start while the stores are away fails, and is tried again. */
const RESTART_PAUSE_MS = 50

/** The processes that a process has started, in that order (Linux). */
export function childrenOf(pid: number): number[] {
  const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim()
  return children === '' ? [] : children.split(' ').map(Number)
}

/** Whether there is such a process, be it a dead one that nobody has reaped. */
export function isAlive(pid: number): boolean {
  try {
    return process.kill(pid, 0)
  } catch {
    return false
  }
}

/** A port that is free now and stays so while what listens on it is restarted. */
export async function lastingPort(): Promise<number> {
  const from = PORTS[0] + Math.floor(Math.random() * (PORTS[1] - PORTS[0] - 100))
  return getPort({ port: portNumbers(from, from + 100), host: '127.0.0.1' })
}

export interface Death {
  code: number | null
  signal: NodeJS.Signals | null
  /** The test did it. */
  wanted: boolean
  /** It had come so far as to serve. */
  served: boolean
  /** Its life, ms. */
  livedMs: number
}

export interface ServiceOptions {
  name: 'ingest' | 'sink'
  environment: Environment
  logFile: string
  /** Stays dead. */
  unsupervised?: boolean
  /** CRASH_AT holds for those that follow, too. */
  staysArmed?: boolean
}

/** One `calltape ingest` or `calltape sink`, with a process after the other. Needs a built dist/. */
export class Service {
  readonly deaths: Death[] = []
  private child: ChildProcess | undefined
  private serving: Promise<string> = Promise.resolve('')
  private exited: Promise<Death> | undefined
  private wanted = false
  private stopped = false
  /** From the last SIGTERM of `stop` to the exit. */
  lastStopMs = 0

  constructor(readonly options: ServiceOptions) {
    this.launch()
  }

  get pid(): number {
    return this.child!.pid!
  }

  /** It served, and died by itself. (One that finds no store when it starts says so and exits.) */
  get unexplainedDeaths(): Death[] {
    return this.deaths.filter(({ wanted, served }) => !wanted && served)
  }

  /** Resolves with its URL when it serves, even if it has to be started again first. */
  async serves(): Promise<string> {
    for (;;) {
      try {
        return await this.serving
      } catch (error) {
        if (this.stopped || this.options.unsupervised) throw error
        await sleep(RESTART_PAUSE_MS)
      }
    }
  }

  /** @returns false when there is no process just now */
  signal(signal: NodeJS.Signals): boolean {
    const lives = this.child !== undefined && this.child.exitCode === null && this.child.signalCode === null
    return lives && this.child!.kill(signal)
  }

  /** By SIGKILL; the supervisor starts it again. @returns false when there is no process just now */
  kill(): boolean {
    this.wanted = true
    return this.signal('SIGKILL')
  }

  /** By SIGTERM, and for good. */
  async stop(): Promise<Death> {
    this.stopped = true
    this.wanted = true
    const from = performance.now()
    this.signal('SIGTERM')
    const death = await this.exited!
    this.lastStopMs = performance.now() - from
    return death
  }

  /** After `stop`. */
  async start(): Promise<string> {
    this.stopped = false
    this.launch()
    return this.serves()
  }

  /** At the test's end, however it stands. */
  async end(): Promise<void> {
    this.stopped = true
    this.kill()
    await this.exited
  }

  private launch(): void {
    const { name, environment, logFile, staysArmed } = this.options
    const { CRASH_AT, ...others } = environment
    const armed = CRASH_AT !== undefined && (staysArmed || this.deaths.length === 0) ? { CRASH_AT } : {}
    const log = openSync(logFile, 'a')
    const child = fork(PROGRAM, [name], {
      env: childEnvironment({ ...others, ...armed }),
      execArgv: [],
      stdio: ['ignore', log, log, 'ipc'],
    })
    closeSync(log)
    const from = performance.now()
    let served = false
    this.wanted = false
    this.child = child
    this.exited = new Promise((resolve) => {
      child.once('exit', (code, signal) => {
        const death = { code, signal, wanted: this.wanted, served, livedMs: performance.now() - from }
        this.deaths.push(death)
        resolve(death)
        if (!this.stopped && !this.options.unsupervised)
          setTimeout(() => this.stopped || this.launch(), RESTART_PAUSE_MS)
      })
    })
    this.serving = new Promise((resolve, reject) => {
      child.once('message', (message) => {
        served = true
        resolve((message as { url: string }).url)
      })
      child.once('exit', () => reject(new Error(`${name} did not start, see ${logFile}`)))
    })
    this.serving.catch(() => undefined) // those who wait for it are told
  }
}
