/** Real servers for the suites: REDIS_URL and DATABASE_URL when set, else a Redis and a PostgreSQL of our own for this run. */
import { chmod, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestProject } from 'vitest/node'
import { startPostgres } from '../../cli/local-postgres.js'
import { startRedis } from '../../cli/local-redis.js'
import { givenEnvironment } from '../../shared/config.js'
import { createPool } from '../../shared/postgres.js'
import { migrate } from '../../shared/schema.js'

export const TEMPLATE_DATABASE = 'calltape_test_template'

declare module 'vitest' {
  interface ProvidedContext {
    redisUrl: string
    databaseUrl: string
    /** How long `npm run test:faults` goes on; absent in `npm test`. */
    longFaults?: { kills: number; turns: number; modelRuns: number }
  }
}

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const given = givenEnvironment()
  const folder = await mkdtemp(join(tmpdir(), 'calltape-test-'))
  await chmod(folder, 0o711) // as root, PostgreSQL runs as another user, who has to get through
  const say = (line: string) => process.stderr.write(`${line}\n`)
  const redis = given.REDIS_URL ? undefined : await startRedis({ dataDir: join(folder, 'redis'), say })
  const postgres = given.DATABASE_URL ? undefined : await startPostgres({ dataDir: join(folder, 'postgres'), say })
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
    await postgres?.stop()
    await rm(folder, { recursive: true, force: true })
  }
}
