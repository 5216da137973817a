/**
 * Servers of a Cluster that are down, or hang. They are left alone until they answer again, for a worker that waits for one keeps
 * the other servers' calls waiting: until a connection is given up that owes an answer, it takes seconds.
 *
 * On a single Redis nothing is ever away: there is nobody else to go on with.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { Cluster } from 'ioredis'
import { backoffMs } from '../shared/backoff.js'
import { isAnswer, serverOf } from '../shared/cluster.js'
import type { Logger } from '../shared/log.js'
import { Nagging } from '../shared/nagging.js'
import type { RedisClient } from '../shared/redis.js'

/** For so long an answer is waited for. Longer than a Redis that lives is busy with something else, as a rule. */
const PATIENCE_MS = 1000
/** Of one that has not answered the last time. */
const LESS_PATIENCE_MS = 100
const FIRST_PAUSE_MS = 50
const MAX_PAUSE_MS = 1000
const MAX_LANE_PAUSE_MS = 5000

/** What has keys on one server: a lane, or a partition. */
interface Place {
  readonly wake: string
}

/** What all parts of a process that ask by the same client know of its servers. */
export class AwayServers {
  private static readonly known = new WeakMap<RedisClient, AwayServers>()
  /** By address: why, and a promise that resolves when it answers again. */
  private readonly away = new Map<string, { reason: Error; back: Promise<void> }>()
  private readonly nagging = new Nagging()

  static of(client: RedisClient): AwayServers {
    const known = AwayServers.known.get(client) ?? new AwayServers(client)
    AwayServers.known.set(client, known)
    return known
  }

  private constructor(private readonly client: RedisClient) {}

  isAway(place: Place): boolean {
    return this.backOf(place) !== undefined
  }

  /** To be called about every second. */
  tell(log: Logger): void {
    for (const [redis, { reason }] of this.away) {
      if (this.nagging.isDue(redis)) {
        log.warn({ redis, err: reason }, 'this server of the Cluster does not answer: its calls wait')
      }
    }
    for (const redis of this.nagging.said) {
      if (this.away.has(redis)) continue
      this.nagging.isOver(redis)
      log.info({ redis }, 'this server of the Cluster answers again, or another one has its place')
    }
  }

  /** Resolves when the server that was away has answered, or another one has its place; at once when it is not away. */
  async untilBack(place: Place): Promise<void> {
    await this.backOf(place)
  }

  /**
   * @param late given the answer that came when nobody was waiting for it any more
   * @throws (rejects) what was asked for rejects with; when there is no answer in time
   */
  inTime<T>(place: Place, asked: Promise<T>, late: (answer: T) => void = () => undefined): Promise<T> {
    if (!(this.client instanceof Cluster)) return asked
    return new Promise((resolve, reject) => {
      let isLate = false
      const patience = this.isAway(place) ? LESS_PATIENCE_MS : PATIENCE_MS
      let last: NodeJS.Immediate | undefined
      const giveUp = () => {
        isLate = true
        const error = new Error(`no answer within ${patience} ms`)
        this.lost(place, error)
        reject(error)
      }
      // Not before what has come is read: when this process was held up itself, the answer may have been there for long.
      const timer = setTimeout(() => {
        last = setImmediate(giveUp)
      }, patience)
      const stopWaiting = () => {
        clearTimeout(timer)
        clearImmediate(last)
      }
      asked.then(
        (answer) => {
          stopWaiting()
          if (isLate) late(answer)
          else resolve(answer)
        },
        (error: Error) => {
          stopWaiting()
          if (!isAnswer(error)) this.lost(place, error)
          reject(error)
        },
      )
    })
  }

  private backOf(place: Place): Promise<void> | undefined {
    if (this.away.size === 0) return undefined
    const server = serverOf(this.client as Cluster, place.wake)
    return server === undefined ? undefined : this.away.get(server)?.back
  }

  private lost(place: Place, reason: Error): void {
    const server = serverOf(this.client as Cluster, place.wake)
    if (server === undefined || this.away.has(server)) return
    this.away.set(server, { reason, back: this.answers(server, place) })
  }

  private async answers(server: string, { wake }: Place): Promise<void> {
    for (let failures = 1; this.client.status !== 'end'; failures++) {
      await sleep(backoffMs(failures, FIRST_PAUSE_MS, MAX_PAUSE_MS), undefined, { ref: false })
      const isThere = await this.client.exists(wake).then(
        () => true,
        (error: Error) => isAnswer(error),
      )
      if (isThere) break
    }
    this.away.delete(server)
  }
}

/** For one part of a process: its lanes whose server is away, and those that were refused what it asks, which wait for a while. */
export class AwayLanes {
  readonly servers: AwayServers
  private readonly refused = new Map<string, { failures: number; until: number }>()

  constructor(private readonly client: RedisClient) {
    this.servers = AwayServers.of(client)
  }

  isAway(lane: Place): boolean {
    return this.servers.isAway(lane) || (this.refused.get(lane.wake)?.until ?? 0) > Date.now()
  }

  /** Resolves when it can be asked again. */
  async untilBack(lane: Place): Promise<void> {
    await this.servers.untilBack(lane)
    const pauseMs = (this.refused.get(lane.wake)?.until ?? 0) - Date.now()
    if (pauseMs > 0) await sleep(pauseMs, undefined, { ref: false })
  }

  /** See `AwayServers.inTime`. */
  async watch<T>(lane: Place, asked: Promise<T>, late?: (answer: T) => void): Promise<T> {
    try {
      const answer = await this.servers.inTime(lane, asked, late)
      this.refused.delete(lane.wake)
      return answer
    } catch (error) {
      if (this.client instanceof Cluster && !this.servers.isAway(lane)) {
        const failures = (this.refused.get(lane.wake)?.failures ?? 0) + 1
        const until = Date.now() + backoffMs(failures, FIRST_PAUSE_MS, MAX_LANE_PAUSE_MS)
        this.refused.set(lane.wake, { failures, until })
      }
      throw error
    }
  }
}
