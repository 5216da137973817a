/** Everything on this machine: PostgreSQL and Redis (unless their URLs are set), the schema, and ingest and sink as processes. */
import type { ChildProcess } from 'node:child_process'
import { mkdirSync, readFileSync } from 'node:fs'
import { rm, writeFile } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import getPort from 'get-port'
import { type DatabaseConfig, type Environment, givenEnvironment, OperatorError, readConfig } from '../shared/config.js'
import { migrate } from '../shared/schema.js'
import { describeEnd, lastLines, NotStarted, PROGRAM, startChild, stopChild } from './child.js'
import { startPostgres } from './local-postgres.js'
import { startRedis } from './local-redis.js'
import { type LocalServer, processInfo } from './local-server.js'

/** Preferred ports: not the usual ones, which a developer's own servers may hold. */
const POSTGRES_PORT = 54_320
const REDIS_PORT = 63_790
/** A service that died is started again; one that dies over and over, each time after a short life, is not. */
const MAX_RESTARTS = 5
const SHORT_LIFE_MS = 60_000
const RESTART_PAUSE_MS = 500

export interface StackOptions {
  dataDir: string
  say: (line: string) => void
  /** Settings of ingest and sink that serve here and give way to what the environment sets. */
  defaults?: Environment
}

export interface Stack {
  database: DatabaseConfig
  ingestUrl: string
  sinkUrl: string
  /** A line each: what runs where. */
  describe: string[]
  /** Resolves with the reason when a part died that cannot be started again. */
  failed: Promise<string>
  stop(): Promise<void>
}

/** @throws OperatorError when a part cannot be started; what had been started is stopped again */
export async function startStack(options: StackOptions): Promise<Stack> {
  const dataDir = resolve(options.dataDir)
  mkdirSync(dataDir, { recursive: true, mode: 0o755 })
  const release = await takeFolder(dataDir)
  const started: { stop(): Promise<void> }[] = []
  const stop = async () => {
    for (const part of started.reverse().splice(0)) await part.stop()
    await release()
  }
  try {
    const given = givenEnvironment()
    const [redis, postgres] = await startStores(dataDir, options.say, given, started)
    const redisUrl = redis?.url ?? given.REDIS_URL!
    const { DATABASE_SCHEMA } = readConfig(given)
    const database = { DATABASE_URL: postgres?.url ?? given.DATABASE_URL!, DATABASE_SCHEMA }
    for (const name of await migrate(database, options.say)) options.say(`migrated ${name}`)

    const environment: Environment = {
      SPOOL_DIR: join(dataDir, 'spool'),
      ...options.defaults,
      ...given,
      REDIS_URL: redisUrl,
      ...database,
      INGEST_PORT: given.INGEST_PORT ?? String(await getPort({ port: 8080, host: '127.0.0.1' })),
      SINK_METRICS_PORT: given.SINK_METRICS_PORT ?? String(await getPort({ port: 9464, host: '127.0.0.1' })),
    }
    readConfig(environment) // a wrong setting is told here, not in a child's log
    const results = await Promise.allSettled([
      startService('ingest', dataDir, environment, options.say),
      startService('sink', dataDir, environment, options.say),
    ])
    const services = results.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []))
    started.push(...services.toReversed()) // ingest stops first: what it still takes in, the sink still writes
    for (const result of results) if (result.status === 'rejected') throw result.reason
    const [ingest, sink] = services as [Service, Service]
    await writeFile(
      join(dataDir, 'up.json'),
      JSON.stringify({
        ...{ pid: process.pid, REDIS_URL: redisUrl, ...database },
        LEGACY_CALL_SESSIONS: given.LEGACY_CALL_SESSIONS,
        SPOOL_DIR: resolve(environment.SPOOL_DIR!),
        ...(given.ARCHIVE_DIR ? { ARCHIVE_DIR: resolve(given.ARCHIVE_DIR) } : {}),
      }),
    )
    return {
      database,
      ingestUrl: ingest.url,
      sinkUrl: sink.url,
      describe: [
        `ingest      ${ingest.url}, WebSocket ${ingest.url.replace('http', 'ws')}/v1/stream`,
        `sink        ${sink.url}/metrics`,
        `PostgreSQL  ${database.DATABASE_URL}${DATABASE_SCHEMA === 'public' ? '' : `, schema ${DATABASE_SCHEMA}`}`,
        `Redis       ${redisUrl}`,
        `data, logs  ${dataDir}`,
      ],
      failed: Promise.race(
        [ingest.failed, sink.failed, redis?.exited, postgres?.exited].filter((promise) => promise !== undefined),
      ),
      stop,
    }
  } catch (error) {
    await stop()
    throw error
  }
}

