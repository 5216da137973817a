/** What every scenario works with: the stores, what was asked for, where its figures go. */
import { chmod, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Redis } from 'ioredis'
import { startPostgres } from '../cli/local-postgres.js'
import { startRedis } from '../cli/local-redis.js'
import type { LocalServer } from '../cli/local-server.js'
import { createLog } from '../shared/log.js'
import { createPool, type Pool } from '../shared/postgres.js'
import { connectRedis } from '../shared/redis.js'
import { migrate } from '../shared/schema.js'
import type { Progress } from './progress.js'
import type { Row } from './report.js'
import type { Measured } from './targets.js'

export interface BenchOptions {
  /** Of a scenario; those that are slow take fewer. */
  calls: number
  /** Of a call. */
  turns: number
  /** Of a scenario with a fixed rate. */
  seconds: number
  /** Of a scenario at full speed: the median counts. */
  rounds: number
  /** How many calls are open, in one pass after the other. */
  open: number[]
  /** As little as shows that all of it works. */
  quick: boolean
}

export interface Stores {
  redis: LocalServer
  postgres: LocalServer
  /** With its tables in `public`. */
  database: { DATABASE_URL: string; DATABASE_SCHEMA: string }
  /** Logs are in there, too. */
  folder: string
  pool: Pool
  client: Redis
}

const BENCH_SETTINGS = {
  track_commit_timestamp: 'on', // tells when a row was there for others to see, to the microsecond
  max_wal_size: '4GB', // no checkpoint in the middle of a round, which would hit one and not the other
  checkpoint_timeout: '30min',
}

export class Bench {
  readonly rows: Row[] = []
  /** What the targets are about. */
  readonly measured: Measured = { peerMicros: {} }
  /** Figures that are no rows, for the JSON. */
  readonly extra: Record<string, unknown> = {}
  /** What is to be printed besides the table. */
  readonly appendix: string[] = []
  /** A process that was started and has ended by itself. */
  death: string | undefined
  /** Nothing more can be measured: a store has ended. */
  isBroken = false
  private running: Stores | undefined
  private starting: Promise<void> | undefined
  private readonly ends: (() => Promise<unknown>)[] = []
  private readonly memos = new Map<unknown, Promise<unknown>>()

  constructor(
    readonly options: BenchOptions,
    readonly progress: Progress,
  ) {}

  get stores(): Stores {
    if (!this.running) throw new Error('the stores were not started')
    return this.running
  }

  /** Of the stores, and how they are set. */
  get versions(): string[] {
    if (!this.running) return []
    const [redis, postgres] = [this.running.redis, this.running.postgres].map(
      ({ describe }) => describe.split(' on ')[0]!,
    )
    return [`${redis}, AOF everysec`, `${postgres}`]
  }

  /** What is to be done when the bench ends, however it ends; the last one first. */
  atEnd(end: () => Promise<unknown>): void {
    this.ends.push(end)
  }

  /** Stops and removes everything. May be called again: what is under way is waited for. */
  dispose(): Promise<void> {
    return this.once('dispose', async () => {
      await this.starting?.catch(() => undefined) // a server that is half started could not be stopped
      for (const end of this.ends.splice(0).reverse()) {
        await end().catch((error: Error) => this.progress.say(`while cleaning up: ${error.message}`))
      }
    })
  }

  /** The result of `work`, which is done the first time only. */
  once<T>(key: unknown, work: () => Promise<T>): Promise<T> {
    const known = this.memos.get(key) as Promise<T> | undefined
    const result = known ?? work()
    this.memos.set(key, result)
    return result
  }

  startStores(): Promise<void> {
    this.starting ??= this.launchStores()
    return this.starting
  }

  private async launchStores(): Promise<void> {
    const say = (line: string) => this.progress.say(line)
    const folder = await mkdtemp(join(tmpdir(), 'calltape-bench-'))
    this.atEnd(() => rm(folder, { recursive: true, force: true }))
    await chmod(folder, 0o711) // as root, PostgreSQL runs as another user, who has to get through
    this.progress.step('starting Redis and PostgreSQL')
    const redis = await startRedis({ dataDir: join(folder, 'redis'), say })
    this.atEnd(() => redis.stop())
    const postgres = await startPostgres({ dataDir: join(folder, 'postgres'), settings: BENCH_SETTINGS, say })
    this.atEnd(() => postgres.stop())
    void Promise.race([redis.exited, postgres.exited]).then((reason) => {
      this.death = reason
      this.isBroken = true
    })
    const database = { DATABASE_URL: postgres.url, DATABASE_SCHEMA: 'public' }
    await migrate(database)
    const pool = createPool(database, 'bench', 2)
    this.atEnd(() => pool.end())
    const client = (await connectRedis(redis.url, createLog('bench', 'silent'))) as Redis
    this.atEnd(async () => client.disconnect())
    this.running = { redis, postgres, database, folder, pool, client }
  }

  /** Empties both stores: what one scenario leaves behind is not the next one's to carry. No service may run. */
  async reset(): Promise<void> {
    if (!this.isBroken) this.death = undefined // that was another scenario's
    const { client, pool } = this.stores
    await client.flushall('SYNC')
    await client.call('MEMORY', 'PURGE')
    await this.untilRewritten()
    await client.bgrewriteaof() // so that it is not rewritten in the middle of a round
    await this.untilRewritten()
    await this.truncate()
    await pool.query('CHECKPOINT')
  }

  /** Until Redis is not rewriting its append-only file. */
  async untilRewritten(): Promise<void> {
    const { client } = this.stores
    while (/aof_rewrite_(in_progress|scheduled):1/.test(await client.info('persistence'))) await sleep(20)
  }

  async truncate(): Promise<void> {
    await this.stores.pool.query('TRUNCATE call_transcript_turns, call_events, call_sessions, quarantined_events')
  }

  /** @throws what has ended though it should run */
  requireAlive(): void {
    if (this.death !== undefined) throw new Error(this.death)
  }
}
