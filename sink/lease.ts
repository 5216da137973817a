/**
 * The scripts that share calls out among sinks: lease, prolong, isolate, settle, reclaim, reap, end. See the .lua files for what
 * each must hold.
 */
import { type CallPlace, type PartitionKeys, type Partitions, sessionKey, streamKey } from '../shared/keys.js'
import { type Lane, lanesOf, someOf } from '../shared/lanes.js'
import type { RedisClient } from '../shared/redis.js'
import { Script } from '../shared/script.js'
import { AwayLanes } from './away.js'
import { MAX_READ_ENTRIES } from './read.js'

const leaseScript = new Script('sink/lease.lua')
const prolongScript = new Script('sink/prolong.lua')
const isolateScript = new Script('sink/isolate.lua')
const settleScript = new Script('sink/settle.lua')
const reclaimScript = new Script('sink/reclaim.lua')
const reapScript = new Script('sink/reap.lua')
const endScript = new Script('sink/end.lua')

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

/** What became of a lease. */
export interface Settlement {
  lease: Lease
  /** The last entry committed; undefined: none, the call is given back. */
  last: string | undefined
  /** How many entries were read. */
  count: number
  finalized: boolean
  /** It is given back because it came to nothing, and perhaps that was its own doing. */
  lapsed?: boolean
  /** Something that could be read is in quarantine now: it may have been the call's end. */
  quarantined?: boolean
  /** There was progress, but not yet at what its lapses are for. */
  keepLapses?: boolean
  /** It is given back before anything was tried: what is known of it stays. */
  untried?: boolean
}

/** It was leased, and not looked at. */
export const untouched = (lease: Lease): Settlement => ({ ...givenBack(lease), untried: true })

/** Nothing of it was committed: whoever works next may have the call at once. */
export const givenBack = (lease: Lease): Settlement => ({ lease, last: undefined, count: 0, finalized: false })

export interface Settled {
  /** How many leases had lapsed. */
  lapsed: number
  /** The numbers of partitions with calls that are ready again. */
  again: number[]
  /** Entries that somebody trimmed away before they were committed. */
  lost: { callSid: string; entries: number }[]
  /** Why some of the leases are not settled; the rest is of the others. */
  failure?: Error
}

export interface LeaseLimits {
  calls: number
  entries: number
  bytes: number
  leaseMs: number
  /** A call with so many lapses is a suspect: it is leased by itself. */
  suspectLapses: number
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
   * @param mayTakeSuspect one call with so many lapses may be leased, too
   * @returns what was leased, the numbers of partitions that may have more, and calls whose stream is gone although
   *   something waited in it
   */
  async lease(
    hints: Iterable<number>,
    limits: LeaseLimits,
    mayTakeSuspect = true,
  ): Promise<{ leases: Lease[]; more: number[]; gone: string[] }> {
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
    const results = await Promise.allSettled(
      [...asked].map(async ([lane, partitions]) => {
        const keys = [...partitions.flatMap((p) => [p.ready, p.leased, p.ended]), lane.wake]
        const prefixes = partitions.flatMap((p) => [p.streamPrefix, p.sessionPrefix])
        const most = [share(limits.calls), share(limits.entries), share(limits.bytes)]
        const args = [...most, limits.leaseMs, mostOfACall, limits.suspectLapses, mayTakeSuspect ? 1 : 0, ...prefixes]
        const leased = leaseScript
          .run(this.client, keys, args)
          .then((reply) => readLeases(reply as LeaseReply, partitions, mostOfACall))
        try {
          return await this.away.watch(lane, leased, ({ leases }) => this.giveBack(leases))
        } catch (error) {
          if (this.away.isAway(lane)) this.putOffUntilBack(lane, partitions)
          throw error
        }
      }),
    )
    const answers = someOf(results) // one shard of a Cluster that cannot be reached does not stop the others
    const found = {
      leases: answers.flatMap((a) => a.leases),
      more: answers.flatMap((a) => a.more),
      gone: answers.flatMap((a) => a.gone),
    }
    return answers.length === 1 ? found : this.withOneSuspect(found, limits)
  }

  /** Each slot of a Cluster leases one. What dies of one of them would take the others along, and make them more suspect yet. */
  private async withOneSuspect<F extends { leases: Lease[]; more: number[] }>(
    found: F,
    limits: LeaseLimits,
  ): Promise<F> {
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
      const { lease, last, count } = settlement
      keys.push(streamKey(lease), sessionKey(lease))
      const read = lease.read < 0 ? -1 : lease.read + count
      const isAll = read >= 0 && count === lease.counted ? 1 : 0
      args.push(lease.callSid, last ?? lease.cursor, read, isAll, endOf(settlement), lapsesAfter(settlement))
    }
    const settled = settleScript.run(this.client, keys, args)
    return (await this.away.servers.inTime(first.partition, settled)) as [number, number[], [string, number][]]
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
    const keys = [this.laneOf.get(p)!.wake, p.ready, p.leased, p.open, p.ended, streamKey(call), sessionKey(call)]
    return (await endScript.run(this.client, keys, [callSid, p.partition])) === 1
  }

  private async onEachLane(
    script: Script,
    most: number,
    keysOf: (p: PartitionKeys) => string[],
    argsOf: (p: PartitionKeys) => string[],
    moreArgs: (lane: Lane) => string[] = () => [],
  ): Promise<string[]> {
    const lanes = this.lanes.filter((lane) => !this.away.servers.isAway(lane))
    const results = await Promise.allSettled(
      lanes.map((lane) => {
        const { wake, partitions } = lane
        const args = [most, ...partitions.flatMap(argsOf), ...moreArgs(lane)]
        const asked = script.run(this.client, [wake, ...partitions.flatMap(keysOf)], args)
        return this.away.servers.inTime(lane, asked)
      }),
    )
    return someOf(results as PromiseSettledResult<string[]>[]).flat()
  }

  private byLane(partitions: PartitionKeys[]): Map<Lane, PartitionKeys[]> {
    const groups = new Map<Lane, PartitionKeys[]>()
    for (const partition of partitions) addTo(groups, this.laneOf.get(partition)!, partition)
    return groups
  }
}

/** What settle.lua is told of the call's end. */
const endOf = ({ finalized, quarantined }: Settlement) =>
  finalized ? 'finalized' : quarantined ? 'quarantined' : 'unknown'

/** What settle.lua is to do with the call's lapses. */
function lapsesAfter({ lease, last, lapsed, keepLapses, untried }: Settlement): 'none' | 'add' | 'keep' | 'forget' {
  if (lapsed) return 'add'
  if (lease.lapses === 0 || untried) return 'none'
  return last === undefined || keepLapses ? 'keep' : 'forget'
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
): { leases: Lease[]; more: number[]; gone: string[] } {
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
