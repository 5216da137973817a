/** What is asked at each scrape of a sink: everything else has been counted when it happened. */
import type { SinkMetrics } from '../shared/metrics.js'
import type { Pool } from '../shared/postgres.js'
import { everyMasterOf, type RedisClient } from '../shared/redis.js'
import { type Backlog, inTime } from './backlog.js'
import type { Gate } from './gate.js'
import type { Leases } from './lease.js'

interface Parts {
  redis: RedisClient
  pool: Pool
  backlog: Backlog
  gate: Gate
  leases: Leases
  metrics: SinkMetrics
}

/** A Redis that cannot be asked takes away what only it knows, and nothing else: that is when the other metrics are wanted. */
export async function observe({ redis, pool, backlog, gate, leases, metrics }: Parts): Promise<void> {
  metrics.redisUp.set(redis.status === 'ready' ? 1 : 0)
  metrics.partitionsAway.set(leases.partitionsAway)
  metrics.gateOpen.set(gate.isOpen ? 1 : 0)
  metrics.postgresConnections.set({ state: 'busy' }, pool.totalCount - pool.idleCount)
  metrics.postgresConnections.set({ state: 'idle' }, pool.idleCount)
  metrics.postgresConnections.set({ state: 'waiting' }, pool.waitingCount)
  await Promise.all([
    observeBacklog(backlog, metrics).catch(() => forgetBacklog(metrics)),
    observeMemory(redis, metrics).catch(() => forgetMemory(metrics)),
  ])
}

async function observeBacklog(backlog: Backlog, { shared }: SinkMetrics): Promise<void> {
  const figures = await backlog.read()
  shared.lagSeconds.set(figures.lagMs / 1000)
  shared.worstPartition.reset()
  shared.worstPartition.set({ partition: String(figures.worstPartition) }, figures.lagMs / 1000)
  shared.laggingPartitions.set(figures.laggingPartitions)
  shared.entriesBehind.set(figures.entriesBehind)
  shared.readyCalls.set(figures.readyCalls)
  shared.leasedCalls.set(figures.leasedCalls)
  shared.openCalls.set(figures.openCalls)
  shared.endedCalls.set(figures.endedCalls)
}

function forgetBacklog({ shared }: SinkMetrics): void {
  shared.worstPartition.reset()
  for (const gauge of [shared.lagSeconds, shared.laggingPartitions, shared.entriesBehind]) gauge.remove()
  for (const gauge of [shared.readyCalls, shared.leasedCalls, shared.openCalls, shared.endedCalls]) gauge.remove()
}

/** @throws when one master cannot be asked: the sum of the others would pass for all of it */
async function observeMemory(redis: RedisClient, { shared }: SinkMetrics): Promise<void> {
  const infos = await inTime(Promise.all(everyMasterOf(redis).map((node) => node.info('memory'))))
  const used = infos.map((info) => figureOf(info, 'used_memory'))
  const limits = infos.map((info) => figureOf(info, 'maxmemory'))
  shared.redisMemory.set(used.reduce((sum, bytes) => sum + bytes, 0))
  shared.redisMaxMemory.set(limits.includes(0) ? 0 : limits.reduce((sum, bytes) => sum + bytes, 0))
}

function forgetMemory({ shared }: SinkMetrics): void {
  for (const gauge of [shared.redisMemory, shared.redisMaxMemory]) gauge.remove()
}

/** @throws when INFO has no such line */
function figureOf(info: string, name: string): number {
  const [, figure] = new RegExp(`^${name}:(\\d+)\\r?$`, 'm').exec(info) ?? []
  if (figure === undefined) throw new Error(`Redis: INFO has no ${name}`)
  return Number(figure)
}
