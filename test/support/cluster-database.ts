/** `npm run test:cluster`: Clusters that suites take in turn, for a Cluster has but one database. */
import { mkdir, rmdir } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Cluster, Redis } from 'ioredis'
import { connectRedis, mastersOf } from '../../shared/redis.js'

/** What the run's setup tells its suites. */
export interface ClusterPool {
  urls: string[]
  /** Whoever makes the folder `<n>` in here has urls[n], until it is removed. */
  folder: string
}

/** One after the other: whoever has just given one back may still be stopping what uses it. */
let next = 0

/**
 * Takes one that nobody has, and waits for it.
 *
 * @returns a client that answers as a single Redis would, see `askAll`
 */
export async function takeCluster(pool: ClusterPool, log: Parameters<typeof connectRedis>[1]) {
  for (;;) {
    for (let tried = 0; tried < pool.urls.length; tried++) {
      const n = next++ % pool.urls.length
      const url = pool.urls[n]!
      const claim = join(pool.folder, String(n))
      if (!(await isMade(claim))) continue
      const client = (await connectRedis(url, log)) as Cluster
      askAll(client)
      await client.flushall() // an ingest of the test that had it may have stopped only after that had given it back
      return {
        url,
        client,
        async giveBack() {
          await client.flushall()
          client.disconnect()
          await rmdir(claim)
        },
      }
    }
    await sleep(50)
  }
}

async function isMade(folder: string): Promise<boolean> {
  return mkdir(folder).then(
    () => true,
    (error: NodeJS.ErrnoException) => {
      if (error.code !== 'EEXIST') throw error
      return false
    },
  )
}

/** `keys`, `dbsize`, `flushdb` and `flushall` mean all of its servers, `exists` and `del` any keys: as those who test mean them. */
export function askAll(client: Cluster): void {
  const { exists, del } = { exists: client.exists.bind(client), del: client.del.bind(client) }
  const each = <T>(ask: (master: Redis) => Promise<T>) => Promise.all(mastersOf(client).map(ask))
  const sum = async (counts: Promise<number>[]) => (await Promise.all(counts)).reduce((a, b) => a + b, 0)
  const flush = async () => {
    await each((master) => master.flushall())
    return 'OK' as const
  }
  Object.assign(client, {
    keys: async (pattern: string) => (await each((master) => master.keys(pattern))).flat(),
    dbsize: () => sum(mastersOf(client).map((master) => master.dbsize())),
    exists: (...keys: string[]) => sum(keys.map((key) => exists(key))),
    del: (...keys: string[]) => sum(keys.map((key) => del(key))),
    flushdb: flush,
    flushall: flush,
  })
}
