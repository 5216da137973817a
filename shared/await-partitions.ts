/** The start of ingest and sink on a Cluster of which a part is away. */
import { setTimeout as sleep } from 'node:timers/promises'
import { Cluster } from 'ioredis'
import { backoffMs } from './backoff.js'
import { isAnswer, serverOf } from './cluster.js'
import { OperatorError } from './config.js'
import { PARTITIONS_KEY, type Partitions } from './keys.js'
import type { Logger } from './log.js'
import { Nagging } from './nagging.js'
import { openPartitions, type RedisClient } from './redis.js'

const FIRST_PAUSE_MS = 100
const MAX_PAUSE_MS = 2000
/** What a server says that will say something else once it has come up, or another one has taken over. */
const NOT_YET = /^(CLUSTERDOWN|LOADING|MASTERDOWN|READONLY|TRYAGAIN)/

/**
 * As `openPartitions`. One server of a Cluster has the count, and nobody can serve without it: while that server is down, the
 * process waits and says so, for it is wanted as soon as the server is back.
 *
 * @throws as `openPartitions`; of a single Redis, when it does not answer
 */
export async function awaitPartitions(client: RedisClient, wanted: number, log: Logger): Promise<Partitions> {
  const nagging = new Nagging()
  for (let failures = 1; ; failures++) {
    try {
      return await openPartitions(client, wanted)
    } catch (error) {
      if (!(client instanceof Cluster) || !mayPass(error as Error)) throw error
      if (nagging.isDue(PARTITIONS_KEY)) {
        const redis = serverOf(client, PARTITIONS_KEY)
        const why = `it has ${PARTITIONS_KEY}, without which nothing can be stored or found`
        log.warn({ redis, err: error }, `cannot start before this server of the Cluster answers: ${why}; will retry`)
      }
      await sleep(backoffMs(failures, FIRST_PAUSE_MS, MAX_PAUSE_MS))
    }
  }
}

const mayPass = (error: Error) => !(error instanceof OperatorError) && (!isAnswer(error) || NOT_YET.test(error.message))
