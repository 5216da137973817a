/**
 * Sweep: every SWEEP_INTERVAL one of the sinks walks through all keys, counts streams and their memory, and looks for orphans.
 * Which sink does not matter; every one of them tells the result.
 */
import { type Partitions, SWEEP_CLAIM_KEY, SWEEP_KEY } from '../shared/keys.js'
import type { Logger } from '../shared/log.js'
import type { SinkMetrics } from '../shared/metrics.js'
import type { RedisClient } from '../shared/redis.js'
import { ORPHAN_KINDS, type OrphanKind, OrphanSearch, type Pace, SLOWLY } from './orphans.js'

/** A sweeping sink that dies leaves the sweep to another one after this time. */
const CLAIM_MS = 30_000
/** How many orphans the log names. */
const MOST_NAMED = 5

interface SweepContext {
  redis: RedisClient
  metrics: SinkMetrics
  log: Logger
}

export interface SweepResult {
  streams: number
  bytes: number
  orphans: Map<OrphanKind, number>
}

export class Sweep {
  /** @param intervalMs from one sweep's end to the next one's beginning */
  constructor(
    private readonly context: SweepContext,
    private readonly partitions: Partitions,
    private readonly intervalMs: number,
    private readonly pace: Pace = SLOWLY,
  ) {}

  /** Sweeps when it is time and nobody else does; tells the metrics what the last sweep has found. @throws Redis' errors */
  async tend(signal?: AbortSignal): Promise<void> {
    if (await this.isDue()) await this.sweepOnce(signal)
    await this.observe()
  }

  private async isDue(): Promise<boolean> {
    const at = Number(await this.context.redis.hget(SWEEP_KEY, 'at'))
    return Date.now() - at >= this.intervalMs
  }

  private async sweepOnce(signal: AbortSignal | undefined): Promise<void> {
    const { redis } = this.context
    const isMine = await redis.set(SWEEP_CLAIM_KEY, 'sweeping', 'PX', CLAIM_MS, 'NX')
    if (!isMine) return
    const prolonged = setInterval(() => {
      redis.pexpire(SWEEP_CLAIM_KEY, CLAIM_MS).catch(() => undefined) // lapsed, it is swept twice
    }, CLAIM_MS / 3)
    try {
      if (!(await this.isDue())) return // somebody has swept meanwhile
      const result = await this.run(signal)
      if (!signal?.aborted) await this.publish(result)
    } finally {
      clearInterval(prolonged)
      await redis.del(SWEEP_CLAIM_KEY)
    }
  }

  private async run(signal: AbortSignal | undefined): Promise<SweepResult> {
    const search = new OrphanSearch(this.context.redis, this.partitions, this.pace)
    const orphans = new Map<OrphanKind, number>()
    const named: string[] = []
    for await (const { kind, place } of search.run(signal)) {
      orphans.set(kind, (orphans.get(kind) ?? 0) + 1)
      if (named.length < MOST_NAMED) named.push(place.callSid)
    }
    if (orphans.size > 0 && !signal?.aborted) {
      const found = Object.fromEntries(orphans)
      this.context.log.warn({ found, callSids: named }, 'keys that nobody works on: see `calltape orphans`')
    }
    return { streams: search.census.streams, bytes: search.census.bytes, orphans }
  }

  private async publish({ streams, bytes, orphans }: SweepResult): Promise<void> {
    const kinds = ORPHAN_KINDS.flatMap((kind) => [`orphans:${kind}`, orphans.get(kind) ?? 0])
    const { redis } = this.context
    await redis.hset(SWEEP_KEY, 'at', Date.now(), 'streams', streams, 'bytes', bytes, ...kinds)
  }

  private async observe(): Promise<void> {
    const { shared } = this.context.metrics
    const result = await this.context.redis.hgetall(SWEEP_KEY)
    shared.sweptAt.set(Number(result.at ?? 0) / 1000)
    shared.streams.set(Number(result.streams ?? 0))
    shared.streamBytes.set(Number(result.bytes ?? 0))
    for (const kind of ORPHAN_KINDS) shared.orphans.set({ kind }, Number(result[`orphans:${kind}`] ?? 0))
  }
}
