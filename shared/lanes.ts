/** Along which connections scripts run: one for all partitions on a single Redis, one for each in a Cluster. */
import { Cluster, type Redis } from 'ioredis'
import { addressOf, ClusterLane } from './cluster.js'
import type { PartitionKeys, Partitions } from './keys.js'
import type { RedisClient } from './redis.js'

/** Partitions that one script call can touch together: all of them on a single Redis, one each in a Cluster (a slot each). */
export interface Lane {
  readonly partitions: readonly PartitionKeys[]
  /** Sinks sleep on this channel. It is the name of no key: see `Script`. */
  readonly wake: string
  /**
   * The connection to the server that has them, as far as is known. What is sent there is not redirected and not sent again:
   * it keeps its order, and what is sent behind it (WAIT) goes the same way. It fails when they have moved; then `find`.
   *
   * @throws when no server is known to have them
   */
  connection(): Redis
  /** The same; undefined when no server is known to have them. */
  knownServer(): Redis | undefined
  /** The address (host:port) of the server that has them, as far as is known, whether it can be reached or not. */
  readonly address: string | undefined
  /** Asks who has them now. @throws (rejects) Redis' errors */
  find(): Promise<Redis>
}

export function lanesOf(client: RedisClient, partitions: Partitions): Lane[] {
  if (client instanceof Cluster) return partitions.all.map((partition) => new ClusterLane(client, partition))
  const { wake } = partitions.all[0]!
  return [
    {
      partitions: partitions.all,
      wake,
      connection: () => client,
      knownServer: () => client,
      address: addressOf(client),
      find: async () => client,
    },
  ]
}

/** What was answered, by those servers of a Cluster that did. @throws the first reason when none did */
export function someOf<T>(results: PromiseSettledResult<T>[]): T[] {
  const values = results.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []))
  const [failed] = results.filter((result) => result.status === 'rejected')
  if (failed && values.length === 0) throw failed.reason
  return values
}
