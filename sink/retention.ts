/**
 * Retention: STREAM_RETENTION after a call was finalized, its stream, its session and its entries in the lists go from Redis;
 * before that, with ARCHIVE_DIR, into an archive.
 *
 * All sinks do it at the same time, each with the calls that it has claimed. What must hold:
 *  - nothing goes that is not committed, which the stream's cursor says; and that PostgreSQL still has, entry by entry: see
 *    stored.ts;
 *  - nothing goes that is not in a whole archive on the disk, where there is to be one;
 *  - what comes meanwhile keeps its call: purge.lua compares the stream's last entry with what was claimed.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { crashPoint } from '../shared/crash.js'
import { type Partitions, sessionKey, streamKey } from '../shared/keys.js'
import { type Lane, lanesOf } from '../shared/lanes.js'
import type { Logger } from '../shared/log.js'
import type { SinkMetrics } from '../shared/metrics.js'
import type { Pool } from '../shared/postgres.js'
import type { RedisClient } from '../shared/redis.js'
import { Script } from '../shared/script.js'
import { ArchiveFile } from './archive-file.js'
import { AwayLanes } from './away.js'
import type { Claimed } from './claimed.js'
import { storedOf } from './stored.js'

const claimScript = new Script('sink/claim.lua')
const keepScript = new Script('sink/keep.lua')
const purgeScript = new Script('sink/purge.lua')

/** Few enough that neither claiming nor purging them (27 µs a call, each) keeps Redis from others for a millisecond. */
const PAGE_CALLS = 25
/** How fast one sink works off what is past its retention: a million calls in 33 minutes, with 3 % of Redis' time. */
const CALLS_A_SECOND = 500
/** A sink that dies leaves its claims to the others after this time. */
const CLAIM_MS = 60_000
/** What has to stay is tried again after this time, and said once in it. */
const KEPT_MS = 3600_000
/** An archive is closed as soon as it has so much; all that it holds must be claimed still. */
const ARCHIVE_BYTES = 64 * 1024 * 1024
const ARCHIVE_MS = 15_000

export interface RetentionSettings {
  /** ms after a call was finalized */
  retentionMs: number
  archiveDir: string | undefined
  callsASecond: number
  claimMs: number
  /** In how many ms what has to stay is tried again. */
  keptMs: number
}

export const retentionSettings = (seconds: number, archiveDir: string | undefined): RetentionSettings => ({
  retentionMs: seconds * 1000,
  archiveDir,
  callsASecond: CALLS_A_SECOND,
  claimMs: CLAIM_MS,
  keptMs: KEPT_MS,
})

export interface RetentionContext {
  redis: RedisClient
  pool: Pool
  metrics: SinkMetrics
  log: Logger
}

export class Retention {
  private readonly lanes: Lane[]
  /** In a Cluster there are many: each round begins with another one. */
  private nextLane = 0
  private readonly keptIn = new Map<Lane, number>()
  private readonly away: AwayLanes
  private saidKeptAt = Number.NEGATIVE_INFINITY

  constructor(
    private readonly context: RetentionContext,
    partitions: Partitions,
    private readonly settings: RetentionSettings,
  ) {
    this.lanes = lanesOf(context.redis, partitions)
    this.away = new AwayLanes(context.redis)
  }

  /**
   * Removes what is past its retention, until nothing of it is left to try.
   *
   * @param signal aborted: it ends at the next page
   * @returns how many calls were removed
   * @throws Redis', PostgreSQL's and the disk's errors; what was claimed comes up again by itself
   */
  async round(signal?: AbortSignal): Promise<number> {
    const { metrics } = this.context
    try {
      let purged = 0
      for (let isMore = true; isMore && !signal?.aborted; ) {
        const collected = await this.collect(signal)
        isMore = collected.isMore
        purged += await this.purge(collected.calls)
        metrics.shared.keptCalls.set([...this.keptIn.values()].reduce((sum, n) => sum + n, 0))
      }
      return purged
    } catch (error) {
      if (!signal?.aborted) metrics.purgeFailures.inc()
      throw error
    }
  }

  /** Claims calls that may go: a page, or as many as make up an archive, which is then on the disk. */
  private async collect(signal: AbortSignal | undefined): Promise<{ calls: Claimed[]; isMore: boolean }> {
    const { archiveDir } = this.settings
    if (archiveDir === undefined) {
      const { calls, claimed } = await this.nextPage()
      return { calls, isMore: claimed > 0 }
    }
    const calls: Claimed[] = []
    const deadline = performance.now() + Math.min(ARCHIVE_MS, this.settings.claimMs / 4)
    let file: ArchiveFile | undefined
    // What comes up while an archive is being finished waits for the next round: else each few calls would get one of their own.
    let isMore = true
    try {
      while (!signal?.aborted && performance.now() < deadline && (file?.bytes ?? 0) < ARCHIVE_BYTES) {
        const page = await this.nextPage()
        isMore = page.claimed > 0
        if (!isMore) break
        for (const call of page.calls) {
          if (call.last !== '') {
            file ??= await ArchiveFile.create(archiveDir)
            await file.add(this.context.redis, call)
          }
          calls.push(call)
        }
      }
      await file?.finish()
    } catch (error) {
      await file?.discard()
      throw error
    }
    if (file) {
      this.context.metrics.archived.inc(file.entries)
      this.context.log.info({ archive: file.path, calls: calls.length, entries: file.entries }, 'archived final calls')
    }
    return { calls, isMore }
  }

