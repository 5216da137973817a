/** How far PostgreSQL is behind Redis: of all calls, whichever sink works on them. See backlog.lua and behind.lua. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { PartitionKeys, Partitions } from '../shared/keys.js'
import { type Lane, lanesOf } from '../shared/lanes.js'
import type { RedisClient } from '../shared/redis.js'
import { Script } from '../shared/script.js'

const backlogScript = new Script('sink/backlog.lua')
const behindScript = new Script('sink/behind.lua')

/** What one script looks into: so that it keeps Redis from others for less than a millisecond, however many calls wait. */
const PARTITIONS_AT_ONCE = 16
const STREAMS_AT_ONCE = 64
/** Of entries, beside one: they may be large. Then the script ends early, and another one goes on. */
const BYTES_AT_ONCE = 256 * 1024
/** Entries are counted in so many ready calls of a partition; more calls are taken to have as many on average. */
const COUNTED_READY_CALLS = 16
/** For so long one answer serves all who ask. */
const FRESH_MS = 500
/** An answer that took long serves so many times as long: asking takes Redis no more than a twentieth of its time. */
const FRESH_TIMES = 20
const ANSWER_TIMEOUT_MS = 2000
const LAGGING_MS = 1000

export interface BacklogFigures {
  /** Age of the oldest entry in Redis that is not known to be in PostgreSQL, ms by Redis' clock; 0 when there is none. */
  lagMs: number
  /** Where that entry is; when there is none, any. */
  worstPartition: number
  /** Partitions in which one has been waiting for over a second. */
  laggingPartitions: number
  entriesBehind: number
  /** With entries that no sink works on. */
  readyCalls: number
  leasedCalls: number
  openCalls: number
  /** Final ones that are still in Redis. */
  endedCalls: number
}

interface PartitionBacklog {
  partition: number
  calls: { ready: number; leased: number; open: number; ended: number }
  lagMs: number
  entriesBehind: number
}

export class Backlog {
  private readonly lanes: Lane[]
  private reading: Promise<BacklogFigures> | undefined
  private last: BacklogFigures | undefined
  private freshUntil = 0

  constructor(
    private readonly client: RedisClient,
    partitions: Partitions,
  ) {
    this.lanes = lanesOf(client, partitions)
  }

  /**
   * At most half a second old, or twenty times as old as it took to find out.
   *
   * @throws Redis' errors, also when one node of a Cluster fails: what is known of some partitions says nothing of all
   */
  read(): Promise<BacklogFigures> {
    if (this.last && performance.now() < this.freshUntil) return Promise.resolve(this.last)
    this.reading ??= this.ask().finally(() => {
      this.reading = undefined
    })
    return this.reading
  }

  private async ask(): Promise<BacklogFigures> {
    const started = performance.now()
    const asked = Promise.all(this.lanes.map((lane) => this.askLane(lane)))
    const parts = await inTime(asked)
    const now = performance.now()
    this.freshUntil = now + Math.max(FRESH_MS, (now - started) * FRESH_TIMES)
    this.last = summary(parts.flat())
    return this.last
  }

  /** One script after the other: a connection's commands that Redis has all at once would keep it from others for their sum. */
  private async askLane({ partitions }: Lane): Promise<PartitionBacklog[]> {
    const found: PartitionBacklog[] = []
    for (let at = 0; at < partitions.length; at += PARTITIONS_AT_ONCE) {
      found.push(...(await this.askPartitions(partitions.slice(at, at + PARTITIONS_AT_ONCE))))
    }
    return found
  }

  private async askPartitions(partitions: PartitionKeys[]): Promise<PartitionBacklog[]> {
    const keys = partitions.flatMap((p) => [p.ready, p.leased, p.open, p.ended])
    const [now, rows] = (await backlogScript.run(this.client, keys, [COUNTED_READY_CALLS])) as BacklogReply
    const streams = (sids: string[], p: number) => sids.map((sid) => ({ p, key: partitions[p]!.streamPrefix + sid }))
    const leased = await this.askStreams(
      rows.flatMap((row, p) => streams(row[5], p)),
      true,
    )
    const counted = await this.askStreams(
      rows.flatMap((row, p) => streams(row[6], p)),
      false,
    )
    return rows.map(([ready, leasedCalls, open, ended, oldestReady], p) => {
      const mine = leased.filter((stream) => stream.p === p)
      const sample = counted.filter((stream) => stream.p === p)
      const arrivals = [oldestReady, ...mine.map((stream) => stream.oldest)].filter((ms) => ms !== '').map(Number)
      const inReady = sumOf(sample.map((stream) => stream.behind)) * (ready / Math.max(1, sample.length))
      return {
        partition: partitions[p]!.partition,
        calls: { ready, leased: leasedCalls, open, ended },
        lagMs: Math.max(0, now - Math.min(now, ...arrivals)),
        entriesBehind: sumOf(mine.map((stream) => stream.behind)) + Math.round(inReady),
      }
    })
  }

  private async askStreams<T extends { key: string }>(streams: T[], isOldestWanted: boolean) {
    const answered: (T & { behind: number; oldest: string })[] = []
    while (answered.length < streams.length) {
      const asked = streams.slice(answered.length, answered.length + STREAMS_AT_ONCE)
      const keys = asked.map(({ key }) => key)
      const args = [isOldestWanted ? keys.length : 0, BYTES_AT_ONCE]
      const reply = (await behindScript.run(this.client, keys, args)) as (number | string)[]
      for (let i = 0; i < reply.length; i += 2) {
        answered.push({ ...asked[i / 2]!, behind: Number(reply[i]), oldest: String(reply[i + 1]) })
      }
    }
    return answered
  }
}

type BacklogReply = [
  now: number,
  partitions: [
    ready: number,
    leased: number,
    open: number,
    ended: number,
    oldestReady: string,
    leasedSids: string[],
    readySids: string[],
  ][],
]

function summary(parts: PartitionBacklog[]): BacklogFigures {
  const worst = parts.reduce((a, b) => (b.lagMs > a.lagMs ? b : a))
  return {
    lagMs: worst.lagMs,
    worstPartition: worst.partition,
    laggingPartitions: parts.filter(({ lagMs }) => lagMs > LAGGING_MS).length,
    entriesBehind: sumOf(parts.map((part) => part.entriesBehind)),
    readyCalls: sumOf(parts.map(({ calls }) => calls.ready)),
    leasedCalls: sumOf(parts.map(({ calls }) => calls.leased)),
    openCalls: sumOf(parts.map(({ calls }) => calls.open)),
    endedCalls: sumOf(parts.map(({ calls }) => calls.ended)),
  }
}

const sumOf = (numbers: number[]) => numbers.reduce((sum, n) => sum + n, 0)

/** A Redis that hangs must not keep those waiting who want to know what is wrong. @throws when its answer takes over 2 s */
export async function inTime<T>(asked: Promise<T>): Promise<T> {
  const late = new AbortController()
  const timeout = sleep(ANSWER_TIMEOUT_MS, undefined, { signal: late.signal, ref: false }).then(() => {
    throw new Error(`Redis: no answer within ${ANSWER_TIMEOUT_MS} ms`)
  })
  try {
    return await Promise.race([asked, timeout])
  } finally {
    late.abort()
    for (const each of [asked, timeout]) each.catch(() => undefined) // nobody waits for the other one any more
  }
}