/** Where a `calltape up` that runs on this folder keeps calls, for commands that look there. */
export function runningStack(dataDir: string): Environment {
  try {
    const { pid, REDIS_URL, SPOOL_DIR, ARCHIVE_DIR, ...database } = JSON.parse(
      readFileSync(join(dataDir, 'up.json'), 'utf8'),
    )
    if (!isAlive(pid)) return {}
    const given = givenEnvironment()
    return {
      REDIS_URL,
      ...((given.REDIS_URL ?? REDIS_URL) === REDIS_URL ? { SPOOL_DIR, ARCHIVE_DIR } : {}), // of what is in this Redis
      ...(given.DATABASE_URL ? {} : database), // what is in one database is in no other
    }
  } catch {
    return {} // none was started here
  }
}

/** Two stacks on one folder would run two servers on the same data. */
async function takeFolder(dataDir: string): Promise<() => Promise<void>> {
  const file = join(dataDir, 'up.pid')
  const release = () => rm(file, { force: true })
  for (;;) {
    try {
      await writeFile(file, String(process.pid), { flag: 'wx' })
      return async () => {
        await rm(join(dataDir, 'up.json'), { force: true })
        await release()
      }
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error
    }
    const pid = Number(readFileSync(file, 'utf8'))
    if (isCalltape(pid))
      throw new OperatorError(`calltape already runs on ${dataDir} (process ${pid}): stop it, or choose --data`)
    await release() // its process was killed
  }
}

/** A process id in a file may be another's by now: after a restart of the machine, or in a container, ours. */
function isCalltape(pid: number): boolean {
  return pid !== process.pid && /calltape|vitest/.test(processInfo(pid).args)
}

function isAlive(pid: number): boolean {
  try {
    return pid > 0 && process.kill(pid, 0)
  } catch {
    return false
  }
}

async function startStores(
  dataDir: string,
  say: (line: string) => void,
  given: Environment,
  started: { stop(): Promise<void> }[],
): Promise<[LocalServer | undefined, LocalServer | undefined]> {
  const start = async (starting: Promise<LocalServer> | undefined) => {
    const server = await starting
    if (server) started.push(server)
    return server
  }
  const results = await Promise.allSettled([
    start(given.REDIS_URL ? undefined : startRedis({ dataDir: join(dataDir, 'redis'), port: REDIS_PORT, say })),
    start(
      given.DATABASE_URL ? undefined : startPostgres({ dataDir: join(dataDir, 'postgres'), port: POSTGRES_PORT, say }),
    ),
  ])
  // Only once both have come to an end, so that the one that did start is known and can be stopped.
  for (const result of results) {
    if (result.status === 'rejected')
      throw new OperatorError((result.reason as Error).message, { cause: result.reason })
  }
  return results.map((result) => (result as PromiseFulfilledResult<LocalServer | undefined>).value) as [
    LocalServer | undefined,
    LocalServer | undefined,
  ]
}

export interface Service {
  url: string
  pid(): number
  failed: Promise<string>
  stop(): Promise<void>
}

export async function startService(
  name: 'ingest' | 'sink',
  dataDir: string,
  environment: Environment,
  say: (line: string) => void,
): Promise<Service> {
  const logFile = join(dataDir, `${name}.log`)
  let stopping = false
  let restarts = 0
  let child: ChildProcess
  let fail = (_reason: string) => {}
  const failed = new Promise<string>((resolve) => {
    fail = resolve
  })

  const launch = async (): Promise<string> => {
    const born = Date.now()
    const started = startChild(PROGRAM, [name], environment, logFile)
    child = started.process
    const url = await started.serving.catch((error: Error) => {
      throw error instanceof NotStarted ? new OperatorError(`${name} did not start:\n${lastLines(logFile)}`) : error
    })
    child.once('exit', (code, signal) => {
      if (Date.now() - born > SHORT_LIFE_MS) restarts = 0
      if (!stopping) void restart(describeEnd(code, signal))
    })
    return url
  }
  const restart = async (reason: string) => {
    if (++restarts > MAX_RESTARTS) return fail(`${name} died ${restarts} times: ${reason}\n${lastLines(logFile)}`)
    say(`${name} died (${reason}); starting it again`)
    await sleep(RESTART_PAUSE_MS)
    if (!stopping) await launch().catch((error: Error) => fail(error.message))
  }

  const url = await launch()
  return {
    url,
    pid: () => child.pid!,
    failed,
    async stop() {
      stopping = true
      await stopChild(child)
    },
  }
}
