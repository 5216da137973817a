/** Whether a Cluster of which one server takes no events still takes those of others. */
import { setTimeout as sleep } from 'node:timers/promises'
import { Cluster } from 'ioredis'
import type { Lane } from '../shared/lanes.js'
import { mastersOf, type RedisClient } from '../shared/redis.js'

const ANSWER_MS = 1000

/**
 * A load balancer that took every ingest out for one server's sake would make all calls wait instead of some.
 *
 * @param waiting lanes whose events have been waiting for too long
 */
export async function othersGoOn(redis: RedisClient, waiting: Lane[]): Promise<boolean> {
  if (!(redis instanceof Cluster)) return false
  const stuck = new Set(waiting.map((lane) => lane.knownServer()))
  const others = mastersOf(redis).filter((master) => !stuck.has(master))
  const answers = others.map(async (master) => {
    await master.ping()
    return true
  })
  return Promise.race([Promise.any(answers).catch(() => false), sleep(ANSWER_MS, false, { ref: false })])
}
