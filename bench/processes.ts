/** The processes that are measured. None is started again: what dies makes its scenario fail. */
import { join } from 'node:path'
import { describeEnd, lastLines, PROGRAM, startChild, stopChild } from '../cli/child.js'
import type { Environment } from '../shared/config.js'
import type { Bench } from './context.js'
import type { Pids } from './machine.js'

export interface Running {
  /** http://host:port; empty for one that listens nowhere. */
  url: string
  pid: number
  stop(): Promise<void>
}

/** Kills each of those that were not stopped. */
const started = new Set<() => Promise<unknown>>()

/** After a scenario that failed, and at the end: none may go on. */
export async function killAll(): Promise<void> {
  await Promise.all([...started].map((kill) => kill()))
  started.clear()
}

/** Starts a program that tells its URL over IPC once it serves. @param path below the package's root */
export async function startProgram(
  bench: Bench,
  path: string,
  args: string[],
  environment: Environment,
): Promise<Running> {
  const logFile = join(bench.stores.folder, `${args.join('-')}.log`)
  const { process: child, serving } = startChild(path, args, environment, logFile)
  let isWanted = true
  const kill = () => {
    isWanted = false
    return stopChild(child, 'SIGKILL')
  }
  started.add(kill)
  const failure = (why: string) => `${args.join(' ')} ended (${why}):\n${lastLines(logFile)}`
  const url = await serving.catch((error: Error) => {
    throw new Error(failure(error.message))
  })
  child.once('exit', (code, signal) => {
    if (isWanted) bench.death ??= failure(describeEnd(code, signal))
  })
  return {
    url,
    pid: child.pid!,
    async stop() {
      isWanted = false
      started.delete(kill)
      await stopChild(child)
    },
  }
}

/** Ingests or sinks of calltape's. @param more settings of theirs: another store than the bench's, say */
export function startServices(
  bench: Bench,
  role: 'ingest' | 'sink',
  count = 1,
  more: Environment = {},
): Promise<Running[]> {
  const environment = {
    REDIS_URL: bench.stores.redis.url,
    ...bench.stores.database,
    // A port each, which the load generator spreads its connections over: a kernel may spread 50 of them unevenly.
    INGEST_PORT: '0',
    SINK_METRICS_PORT: '0',
    LOG_LEVEL: 'warn',
    ...more,
  }
  const start = () => startProgram(bench, PROGRAM, [role], environment)
  return Promise.all(Array.from({ length: count }, start))
}

export const pidsOf = (running: Running[]) => running.map(({ pid }) => pid)

/** All that is at work for the whole pipeline. */
export interface Pipeline {
  urls: string[]
  pids: Pids
  stop(): Promise<void>
}

export async function startPipeline(bench: Bench): Promise<Pipeline> {
  const [ingests, sinks] = await Promise.all([startServices(bench, 'ingest'), startServices(bench, 'sink')])
  return {
    urls: ingests.map(({ url }) => url),
    pids: { ...storePids(bench), ingest: pidsOf(ingests), sink: pidsOf(sinks) },
    async stop() {
      await Promise.all(ingests.map((ingest) => ingest.stop())) // first: what it still takes in, the sink still writes
      await Promise.all(sinks.map((sink) => sink.stop()))
    },
  }
}

/** Those who are there in every scenario. */
export function storePids({ stores }: Bench): Pids {
  return { redis: [stores.redis.pid], postgres: [stores.postgres.pid], client: [process.pid] }
}
