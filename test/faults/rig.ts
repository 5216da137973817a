/** What a fault suite breaks: stores, ingests behind a load balancer, sinks, all of them processes, and their end. */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Cluster } from 'ioredis'
import { expect, type TestContext } from 'vitest'
import type { Environment } from '../../shared/config.js'
import { Partitions } from '../../shared/keys.js'
import type { Pool } from '../../shared/postgres.js'
import { connectRedis, type RedisClient } from '../../shared/redis.js'
import { migrate } from '../../shared/schema.js'
import { askAll } from '../support/cluster-database.js'
import type { KillableStore } from '../support/killable-stores.js'
import { figure } from '../support/metrics.js'
import { lastingPort, Service } from '../support/processes.js'
import { Relay } from '../support/relay.js'
import { freshDatabase, freshRedis, inPublic, log, patientPool, until } from '../support/stores.js'

export interface RigPlan {
  /** Of which test: it prints the logs when that fails, and ends with it. */
  context: Pick<TestContext, 'onTestFinished' | 'task'>
  ingests?: number
  sinks?: number
  /** Of all processes. */
  environment?: Environment
  /** Added for each ingest, and for each sink, in turn. */
  ingestEnvironments?: Environment[]
  sinkEnvironments?: Environment[]
  /** Not the run's shared ones. */
  redis?: Pick<KillableStore, 'url'>
  postgres?: KillableStore
  unsupervised?: boolean
  /** A relay in front of a store, for one kind of process. */
  relays?: { ingestRedis?: boolean; sinkRedis?: boolean; sinkPostgres?: 'all' | 'first' }
}

const LOG_LINES = 25
/** Of a test: many processes, on a machine that may have other things to do. */
export const TIMEOUT_MS = 120_000

export interface Rig {
  redisUrl: string
  redis: RedisClient
  partitions: Partitions
  databaseUrl: string
  pool: Pool
  ingests: Service[]
  sinks: Service[]
  /** In front of the ingests. */
  balancer: Relay
  /** Of the balancer, http://… */
  url: string
  relays: { ingestRedis: Relay | undefined; sinkRedis: Relay | undefined; sinkPostgres: Relay | undefined }
}

export async function startRig(plan: RigPlan): Promise<Rig> {
  const folder = mkdtempSync(join(tmpdir(), 'calltape-faults-'))
  const ends: (() => Promise<unknown>)[] = []
  plan.context.onTestFinished(async () => {
    for (const end of ends.reverse()) await end()
    if (plan.context.task.result?.state === 'fail') printLogs(folder)
    rmSync(folder, { recursive: true, force: true })
  }, 60_000)
  const stores = await openStores(plan, ends)
  const relayed = async (wanted: unknown, url: string) => {
    if (!wanted) return undefined
    const relay = await Relay.start(url)
    ends.push(() => relay.stop())
    return relay
  }
  const relays = {
    ingestRedis: await relayed(plan.relays?.ingestRedis, stores.redisUrl),
    sinkRedis: await relayed(plan.relays?.sinkRedis, stores.redisUrl),
    sinkPostgres: await relayed(plan.relays?.sinkPostgres, stores.databaseUrl),
  }
  const service = (name: 'ingest' | 'sink', index: number, environment: Environment) => {
    const logFile = join(folder, `${name}-${index + 1}.log`)
    const unsupervised = plan.unsupervised ?? false
    const each = new Service({ name, logFile, unsupervised, environment: { ...plan.environment, ...environment } })
    ends.push(() => each.end())
    return each
  }
  const ports = await Promise.all(Array.from({ length: plan.ingests ?? 2 }, lastingPort))
  const ingests = ports.map((port, index) => {
    const REDIS_URL = relays.ingestRedis?.url ?? stores.redisUrl
    return service('ingest', index, { REDIS_URL, INGEST_PORT: String(port), ...plan.ingestEnvironments?.[index] })
  })
  const sinks = Array.from({ length: plan.sinks ?? 2 }, (_, index) => {
    const REDIS_URL = relays.sinkRedis?.url ?? stores.redisUrl
    const isRelayed = plan.relays?.sinkPostgres === 'all' || index === 0
    const DATABASE_URL = (isRelayed && relays.sinkPostgres?.url) || stores.databaseUrl
    const environment = { REDIS_URL, DATABASE_URL, SINK_METRICS_PORT: '0', ...plan.sinkEnvironments?.[index] }
    return service('sink', index, environment)
  })
  const [first, ...others] = ports.map((port) => `http://127.0.0.1:${port}`)
  const balancer = await Relay.start(first ?? 'http://127.0.0.1:1', ...others)
  ends.push(() => balancer.stop())
  const unarmed = [...ingests, ...sinks].filter((each) => !each.options.environment.CRASH_AT)
  await Promise.all(unarmed.map((each) => each.serves()))
  return { ...stores, ingests, sinks, balancer, url: balancer.url.replace(/\/$/, ''), relays }
}

