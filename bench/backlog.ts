/**
 * A backlog that grows while sinks look elsewhere. Ingest writes into the Redis database BEHIND, the sinks work on database 0; SWAPDB
 * hands them the backlog at one moment. So sinks that have run for a while drain all of it, and nothing of it beforehand.
 */
import type { Environment } from '../shared/config.js'
import { lanesOf } from '../shared/lanes.js'
import { openPartitions } from '../shared/redis.js'
import type { Bench } from './context.js'
import type { Round } from './end-to-end.js'
import { type Load, makeLoad } from './load.js'
import { measure } from './machine.js'
import { pidsOf, type Running, startServices, storePids } from './processes.js'
import { untilFinalized, verify } from './verify.js'

const BEHIND = 1
const PARTITIONS = 64
/** So many turns warm up a sink. */
const WARM_UP_CALLS = 100

export interface Drained extends Round {
  load: Load
}

/** Sinks that wait for backlogs, on fresh stores. */
export class Drain {
  private constructor(
    private readonly bench: Bench,
    private readonly ingest: Running,
    private readonly sinks: Running[],
  ) {}

  /** @param ofSinks settings of theirs */
  static async open(bench: Bench, sinkCount: number, ofSinks: Environment = {}): Promise<Drain> {
    await bench.reset()
    const behind = new URL(bench.stores.redis.url)
    behind.pathname = `/${BEHIND}`
    const [ingest, sinks] = await Promise.all([
      startServices(bench, 'ingest', 1, { REDIS_URL: behind.href }),
      startServices(bench, 'sink', sinkCount, ofSinks),
    ])
    const drain = new Drain(bench, ingest[0]!, sinks)
    await drain.round(Math.min(bench.options.calls, WARM_UP_CALLS))
    return drain
  }

  async round(calls: number): Promise<Drained> {
    const { bench, ingest, sinks } = this
    await bench.stores.client.flushall('SYNC')
    await bench.truncate()
    const load = makeLoad(calls, bench.options.turns)
    bench.progress.step('building up a backlog', load.turns)
    await load.send([ingest.url], (events) => bench.progress.at(events))
    await bench.stores.pool.query('CHECKPOINT')
    await this.requireNothingStored()

    bench.progress.step('draining', calls)
    const pids = { ...storePids(bench), sink: pidsOf(sinks) }
    const speed = await measure(pids, load.turns, async () => {
      await this.handOver()
      await untilFinalized(bench, load)
    })
    return { ...speed, verifiedRows: await verify(bench, load), load }
  }

  async stop(): Promise<void> {
    await Promise.all([this.ingest, ...this.sinks].map((each) => each.stop()))
  }

  /** The sinks find it at once, not when they look again by themselves: each partition rings, as it would have. */
  private async handOver(): Promise<void> {
    const { client } = this.bench.stores
    await client.swapdb(0, BEHIND)
    const partitions = await openPartitions(client, PARTITIONS)
    for (const { wake, partitions: keys } of lanesOf(client, partitions)) {
      await Promise.all(keys.map(({ partition }) => client.spublish(wake, String(partition))))
    }
  }

  private async requireNothingStored(): Promise<void> {
    const { rows } = await this.bench.stores.pool.query('SELECT FROM call_sessions LIMIT 1')
    if (rows.length > 0) throw new Error('the sinks found the backlog before it was handed over')
  }
}
