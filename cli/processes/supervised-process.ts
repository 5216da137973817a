/** One process of a group: started, started again when it dies, asked, stopped. */
import type { ChildProcess } from 'node:child_process'
import { setTimeout as sleep } from 'node:timers/promises'
import { backoffMs } from '../../shared/backoff.js'
import type { Environment } from '../../shared/config.js'
import type { GroupStatus, MetricValues, Waiting } from '../../shared/group.js'
import type { Logger } from '../../shared/log.js'
import { hasEnded, NotStarted, PROGRAM, startChild, stopChild } from '../child.js'
import { Channel } from './channel.js'
import { counted, keepCounts } from './figures.js'
import { hangs, type Patience } from './watchdog.js'

const FIRST_PAUSE_MS = 200
const MAX_PAUSE_MS = 10_000
/** Who has lived for so long did not die of its start. */
const LONG_LIFE_MS = 30_000
/** What a sink asks of Redis for its metrics may take 2 s. */
const ANSWER_TIMEOUT_MS = 2500
/** Above what a process gives itself to finish, below what is promised for the whole. */
const STOP_TIMEOUT_MS = 9000

export interface SupervisedOptions {
  name: 'ingest' | 'sink'
  /** Which of the group it is, from 0. */
  index: number
  /** What the command is given behind its name. */
  args: string[]
  environment: Environment
  /** What the process may ask of all of them. */
  status: GroupStatus
  /** With a process that does not answer. */
  patience: Patience
  log: Logger
}

export class SupervisedProcess {
  private child: ChildProcess | undefined
  private channel: Channel | undefined
  private exited: Promise<void> = Promise.resolve()
  private isServing = false
  private isStopping = false
  private failures = 0
  private port: number | undefined
  /** What its process said last. */
  private last: MetricValues = []
  /** What those before it had counted. */
  private past: MetricValues = []

  constructor(private readonly options: SupervisedOptions) {}

  get serves(): boolean {
    return this.isServing
  }

  /** What is started from now on shares `port`: whether anybody else has it is asked no more, for others of us do. */
  join(port: number): void {
    this.port = port
  }

  /**
   * From then on it is started again when it dies.
   *
   * @returns where it listens @throws NotStarted
   */
  async start(): Promise<string> {
    const url = await this.launch()
    void this.supervise()
    return url
  }

  /** Resolves when there is no process any more. */
  async stop(): Promise<void> {
    this.isStopping = true
    if (this.child && !(await stopChild(this.child, 'SIGTERM', STOP_TIMEOUT_MS))) {
      this.options.log.error({ process: this.options.index }, 'a process did not stop: it was killed')
    }
    await this.exited
  }

  /** What it and those before it have counted; gauges only if it answers. */
  async metrics(): Promise<MetricValues[]> {
    const { channel } = this
    if (!this.isServing || !channel) return [this.past, counted(this.last)]
    try {
      const said = (await channel.ask('metrics', ANSWER_TIMEOUT_MS)) as MetricValues
      if (this.channel === channel) this.last = said
      return [this.past, said]
    } catch {
      return [this.past, counted(this.last)]
    }
  }

  /** @returns what waits nevertheless @throws why it cannot do its job */
  async ready(): Promise<Waiting | undefined> {
    return (await this.channel?.ask('ready', ANSWER_TIMEOUT_MS)) as Waiting | undefined
  }

  private async launch(): Promise<string> {
    const { name, args, environment, status } = this.options
    const shared = this.port === undefined ? [] : ['--port', String(this.port)]
    const { process: child, serving } = startChild(PROGRAM, [name, ...args, ...shared], environment, 'inherit')
    const channel = new Channel(child, status)
    this.child = child
    this.channel = channel
    this.exited = new Promise((resolve) => {
      child.once('exit', () => {
        this.isServing = false
        resolve()
      })
      child.on('error', () => child.pid === undefined && resolve()) // then there is no 'exit'
    })
    const url = await serving
    this.isServing = !hasEnded(child)
    void this.watch(child, channel)
    return url
  }

  /** From when it serves until it is to stop: `stop` has a limit of its own. */
  private async watch(child: ChildProcess, channel: Channel): Promise<void> {
    const { log, index, patience } = this.options
    const isWatched = () => child.connected && !this.isStopping
    if (!(await hangs((timeoutMs) => channel.ask('alive', timeoutMs), isWatched, patience))) return
    log.error({ process: index, silentMs: patience.everyMs * patience.questions }, 'a process hangs: it is killed')
    child.kill('SIGKILL')
  }

  private async supervise(): Promise<void> {
    const { log, index } = this.options
    for (;;) {
      const born = Date.now()
      await this.exited
      const { exitCode, signalCode } = this.child!
      // Until this is done, what it had counted is in `last`: at no moment is it in neither.
      this.past = await keepCounts([this.past, this.last])
      this.last = []
      if (this.isStopping) return
      if (Date.now() - born > LONG_LIFE_MS) this.failures = 0
      const pauseMs = backoffMs(++this.failures, FIRST_PAUSE_MS, MAX_PAUSE_MS)
      log.error({ process: index, exitCode, signal: signalCode, pauseMs }, 'a process died: it is started again')
      await sleep(pauseMs)
      if (this.isStopping) return
      await this.launch().catch((error: Error) => {
        if (!(error instanceof NotStarted)) log.error({ process: index, err: error }, 'a process cannot be started')
      }) // it has ended: the loop begins anew
    }
  }
}
