/**
 * The scripts that share calls out among sinks: lease, prolong, isolate, settle. See the .lua files for what each must hold, and
 * overdue.ts for what happens to calls that nobody settles or ends.
 */
import { type CallPlace, type PartitionKeys, type Partitions, sessionKey, streamKey } from '../shared/keys.js'
import { type Lane, lanesOf, someOf } from '../shared/lanes.js'
import type { RedisClient } from '../shared/redis.js'
import { Script } from '../shared/script.js'
import { AwayLanes } from './away.js'
import { MAX_READ_ENTRIES } from './read.js'
import { type Settled, type Settlement, settleArgs, untouched } from './settle.js'

const leaseScript = new Script('sink/lease.lua')
const prolongScript = new Script('sink/prolong.lua')
const isolateScript = new Script('sink/isolate.lua')
const settleScript = new Script('sink/settle.lua')

/** Of a call, however many slots of a Cluster a batch is made of. */
const LEAST_ENTRIES_OF_A_CALL = 16

/** A call that this sink alone may work on until `deadline`. */
export interface Lease extends CallPlace {
  /** Redis' clock, epoch ms; also the token that proves the lease. `prolong` moves it. */
  deadline: number
  /** The last entry committed to PostgreSQL. */
  cursor: string
  /** Entries behind the cursor; no more than are to be read. */
  waiting: number
  /** The same, however many are to be read, if that is all that was added; undefined: nobody knows, entries may have been removed. */
  counted: number | undefined
  /** Entries up to the cursor; -1 when Redis cannot say. */
  read: number
  /** It was finalized before; what comes now is late. */
  finalized: boolean
  /** How many deliveries in a row came to nothing: its sink died or hung, or the batch failed for an unclear reason. */
  lapses: number
  /** It was presumed over at some time, and may have come back since. */
  presumed: boolean
  /** The entry that was being tried alone when it came to nothing the last time. */
  alone?: string | undefined
  /** When its oldest waiting entry arrived, epoch ms. */
  oldestMs: number
  /** What an entry of this call has on average. */
  bytesAnEntry: number
}

export interface LeaseLimits {
  calls: number
  entries: number
  bytes: number
  leaseMs: number
  /** A call with so many lapses is a suspect: it is leased by itself. */
  suspectLapses: number
}

export interface Leased {
  leases: Lease[]
  /** The numbers of partitions that may have more ready calls. */
  more: number[]
  /** The call_sids of those whose stream is gone although something waited in it. */
  gone: string[]
}

export class Leases {
  private readonly lanes: Lane[]
  private readonly laneOf = new Map<PartitionKeys, Lane>()
  private readonly away: AwayLanes
  /** Partitions that were to be looked into while they could not be, by their lanes. */
  private readonly putOff = new Map<Lane, Set<number>>()
  /** Told of those when they can be. */
  onBack: (partitions: number[]) => void = () => undefined

  constructor(
    private readonly client: RedisClient,
    private readonly partitions: Partitions,
    private readonly leaseMs: number,
  ) {
    this.lanes = lanesOf(client, partitions)
    this.away = new AwayLanes(client)
    for (const lane of this.lanes) for (const partition of lane.partitions) this.laneOf.set(partition, lane)
  }

  /**
   * @param hints numbers of the partitions to look into
   * @param mayTakeSuspect one suspect may be leased, too
   */
  async lease(hints: Iterable<number>, limits: LeaseLimits, mayTakeSuspect = true): Promise<Leased> {
    const asked = this.byLane([...hints].map((p) => this.partitions.at(p)))
    for (const [lane, partitions] of asked) {
      if (!this.away.isAway(lane)) continue
      asked.delete(lane)
      this.putOffUntilBack(lane, partitions)
    }
    if (this.lanes.every((lane) => this.away.servers.isAway(lane))) throw new Error('no server of the Cluster answers')
    if (asked.size === 0) return { leases: [], more: [], gone: [] }
    const share = (limit: number) => Math.ceil(limit / asked.size)
    // Each slot of a Cluster leases one call at least, however small its share. So that they do not hold many times the limits,
    // less is read of each; what is left makes it ready again.
    const mostOfACall =
      asked.size === 1 ? MAX_READ_ENTRIES : clamp(share(limits.entries), LEAST_ENTRIES_OF_A_CALL, MAX_READ_ENTRIES)
    const ofALane = {
      ...limits,
      calls: share(limits.calls),
      entries: share(limits.entries),
      bytes: share(limits.bytes),
    }
    const results = await Promise.allSettled(
      [...asked].map(([lane, partitions]) => this.leaseIn(lane, partitions, ofALane, mostOfACall, mayTakeSuspect)),
    )
    const answers = someOf(results) // one shard of a Cluster that cannot be reached does not stop the others
    const found = {
      leases: answers.flatMap((a) => a.leases),
      more: answers.flatMap((a) => a.more),
      gone: answers.flatMap((a) => a.gone),
    }
    return answers.length === 1 ? found : this.withOneSuspect(found, limits)
  }

