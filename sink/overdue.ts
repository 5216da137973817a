/**
 * What comes when nobody does what he should: leases that nobody settles go to other sinks, calls that nobody ends are presumed
 * over. See reclaim.lua, reap.lua and end.lua.
 */
import { type CallPlace, type PartitionKeys, type Partitions, sessionKey, streamKey } from '../shared/keys.js'
import { type Lane, lanesOf, someOf } from '../shared/lanes.js'
import type { RedisClient } from '../shared/redis.js'
import { Script } from '../shared/script.js'
import { AwayServers } from './away.js'

const reclaimScript = new Script('sink/reclaim.lua')
const reapScript = new Script('sink/reap.lua')
const endScript = new Script('sink/end.lua')

export class Overdue {
  private readonly lanes: Lane[]
  private readonly servers: AwayServers

  constructor(
    private readonly client: RedisClient,
    private readonly partitions: Partitions,
  ) {
    this.lanes = lanesOf(client, partitions)
    this.servers = AwayServers.of(client)
  }

  /** @returns the calls whose lapsed leases are open to all sinks again */
  async reclaim(most: number): Promise<string[]> {
    return this.onEachLane(
      reclaimScript,
      most,
      (p) => [p.ready, p.leased],
      (p) => [p.streamPrefix, p.sessionPrefix],
    )
  }

  /**
   * @param among only these; else whichever are due
   * @returns the calls that were presumed over and got their `call.ended`
   */
  async reap(most: number, among?: CallPlace[]): Promise<string[]> {
    return this.onEachLane(
      reapScript,
      most,
      (p) => [p.ready, p.leased, p.open],
      (p) => [p.streamPrefix, p.sessionPrefix],
      ({ partitions }) => {
        const its = among?.filter(({ partition }) => partitions.includes(partition))
        return its ? ['among', ...its.map(({ callSid }) => callSid)] : []
      },
    )
  }

  /** @returns true when Redis knew nothing of the call, and it has got its `call.ended` */
  async end(callSid: string): Promise<boolean> {
    const p = this.partitions.of(callSid)
    const call = { callSid, partition: p }
    const { wake } = this.lanes.find(({ partitions }) => partitions.includes(p))!
    const keys = [wake, p.ready, p.leased, p.open, p.ended, streamKey(call), sessionKey(call)]
    return (await endScript.run(this.client, keys, [callSid, p.partition])) === 1
  }

  private async onEachLane(
    script: Script,
    most: number,
    keysOf: (p: PartitionKeys) => string[],
    argsOf: (p: PartitionKeys) => string[],
    moreArgs: (lane: Lane) => string[] = () => [],
  ): Promise<string[]> {
    const lanes = this.lanes.filter((lane) => !this.servers.isAway(lane))
    const results = await Promise.allSettled(
      lanes.map((lane) => {
        const { wake, partitions } = lane
        const args = [most, ...partitions.flatMap(argsOf), ...moreArgs(lane)]
        const asked = script.run(this.client, [wake, ...partitions.flatMap(keysOf)], args)
        return this.servers.inTime(lane, asked)
      }),
    )
    return someOf(results as PromiseSettledResult<string[]>[]).flat()
  }
}
