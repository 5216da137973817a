/** Real servers for the suites: REDIS_URL and DATABASE_URL when set, else a Redis and a PostgreSQL of our own for this run. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ProvidedContext } from 'vitest'
import type { TestProject } from 'vitest/node'
import { givenEnvironment } from '../../shared/config.js'
import { createPool } from '../../shared/postgres.js'
import { migrate } from '../../shared/schema.js'
import type { ClusterPool } from './cluster-database.js'
import { type Images, launchPostgres, launchRedis } from './store-server.js'

export const TEMPLATE_DATABASE = 'calltape_test_template'

declare module 'vitest' {
  interface ProvidedContext {
    redisUrl: string
    databaseUrl: string
    /** How long `npm run test:faults` goes on; absent in `npm test`. */
    longFaults?: { kills: number; turns: number; modelRuns: number }
    /** `npm run test:containers`: every store is a container, of these; absent in `npm test`. */
    images?: Images
    /** `npm run test:cluster`; absent in `npm test`. */
    cluster?: boolean
    /** Then `freshRedis` gives one of these. */
    clusters?: ClusterPool
  }
}

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const given = givenEnvironment()
  const say = (line: string) => process.stderr.write(`${line}\n`)
  const { images, cluster } = project.config.provide as Partial<ProvidedContext>
  const redis = given.REDIS_URL ? undefined : await launchRedis(images, { say })
  const postgres = given.DATABASE_URL ? undefined : await launchPostgres(images, { say })
  const clusters = cluster ? await startClusters(say) : undefined
  if (clusters) project.provide('clusters', clusters.pool)
  const databaseUrl = given.DATABASE_URL ?? postgres!.url
  project.provide('redisUrl', given.REDIS_URL ?? redis!.url)
  project.provide('databaseUrl', databaseUrl)

  // Each suite's database is a copy of this one: much faster than migrating every time.
  const inPublic = (DATABASE_URL: string) => ({ DATABASE_URL, DATABASE_SCHEMA: 'public' })
  const pool = createPool(inPublic(databaseUrl), 'test-setup', 1)
  await pool.query(`DROP DATABASE IF EXISTS ${TEMPLATE_DATABASE}`)
  await pool.query(`CREATE DATABASE ${TEMPLATE_DATABASE}`)
  const template = new URL(databaseUrl)
  template.pathname = `/${TEMPLATE_DATABASE}`
  await migrate(inPublic(template.href), say)
  return async () => {
    await pool.query(`DROP DATABASE ${TEMPLATE_DATABASE}`)
    await pool.end()
    await redis?.stop()
    await clusters?.stop()
    await postgres?.stop()
  }
}

/** A worker has one, or two at a time; no test may wait for another suite's. */
const CLUSTERS = 6

async function startClusters(say: (line: string) => void) {
  const { TestCluster } = await import('./test-cluster.js')
  const folder = await mkdtemp(join(tmpdir(), 'calltape-test-clusters-'))
  const started: Awaited<ReturnType<typeof TestCluster.start>>[] = []
  for (let n = 0; n < CLUSTERS; n++) started.push(await TestCluster.start())
  say(`${CLUSTERS} Clusters of three masters and three replicas run`)
  const pool: ClusterPool = { folder, urls: started.map(({ url }) => url) }
  return {
    pool,
    async stop() {
      await Promise.all(started.map((each) => each.stop()))
      await rm(folder, { recursive: true, force: true })
    },
  }
}