  private async leaseIn(
    lane: Lane,
    partitions: PartitionKeys[],
    { calls, entries, bytes, leaseMs, suspectLapses }: LeaseLimits,
    mostOfACall: number,
    mayTakeSuspect: boolean,
  ): Promise<Leased> {
    const keys = [...partitions.flatMap((p) => [p.ready, p.leased, p.ended]), lane.wake]
    const prefixes = partitions.flatMap((p) => [p.streamPrefix, p.sessionPrefix])
    const args = [calls, entries, bytes, leaseMs, mostOfACall, suspectLapses, mayTakeSuspect ? 1 : 0, ...prefixes]
    const leased = leaseScript
      .run(this.client, keys, args)
      .then((reply) => readLeases(reply as LeaseReply, partitions, mostOfACall))
    try {
      return await this.away.watch(lane, leased, ({ leases }) => this.giveBack(leases))
    } catch (error) {
      if (this.away.isAway(lane)) this.putOffUntilBack(lane, partitions)
      throw error
    }
  }

  /** Each slot of a Cluster leases one. What dies of one of them would take the others along, and make them more suspect yet. */
  private async withOneSuspect(found: Leased, limits: LeaseLimits): Promise<Leased> {
    const suspects = found.leases.filter(({ lapses }) => lapses >= limits.suspectLapses)
    const surplus = new Set(suspects.sort((a, b) => a.lapses - b.lapses).slice(1))
    if (surplus.size === 0) return found
    const { again } = await this.settle([...surplus].map(untouched))
    return { ...found, leases: found.leases.filter((lease) => !surplus.has(lease)), more: [...found.more, ...again] }
  }

  private putOffUntilBack(lane: Lane, partitions: PartitionKeys[]): void {
    const numbers = partitions.map(({ partition }) => partition)
    const waiting = this.putOff.get(lane)
    if (waiting) {
      for (const partition of numbers) waiting.add(partition)
      return
    }
    this.putOff.set(lane, new Set(numbers))
    void this.away.untilBack(lane).then(() => {
      const these = [...this.putOff.get(lane)!]
      this.putOff.delete(lane)
      this.onBack(these)
    })
  }

  /** Of a server that has been waited for in vain, and then woke up. */
  private giveBack(leases: Lease[]): void {
    if (leases.length > 0) void this.settle(leases.map(untouched)) // what does not come back lapses
  }

  /** How many partitions cannot be asked now. */
  get partitionsAway(): number {
    const away = this.lanes.filter((lane) => this.away.isAway(lane))
    return away.reduce((sum, { partitions }) => sum + partitions.length, 0)
  }

  /** Gives leases that are still held their full time again. Not to be run while they are being settled. */
  async prolong(leases: Iterable<Lease>): Promise<void> {
    const groups = new Map<string, Lease[]>()
    for (const lease of leases) addTo(groups, this.tokenOf(lease), lease)
    const results = await Promise.allSettled(
      [...groups.values()].map(async (group) => {
        const keys = group.map((lease) => lease.partition.leased)
        const args = [group[0]!.deadline, this.leaseMs, ...group.map((lease) => lease.callSid)]
        const note = (deadline: number) => {
          for (const lease of group) lease.deadline = deadline
        }
        const prolonged = prolongScript.run(this.client, keys, args) as Promise<number>
        note(await this.away.servers.inTime(group[0]!.partition, prolonged, note)) // late or not, it is what they are settled by
      }),
    )
    // Not before all are done: until its own is, none of them may be settled.
    for (const result of results) if (result.status === 'rejected') throw result.reason
  }

