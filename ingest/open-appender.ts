/** What has to be asked of Redis before anything is appended to it, by ingest or by `calltape rescue`. */

import { awaitPartitions } from '../shared/await-partitions.js'
import type { Config } from '../shared/config.js'
import type { Partitions } from '../shared/keys.js'
import type { Logger } from '../shared/log.js'
import type { IngestMetrics } from '../shared/metrics.js'
import { askAtStart, type RedisClient, warnOfLoss } from '../shared/redis.js'
import { requireAccess } from '../shared/redis-access.js'
import { Appender } from './append.js'
import { durabilityCheck } from './durability.js'

/** @throws OperatorError when Redis does not answer, refuses a command, has another partition count, or cannot give the DURABILITY */
export async function openAppender(
  redis: RedisClient,
  config: Config,
  metrics: IngestMetrics,
  log: Logger,
): Promise<{ partitions: Partitions; appender: Appender }> {
  return askAtStart(config.REDIS_URL, async () => {
    await requireAccess(redis, 'ingest')
    const partitions = await awaitPartitions(redis, config.PARTITIONS, log)
    await warnOfLoss(redis, log)
    const confirm = await durabilityCheck(redis, config.DURABILITY, log)
    const options = {
      idleTimeoutMs: config.IDLE_TIMEOUT * 1000,
      disconnectGraceMs: config.DISCONNECT_GRACE * 1000,
      maxQueueBytes: config.MAX_QUEUE_BYTES,
      ...(confirm ? { confirm } : {}),
    }
    return { partitions, appender: new Appender(redis, partitions, options, metrics, log) }
  })
}
