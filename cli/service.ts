/** `calltape ingest` and `calltape sink`: one process, or one that starts several and keeps them running. */
import { availableParallelism } from 'node:os'
import { type Config, type Environment, givenEnvironment, OperatorError, readConfig } from '../shared/config.js'
import { armCrash } from '../shared/crash.js'
import type { Group, Member, Waiting } from '../shared/group.js'
import { createLog, type Logger } from '../shared/log.js'
import { SETTINGS } from '../shared/settings.js'
import { changedSettings } from '../shared/settings-shown.js'
import { NotStarted } from './child.js'
import { Channel } from './processes/channel.js'
import { ProcessGroup } from './processes/group.js'

type Name = 'ingest' | 'sink'

/** What the command line says. */
export interface ServiceOptions {
  processes?: string
  /** Of a process that was started for a group: which, and of how many, `0/4`. */
  member?: string
  /** Which it shares. */
  port?: string
}

/** Of all processes, for one of them to be told: a little longer than they are given themselves. */
const STATUS_TIMEOUT_MS = 3500
const SIGNALS = ['SIGTERM', 'SIGINT'] as const

/**
 * Runs until SIGTERM or Ctrl-C, or until the process that started it (`calltape up`, or that of a group) is gone.
 *
 * @throws OperatorError when it cannot start
 */
export async function runService(name: Name, options: ServiceOptions): Promise<void> {
  const count = name === 'ingest' ? 'INGEST_PROCESSES' : 'SINK_PROCESSES'
  const asked = options.processes === undefined ? {} : { [count]: requireCount(count, options.processes) }
  const given = { ...givenEnvironment(), ...asked }
  const config = readConfig(given)
  const log = createLog(name, config.LOG_LEVEL)
  if (options.member !== undefined) return runMember(name, config, options, log)
  log.info({ settings: changedSettings(name, config, given) }, 'settings other than the defaults')
  const size = config[count] || availableParallelism()
  if (size > 1) return runGroup(name, size, config, given, log)
  armCrash(config.CRASH_AT)
  const service = await startOne(name, config, log)
  tellUrl(service.url)
  await stopRequested()
  await service.stop()
  process.exit() // what a connection that hangs still holds must not keep the process
}

/** @throws OperatorError that names the option: who gave it need not know its variable */
function requireCount(name: 'INGEST_PROCESSES' | 'SINK_PROCESSES', text: string): string {
  const { error } = SETTINGS[name].type.safeParse(text.trim() === '' ? Number.NaN : text)
  if (error) throw new OperatorError(`--processes ${error.issues[0]!.message}, got ${text}`)
  return text
}

async function startOne(name: Name, config: Config, log: Logger, group?: Group): Promise<Member> {
  if (name === 'ingest') return (await import('../ingest/ingest.js')).startIngest(config, log, group)
  return (await import('../sink/sink.js')).startSink(config, log, group)
}

/** To whoever started this process, if he waits for it. */
function tellUrl(url: string): void {
  if (process.connected) process.send?.({ url })
}

/** Resolves when it is to stop. */
function stopRequested(): Promise<void> {
  return new Promise((resolve) => {
    for (const signal of SIGNALS) process.once(signal, () => resolve())
    if (!process.send) return
    process.once('disconnect', () => resolve())
    if (!process.connected) resolve() // while it was starting
  })
}

/** One of several. */
async function runMember(name: Name, config: Config, options: ServiceOptions, log: Logger): Promise<void> {
  if (!process.send) throw new OperatorError('--member is for the processes that --processes starts')
  armCrash(config.CRASH_AT)
  const [index = 0, size = 1] = options.member!.split('/').map(Number)
  let member: Member | undefined
  const served = () => (member ? Promise.resolve(member) : Promise.reject(new Error('it is starting')))
  const channel = new Channel(process as NodeJS.Process & { send: NonNullable<NodeJS.Process['send']> }, {
    metrics: async () => (await served()).metrics(),
    ready: async () => (await served()).ready(),
  })
  const group: Group = {
    index,
    size,
    port: options.port === undefined ? undefined : Number(options.port),
    metrics: async () => (await channel.ask('metrics', STATUS_TIMEOUT_MS)) as string,
    ready: async () => (await channel.ask('ready', STATUS_TIMEOUT_MS)) as Waiting | undefined,
  }
  member = await startOne(name, config, log.child({ process: index }), group)
  tellUrl(member.url)
  await stopRequested()
  await member.stop()
  process.exit()
}

/** Starts them, and starts again those that die. */
async function runGroup(name: Name, size: number, config: Config, given: Environment, log: Logger): Promise<void> {
  const stop = stopRequested()
  const group = new ProcessGroup({ name, size, environment: given, log })
  const server = name === 'sink' ? await (await import('../sink/health.js')).serveHealth(config, group) : undefined
  const starting = group.start()
  starting.catch(() => undefined) // looked at below
  const isStopped = await Promise.race([stop.then(() => true), starting.then(() => false)]).catch((error: unknown) => {
    if (!(error instanceof NotStarted)) throw error
    log.error({ reason: error.message }, `${name} cannot start`)
    process.exit(error.exitCode ?? 1) // what is wrong, the process has said itself
  })
  if (!isStopped) {
    const port = (server?.address() as { port: number } | undefined)?.port
    const url = port === undefined ? await starting : `http://${config.SINK_METRICS_HOST}:${port}`
    log.info({ url, processes: size }, `${name} runs`)
    tellUrl(url)
    await stop
  }
  await group.stop()
  process.exit()
}