type Stores = Pick<Rig, 'redisUrl' | 'redis' | 'partitions' | 'databaseUrl' | 'pool'>

async function openStores(plan: RigPlan, ends: (() => Promise<unknown>)[]): Promise<Stores> {
  let stores: Omit<Stores, 'databaseUrl' | 'pool'>
  if (plan.redis) {
    const redis = await connectRedis(plan.redis.url, log)
    if (redis instanceof Cluster) askAll(redis)
    ends.push(async () => {
      await redis.flushall()
      redis.disconnect()
    })
    stores = { redisUrl: plan.redis.url, redis, partitions: new Partitions(64) }
  } else {
    const { url, client, partitions, drop } = await freshRedis()
    ends.push(drop)
    stores = { redisUrl: url, redis: client, partitions }
  }
  if (!plan.postgres) {
    const { url, pool, drop } = await freshDatabase()
    ends.push(drop)
    return { ...stores, databaseUrl: url, pool }
  }
  const { url } = plan.postgres
  await migrate(inPublic(url))
  const pool = patientPool(url, 'test', 4)
  ends.push(() => pool.end())
  return { ...stores, databaseUrl: url, pool }
}

function printLogs(folder: string): void {
  for (const file of readdirSync(folder)) {
    const lines = readFileSync(join(folder, file), 'utf8').trimEnd().split('\n').slice(-LOG_LINES)
    process.stderr.write(`--- ${file} ends:\n${lines.join('\n')}\n`)
  }
}

/** @returns the calls that wait for a sink, and those that one works on */
export async function backlogOf({ redis, partitions }: Rig): Promise<{ ready: number; leased: number }> {
  const sum = async (of: 'ready' | 'leased') => {
    const counts = await Promise.all(partitions.all.map((p) => redis.zcard(p[of])))
    return counts.reduce((a, b) => a + b, 0)
  }
  return { ready: await sum('ready'), leased: await sum('leased') }
}

/** Then nothing will be written any more. */
export async function settled(rig: Rig, timeoutMs = 20_000): Promise<void> {
  const isEmpty = async () => {
    const backlog = await backlogOf(rig).catch(() => undefined) // a Redis that has just come back, or will soon
    return backlog !== undefined && backlog.ready + backlog.leased === 0
  }
  await until('nothing is ready or leased', isEmpty, timeoutMs)
}

/** @param name what follows `calltape_sink_` @throws when it does not answer */
export async function figureOf(sink: Service, name: string): Promise<number> {
  return figure(await sink.serves(), `calltape_sink_${name}`)
}

/** Whatever the test did to them, no process died of it by itself. */
export function expectNoUnexplainedDeaths({ ingests, sinks }: Rig): void {
  const deaths = [...ingests, ...sinks].flatMap((each) =>
    each.unexplainedDeaths.map((death) => ({ process: each.options.name, ...death })),
  )
  expect(deaths).toEqual([])
}
