/**
 * listen: hears from Redis which partitions have news. A server of a Cluster tells only of its own slots: a connection to each.
 *
 * ioredis' own sharded subscribers are not used: what SSUBSCRIBE is answered with MOVED stays without any answer there, a
 * subscription that failed is not tried again, and channels that were subscribed to twice are kept twice.
 */
import { Cluster, type Redis } from 'ioredis'
import { addressOf } from '../shared/cluster.js'
import type { Partitions } from '../shared/keys.js'
import { type Lane, lanesOf, someOf } from '../shared/lanes.js'
import type { Logger } from '../shared/log.js'
import { type RedisClient, subscriberTo } from '../shared/redis.js'
import { AwayServers } from './away.js'
import type { Wake } from './wake.js'

export interface Listening {
  /** To be called now and then: subscribes anew what is not, or is elsewhere by now. */
  tend(): void
  stop(): void
}

/**
 * @param connect a connection of its own to a single Redis
 * @throws Redis' errors; of a Cluster, when none of its servers can be heard
 */
export async function listen(
  redis: RedisClient,
  partitions: Partitions,
  wake: Wake,
  connect: () => Promise<RedisClient>,
  log: Logger,
): Promise<Listening> {
  const lanes = lanesOf(redis, partitions)
  if (redis instanceof Cluster) {
    const subscriptions = new ClusterSubscriptions(lanes, AwayServers.of(redis), wake, log)
    someOf(await Promise.allSettled(subscriptions.open()))
    return subscriptions
  }
  const subscriber = await connect()
  const subscribe = () => Promise.all(lanes.map((lane) => subscriber.ssubscribe(lane.wake)))
  subscriber.on('smessage', hear(wake))
  await subscribe()
  subscriber.on('ready', () => {
    subscribe().catch(() => undefined) // cut off once more: the next `ready` comes
    wake.all() // what was published while it was away is lost
  })
  return { tend: () => undefined, stop: () => subscriber.disconnect() }
}

const hear = (wake: Wake) => (_channel: string, message: string) => wake.news(message.split(',').map(Number))

/** One for each server. Whatever happens to one, or to what it listens to: it is given up, and another one is opened. */
class ClusterSubscriptions implements Listening {
  private readonly subscriptions = new Map<string, { connection: Redis; channels: string }>()

  constructor(
    private readonly lanes: Lane[],
    private readonly servers: AwayServers,
    private readonly wake: Wake,
    private readonly log: Logger,
  ) {}

  tend(): void {
    for (const opened of this.open()) {
      opened.catch((error: Error) =>
        this.log.warn({ err: error }, 'cannot listen to a server of the Cluster, will retry'),
      )
    }
  }

  stop(): void {
    for (const { connection } of this.subscriptions.values()) connection.disconnect()
    this.subscriptions.clear()
  }

  /** @returns those that were missing, when they are subscribed */
  open(): Promise<void>[] {
    const wanted = this.byServer()
    for (const [address, { connection, channels }] of this.subscriptions) {
      if (channelsOf(wanted.get(address) ?? []) === channels) continue
      this.subscriptions.delete(address)
      connection.disconnect()
    }
    return [...wanted].filter(([address]) => !this.subscriptions.has(address)).map(([, lanes]) => this.openOne(lanes))
  }

  private byServer(): Map<string, Lane[]> {
    const servers = new Map<string, Lane[]>()
    for (const lane of this.lanes) {
      const server = lane.knownServer()
      if (!server || this.servers.isAway(lane)) continue // that will be known, or answer, later
      const address = addressOf(server)
      servers.set(address, [...(servers.get(address) ?? []), lane])
    }
    return servers
  }

  private async openOne(lanes: Lane[]): Promise<void> {
    const server = lanes[0]!.connection()
    const address = addressOf(server)
    const connection = subscriberTo(server)
    this.subscriptions.set(address, { connection, channels: channelsOf(lanes) })
    const gone = new Promise<never>((_, reject) => {
      const giveUp = (why: string) => {
        if (this.subscriptions.get(address)?.connection === connection) this.subscriptions.delete(address)
        connection.disconnect()
        reject(new Error(`${address}: ${why}`))
      }
      connection.once('end', () => giveUp('the connection is closed'))
      connection.once('moved', () => giveUp('a slot has moved')) // and its SSUBSCRIBE never gets an answer
      connection.on('error', (error: Error) => giveUp(error.message)) // also a slot that was taken away: it comes unasked
    })
    gone.catch(() => undefined) // later on, `tend` sees that it is gone
    connection.on('smessage', hear(this.wake))
    await Promise.race([connection.connect(), gone])
    await Promise.race([Promise.all(lanes.map((lane) => connection.ssubscribe(lane.wake))), gone])
    this.wake.news(lanes.flatMap(({ partitions }) => partitions.map(({ partition }) => partition))) // what was missed
  }
}

const channelsOf = (lanes: Lane[]) => lanes.map(({ wake }) => wake).join(' ')
