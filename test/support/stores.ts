/** A fresh database and a fresh Redis database for one suite or test, and services that run on them in this process. */
import { randomBytes } from 'node:crypto'
import type { Redis } from 'ioredis'
import { inject } from 'vitest'
import { type Ingest, startIngest } from '../../ingest/ingest.js'
import { type Config, childEnvironment, type DatabaseConfig, readConfig } from '../../shared/config.js'
import { Partitions } from '../../shared/keys.js'
import { createLog } from '../../shared/log.js'
import { createPool, type Pool } from '../../shared/postgres.js'
import { connectRedis } from '../../shared/redis.js'
import { type Sink, startSink } from '../../sink/sink.js'
import { takeCluster } from './cluster-database.js'
import { TEMPLATE_DATABASE } from './servers.js'
import { launchRedis, type StoreServer } from './store-server.js'

export { until } from './until.js'

export const log = createLog('test', childEnvironment().TEST_LOG_LEVEL ?? 'silent')

export interface RedisDatabase {
  url: string
  client: Redis
  partitions: Partitions
  drop(): Promise<void>
}

/** Which of the server's databases is free is told by Redis itself: suites run in several processes. */
export async function freshRedis(): Promise<RedisDatabase> {
  const clusters = inject('clusters')
  if (clusters) {
    const { url, client, giveBack } = await takeCluster(clusters, log)
    // What suites ask of it, a Cluster's client can answer, too; suites that ask for more are not run on one.
    return { url, client: client as unknown as Redis, partitions: new Partitions(64), drop: giveBack }
  }
  const url = new URL(inject('redisUrl'))
  const counter = (await connectRedis(url.href, log)) as Redis
  const databases = Number(((await counter.config('GET', 'databases')) as string[])[1])
  let client: Redis | undefined
  for (let tries = 0; client === undefined; tries++) {
    if (tries === databases) throw new Error(`${url.host} has no empty database for a test`)
    url.pathname = `/${1 + ((await counter.incr('calltape-test:databases')) % (databases - 1))}`
    const candidate = (await connectRedis(url.href, log)) as Redis
    if ((await candidate.dbsize()) === 0) client = candidate
    else candidate.disconnect() // somebody's data, or another suite's
  }
  counter.disconnect()
  return {
    url: url.href,
    client,
    partitions: new Partitions(64),
    async drop() {
      await client.flushdb()
      client.disconnect()
    },
  }
}

/** A Redis of the suite's own, for what reaches beyond one database: channels, scripts, other connections, a Cluster. */
export function ownRedis(mode: 'single' | 'cluster' = 'single', ...args: string[]): Promise<StoreServer> {
  return launchRedis(inject('images'), { cluster: mode === 'cluster', args })
}

export interface Database {
  url: string
  /** What `createPool` and `migrate` want. */
  config: DatabaseConfig
  pool: Pool
  drop(): Promise<void>
}

export const inPublic = (DATABASE_URL: string): DatabaseConfig => ({ DATABASE_URL, DATABASE_SCHEMA: 'public' })

/** Suites that keep a small machine busy must not fail for it. */
export function patientPool(url: string, name: string, max: number): Pool {
  const pool = createPool(inPublic(url), name, max)
  pool.options.connectionTimeoutMillis = 30_000
  return pool
}

/** @param migrated false for an empty database */
export async function freshDatabase(migrated = true): Promise<Database> {
  const admin = patientPool(inject('databaseUrl'), 'test-admin', 1)
  const name = `calltape_test_${randomBytes(6).toString('hex')}`
  await admin.query(`CREATE DATABASE ${name} ${migrated ? `TEMPLATE ${TEMPLATE_DATABASE}` : ''}`)
  const url = new URL(inject('databaseUrl'))
  url.pathname = `/${name}`
  const pool = patientPool(url.href, 'test', 4)
  return {
    url: url.href,
    config: inPublic(url.href),
    pool,
    async drop() {
      await pool.end()
      await admin.query(`DROP DATABASE ${name} WITH (FORCE)`)
      await admin.end()
    },
  }
}

export interface TestStack {
  redis: RedisDatabase
  database: Database
  config: Config
  ingest: Ingest
  sinks: Sink[]
  /** ws://… for the client */
  wsUrl: string
  /** Stops and removes everything. */
  end(): Promise<void>
}

/** Ingest and sinks on fresh stores, on ports that the system picks. */
export async function startTestStack(environment: Record<string, string> = {}, sinkCount = 1): Promise<TestStack> {
  const [redis, database] = await Promise.all([freshRedis(), freshDatabase()])
  const config = readConfig({
    REDIS_URL: redis.url,
    DATABASE_URL: database.url,
    INGEST_PORT: '0',
    SINK_METRICS_PORT: '0',
    ...environment,
  })
  const ingest = await startIngest(config, log)
  const sinks = await Promise.all(Array.from({ length: sinkCount }, () => startSink(config, log)))
  return {
    redis,
    database,
    config,
    ingest,
    sinks,
    wsUrl: ingest.url.replace('http', 'ws'),
    async end() {
      await ingest.stop()
      await Promise.all(sinks.map((sink) => sink.stop()))
      await Promise.all([redis.drop(), database.drop()])
    },
  }
}
