/**
 * share: sinks divide the partitions among themselves, so that each hint wakes one of them and not all.
 *
 * It is a hint about whom to wake, and nothing else: a call is leased to one worker whoever asks for it, so sinks that disagree
 * for a moment about who lives (one has just come, or gone) at worst ask in vain, or wait for what follows.
 *
 *  - Each sink that can store announces itself every second, in a sorted set with a deadline. All compute the same division from
 *    the same set. A sink that stops leaves at once; one that died or hangs is out of the set after ANNOUNCED_MS.
 *  - What is news of another's partition is looked at a little later, with one script that reads nothing but how long the oldest
 *    ready call there has been waiting. If that is too long, a sink with a worker to spare takes it (stealing); a busy one does
 *    when it has been waiting for much longer than anything of its own.
 *
 * So what is ready waits for STEAL_AFTER_MS + LOOK_MS at most, whatever its sink does, as long as another one is idle. (What
 * a dead sink has leased waits for its lease to lapse, as ever.) A sink that is alone owns everything, and never looks.
 */
import { randomUUID } from 'node:crypto'
import { hash, type PartitionKeys, type Partitions, SINKS_KEY } from '../shared/keys.js'
import { type Lane, lanesOf, someOf } from '../shared/lanes.js'
import type { RedisClient } from '../shared/redis.js'
import { Script } from '../shared/script.js'
import { AwayServers } from './away.js'
import type { Wake } from './wake.js'

const announceScript = new Script('sink/announce.lua')
const waitingScript = new Script('sink/waiting.lua')

/** Long enough that a script or a pause of the process that comes in between does not make a living sink a dead one. */
const ANNOUNCED_MS = 3500
/** About how often partitions of others are looked at. */
export const LOOK_MS = 200
const STEAL_AFTER_MS = 250
/** By so much longer than what waits in its own partitions has something to wait until a busy sink takes it. */
const BUSY_STEAL_AFTER_MS = 1000
/** So that a script keeps Redis from others for much less than a millisecond. */
const PARTITIONS_AT_ONCE = 256

/**
 * Rendezvous hashing with a limit: each partition goes to the sink with the highest hash among those that have not got their
 * part yet. Without the limit, one of two sinks would easily have 40 of 64 partitions; with it, none has more than one above
 * another, and a sink that comes or goes moves few partitions but those that must move.
 *
 * @param sinks in an order that all of them agree on
 * @returns whose each partition is
 */
export function divide(partitions: number, sinks: readonly string[]): string[] {
  const free = new Map(sinks.map((sink) => [sink, Math.floor(partitions / sinks.length)]))
  let extra = partitions % sinks.length // so many get one more
  return Array.from({ length: partitions }, (_, partition) => {
    let best: { sink: string; weight: number; left: number } | undefined
    for (const [sink, left] of free) {
      if (left < 0 || (left === 0 && extra === 0)) continue // it has its part
      const weight = hash(`${sink} ${partition}`)
      if (!best || weight > best.weight) best = { sink, weight, left }
    }
    const { sink, left } = best!
    if (left === 0) extra--
    free.set(sink, left - 1)
    return sink
  })
}

export class Share {
  private readonly id = randomUUID()
  private readonly lanes: Lane[]
  private living = ''
  /** How many sinks share the work, this one included. */
  sinks = 1
  /** How many partitions are this one's. */
  owned: number
  private hasLeft = false
  private askedAt = performance.now()

  constructor(
    private readonly client: RedisClient,
    private readonly partitions: Partitions,
    private readonly wake: Wake,
  ) {
    this.owned = partitions.all.length
    this.lanes = lanesOf(client, partitions)
  }

  /**
   * To be called about every second.
   *
   * @param isFit whether this sink can store: else its part is for the others, if there are any
   * @throws Redis' errors; the division stays as it was, for a while
   */
  async announce(isFit: boolean): Promise<void> {
    if (this.hasLeft) return
    const living = await this.ask(isFit)
    if (living.join() === this.living) return
    this.living = living.join()
    const others = living.filter((sink) => sink !== this.id)
    const own = others.length === 0 ? undefined : this.partOf(living)
    this.sinks = living.length
    this.owned = own?.size ?? this.partitions.all.length
    this.wake.share(own)
  }

  /** @throws Redis' errors; when nobody has been able to say for so long who lives, all partitions are this sink's */
  private async ask(isFit: boolean): Promise<string[]> {
    try {
      const living = (await this.announceFor(isFit ? ANNOUNCED_MS : 0)).sort()
      this.askedAt = performance.now()
      return living
    } catch (error) {
      if (performance.now() - this.askedAt > ANNOUNCED_MS && this.living !== '') {
        this.living = ''
        this.owned = this.partitions.all.length
        this.wake.share(undefined)
      }
      throw error
    }
  }

  /** @throws Redis' errors; then the others learn of it when the announcement lapses */
  async leave(): Promise<void> {
    this.hasLeft = true
    await this.announceFor(0)
  }

  /**
   * Takes what waits for too long in others' partitions.
   *
   * @throws Redis' errors; then it is looked at again
   */
  async steal(): Promise<void> {
    const { wake } = this
    const noted = wake.takeNoted()
    if (noted.size === 0) return
    const isIdle = wake.isIdle
    const own = isIdle ? [] : this.partitions.all.filter(({ partition }) => wake.owns(partition))
    try {
      const ownMs = Math.max(-1, ...(await this.waiting(own)).values())
      const limitMs = isIdle ? STEAL_AFTER_MS : Math.max(0, ownMs) + BUSY_STEAL_AFTER_MS
      const waiting = await this.waiting([...noted].map((partition) => this.partitions.at(partition)))
      for (const [partition, ms] of waiting) {
        if (ms > limitMs) wake.hint([partition])
        else if (ms >= 0) wake.news([partition]) // it is looked at again, for as long as there is something
      }
      for (const partition of noted) if (!waiting.has(partition)) wake.news([partition])
    } catch (error) {
      wake.news([...noted])
      throw error
    }
  }

  private partOf(living: string[]): Set<number> {
    if (!living.includes(this.id)) return new Set()
    const owners = divide(this.partitions.all.length, living)
    return new Set(owners.flatMap((owner, partition) => (owner === this.id ? [partition] : [])))
  }

  private async announceFor(ms: number): Promise<string[]> {
    return (await announceScript.run(this.client, [SINKS_KEY], [this.id, ms])) as string[]
  }

  private async waiting(partitions: readonly PartitionKeys[]): Promise<Map<number, number>> {
    const asked = new Set(partitions)
    const groups: PartitionKeys[][] = []
    const servers = AwayServers.of(this.client)
    for (const lane of this.lanes) {
      if (servers.isAway(lane)) continue
      const its = lane.partitions.filter((p) => asked.has(p))
      for (let at = 0; at < its.length; at += PARTITIONS_AT_ONCE) groups.push(its.slice(at, at + PARTITIONS_AT_ONCE))
    }
    const answers = await Promise.allSettled(
      groups.map(async (group): Promise<[number, number][]> => {
        const keys = group.map(({ ready }) => ready)
        const ms = (await servers.inTime(group[0]!, waitingScript.run(this.client, keys, []))) as number[]
        return group.map(({ partition }, i) => [partition, ms[i]!])
      }),
    )
    return new Map(someOf(answers).flat())
  }
}