  /**
   * Before `entryId` is tried alone. What lies before it, up to the lease's cursor, is committed.
   *
   * @returns false when the lease had lapsed
   */
  async isolate(lease: Lease, entryId: string): Promise<boolean> {
    const { callSid, partition, deadline, cursor, read, finalized } = lease
    const { leased, open, ended, wake } = partition
    const keys = [leased, open, ended, streamKey(lease), sessionKey(lease), wake]
    const args = [deadline, callSid, cursor, read, entryId, finalized ? 1 : 0]
    return (await isolateScript.run(this.client, keys, args)) === 1
  }

  async settle(settlements: Settlement[]): Promise<Settled> {
    const groups = new Map<string, Settlement[]>()
    for (const settlement of settlements) addTo(groups, this.tokenOf(settlement.lease), settlement)
    const results = await Promise.allSettled([...groups.values()].map((group) => this.settleTogether(group)))
    const replies = results.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []))
    const failed = results.find((result) => result.status === 'rejected')
    return {
      lapsed: replies.reduce((sum, r) => sum + r[0], 0),
      again: replies.flatMap((r) => r[1]),
      lost: replies.flatMap((r) => r[2]).map(([callSid, entries]) => ({ callSid, entries })),
      ...(failed && { failure: failed.reason as Error }),
    }
  }

  /** Leases of one lane that were taken together share their deadline. */
  private tokenOf({ deadline, partition }: Lease): string {
    return `${deadline} ${this.laneOf.get(partition)?.wake}`
  }

  private async settleTogether(group: Settlement[]): Promise<[number, number[], [string, number][]]> {
    const first = group[0]!.lease
    const byPartition = new Map<PartitionKeys, Settlement[]>()
    for (const settlement of group) addTo(byPartition, settlement.lease.partition, settlement)
    const keys = [this.laneOf.get(first.partition)!.wake]
    for (const p of byPartition.keys()) keys.push(p.ready, p.leased, p.open, p.ended)
    const args: (string | number)[] = [first.deadline, byPartition.size]
    for (const its of byPartition.values()) args.push(its.length)
    for (const settlement of [...byPartition.values()].flat()) {
      keys.push(streamKey(settlement.lease), sessionKey(settlement.lease))
      args.push(...settleArgs(settlement))
    }
    const settled = settleScript.run(this.client, keys, args)
    return (await this.away.servers.inTime(first.partition, settled)) as [number, number[], [string, number][]]
  }

  private byLane(partitions: PartitionKeys[]): Map<Lane, PartitionKeys[]> {
    const groups = new Map<Lane, PartitionKeys[]>()
    for (const partition of partitions) addTo(groups, this.laneOf.get(partition)!, partition)
    return groups
  }
}

const clamp = (n: number, least: number, most: number) => Math.max(least, Math.min(most, n))

function addTo<K, V>(groups: Map<K, V[]>, key: K, value: V): void {
  const group = groups.get(key)
  if (group) group.push(value)
  else groups.set(key, [value])
}

type LeaseReply = [
  deadline: number,
  leases: [number, string, string, number, number, 0 | 1, number, string, number, string, 0 | 1, 0 | 1][],
  more: number[],
  gone: string[],
]

function readLeases(
  [deadline, rows, more, gone]: LeaseReply,
  partitions: PartitionKeys[],
  mostOfACall: number,
): Leased {
  return {
    leases: rows.map(
      ([
        index,
        callSid,
        cursor,
        waiting,
        read,
        finalized,
        lapses,
        oldest,
        bytesAnEntry,
        alone,
        presumed,
        isCounted,
      ]) => ({
        callSid,
        partition: partitions[index - 1]!,
        deadline,
        cursor,
        waiting: Math.min(waiting, mostOfACall),
        counted: isCounted === 1 ? waiting : undefined,
        read,
        finalized: finalized === 1,
        lapses,
        oldestMs: Number(oldest),
        bytesAnEntry,
        alone: alone || undefined,
        presumed: presumed === 1,
      }),
    ),
    more: more.map((index) => partitions[index - 1]!.partition),
    gone,
  }
}
