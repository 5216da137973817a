/** What a Redis Cluster wants that a single Redis does not. */
import { setTimeout as sleep } from 'node:timers/promises'
import { type Cluster, type ClusterOptions, Command, type Redis } from 'ioredis'
import { isBug, OperatorError } from './config.js'
import type { PartitionKeys } from './keys.js'
import type { Lane } from './lanes.js'

/** Whom it asks is left to chance: longer than it takes to find out several times that a server hangs, 5 s each. */
const READY_MS = 30_000

/** On a Cluster, too, a command fails at once when its server is gone, or its slot has none: whoever sent it sends it again. */
export const FAILS_AT_ONCE: ClusterOptions = {
  retryDelayOnFailover: 0,
  retryDelayOnClusterDown: 0,
  // While a slot moves, its scripts have to wait. Not for long here: calls of other slots may wait for the same answer.
  retryDelayOnTryAgain: 20,
  maxRedirections: 5,
  // A name stays one: looked up before, its certificate would be compared with an address.
  dnsLookup: (name, callback) => callback(null, name),
  // The layout is asked for, for where a server hangs, nothing answers with MOVED.
  slotsRefreshInterval: 2000,
}

/**
 * A Cluster's `connect` neither succeeds nor fails when the server that it asks has no answer, or
 * `cluster_state:fail`: it goes on trying.
 *
 * @throws (rejects) when no server answers, or the Cluster is not ready in time
 */
export async function untilReady(client: Cluster): Promise<void> {
  const late = new AbortController()
  const timeout = sleep(READY_MS, undefined, { signal: late.signal }).then(() => {
    throw new OperatorError('REDIS_URL: the Cluster is not ready: see cluster_state in what CLUSTER INFO says')
  })
  const ready = new Promise((resolve) => client.once('ready', resolve))
  try {
    await Promise.race([client.connect(), ready, timeout])
  } finally {
    late.abort()
    timeout.catch(() => undefined)
  }
}

/** One partition: its keys are one slot. */
export class ClusterLane implements Lane {
  readonly partitions: readonly PartitionKeys[]
  readonly wake: string
  private readonly slot: number

  constructor(
    private readonly cluster: Cluster,
    partition: PartitionKeys,
  ) {
    this.partitions = [partition]
    this.wake = partition.wake
    this.slot = slotOf(partition.wake)
  }

  connection(): Redis {
    const server = this.knownServer()
    if (!server) throw new Error(`no server of the Cluster is known to have slot ${this.slot}`)
    return server
  }

  knownServer(): Redis | undefined {
    const master = this.cluster.slots[this.slot]?.[0]
    return this.cluster.nodes('master').find((each) => addressOf(each) === master)
  }

  get address(): string | undefined {
    return this.cluster.slots[this.slot]?.[0]
  }

  async find(): Promise<Redis> {
    await this.cluster.exists(this.wake) // by way of its answer, MOVED, the client learns
    return this.connection()
  }
}

const slotOf = (key: string) => new Command('exists', [key]).getSlot()
const slots = new Map<string, number>()

/**
 * @param key one of a partition, or its channel: as many as there are partitions are remembered
 * @returns the address (host:port) of the server that has the slot, as far as is known, whether it can be reached or not
 */
export function serverOf(cluster: Cluster, key: string): string | undefined {
  let slot = slots.get(key)
  if (slot === undefined) {
    slot = slotOf(key)
    slots.set(key, slot)
  }
  return cluster.slots[slot]?.[0]
}

/** Whether a server has said it, whatever it is; the redirections that came to nothing name what was said last. */
export const isAnswer = (error: Error): boolean =>
  error.name === 'ReplyError' || error.message.includes('ReplyError') || isBug(error)

const SLOTS = 16_384

/** @throws OperatorError when a server that has slots is not connected: what the others have would pass for all there is */
export function everyMaster(cluster: Cluster): Redis[] {
  const connected = new Map(cluster.nodes('master').map((master) => [addressOf(master), master]))
  for (let slot = 0; slot < SLOTS; slot++) {
    const address = cluster.slots[slot]?.[0]
    if (address !== undefined && connected.has(address)) continue
    const missing = address === undefined ? `no server of the Cluster has slot ${slot}` : `${address} does not answer`
    throw new OperatorError(`REDIS_URL: ${missing}, and what is there cannot be seen`)
  }
  return [...connected.values()]
}

export const addressOf = ({ options }: Redis) => `${options.host}:${options.port}`