  /** A page of claimed calls that may go, as fast as pages may follow one another; those that have to stay are noted. */
  private async nextPage(): Promise<{ calls: Claimed[]; claimed: number }> {
    const started = performance.now()
    const { calls, uncommitted, claimed } = await this.claim()
    if (claimed === 0) return { calls: [], claimed }
    const { redis, pool } = this.context
    const stored = await storedOf(
      redis,
      pool,
      calls.filter((call) => call.last !== ''),
    )
    const isGone = ({ last }: Claimed) => last === '' // with its stream: there is nothing left to lose
    await this.keep([...uncommitted, ...calls.filter((call) => !isGone(call) && !stored.has(call.callSid))])
    const pageMs = (claimed / this.settings.callsASecond) * 1000
    await sleep(Math.max(0, pageMs - (performance.now() - started)))
    return { calls: calls.filter((call) => isGone(call) || stored.has(call.callSid)), claimed }
  }

  /** @throws Redis' error, once there is nothing to claim elsewhere: a server of a Cluster that is down stops no other's calls */
  private async claim(): Promise<{ calls: Claimed[]; uncommitted: Claimed[]; claimed: number }> {
    const { retentionMs, claimMs } = this.settings
    const found = { calls: [] as Claimed[], uncommitted: [] as Claimed[], claimed: 0 }
    let failure: unknown
    for (let asked = 0; asked < this.lanes.length && found.claimed < PAGE_CALLS; asked++) {
      const lane = this.lanes[this.nextLane++ % this.lanes.length]!
      if (this.away.isAway(lane)) continue
      const keys = [...lane.partitions.flatMap((p) => [p.ready, p.leased, p.open, p.ended, p.kept]), lane.wake]
      const prefixes = lane.partitions.flatMap((p) => [p.streamPrefix, p.sessionPrefix])
      const args = [PAGE_CALLS - found.claimed, retentionMs, claimMs, ...prefixes]
      const reply = await this.away.watch(lane, claimScript.run(this.context.redis, keys, args)).catch((error) => {
        failure = error
      })
      if (reply === undefined) continue
      const [rows, kept] = reply as ClaimReply
      this.keptIn.set(lane, kept)
      found.claimed += rows.length
      for (const [index, callSid, token, first, last, entries, bytes, why] of rows) {
        const call = { callSid, partition: lane.partitions[index - 1]!, token, first, last, entries, bytes }
        if (why === '') found.calls.push(call)
        else if (why === 'uncommitted') found.uncommitted.push(call)
      }
    }
    if (failure !== undefined && found.claimed === 0) throw failure
    return found
  }

  private async keep(calls: Claimed[]): Promise<void> {
    if (calls.length === 0) return
    const { retentionMs, keptMs } = this.settings
    for (const group of this.groupsOf(calls)) {
      const keys = group.flatMap(({ partition }) => [partition.ended, partition.kept])
      const args = group.flatMap(({ callSid, token }) => [callSid, token])
      await keepScript.run(this.context.redis, keys, [retentionMs, keptMs, ...args])
    }
    if (performance.now() - this.saidKeptAt < KEPT_MS) return
    this.saidKeptAt = performance.now()
    const { callSid } = calls[0]!
    this.context.log.warn(
      { calls: calls.length, callSid },
      'calls past STREAM_RETENTION stay in Redis, for PostgreSQL has not all of them (calltape_sink_kept_calls says how many): ' +
        '`calltape replay` stores them again, `calltape orphans --adopt` what no sink has read, `calltape erase` removes a call',
    )
  }

  private async purge(calls: Claimed[]): Promise<number> {
    let purged = 0
    for (const group of this.groupsOf(calls)) {
      const keys = group.flatMap((call) => {
        const { ready, leased, open, ended, kept } = call.partition
        return [ready, leased, open, ended, kept, streamKey(call), sessionKey(call)]
      })
      const args = group.flatMap(({ callSid, token, last }) => [callSid, token, last])
      const outcomes = (await purgeScript.run(this.context.redis, keys, args)) as string[]
      crashPoint('after-purge')
      const gone = outcomes.filter((outcome) => outcome === 'purged').length
      this.context.metrics.purged.inc(gone)
      purged += gone
    }
    return purged
  }

  /** Calls that one script may touch together. */
  private groupsOf(calls: Claimed[]): Claimed[][] {
    const groups: Claimed[][] = []
    for (const { partitions } of this.lanes) {
      const its = this.lanes.length === 1 ? calls : calls.filter((call) => partitions.includes(call.partition))
      for (let from = 0; from < its.length; from += PAGE_CALLS) groups.push(its.slice(from, from + PAGE_CALLS))
    }
    return groups
  }
}

type ClaimReply = [
  claimed: [
    index: number,
    callSid: string,
    token: number,
    first: string,
    last: string,
    entries: number,
    bytes: number,
    why: '' | 'busy' | 'uncommitted',
  ][],
  kept: number,
]
