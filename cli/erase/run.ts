/**
 * The removal of calls, store by store, until none of them has anything left.
 *
 * The order: first the spool, for an ingest brings to Redis what is in it; then Redis, so that no sink can read the call any more;
 * then the sink that has read it already is waited for; then PostgreSQL, and the archives. In between, each of them may have got
 * something from the one before. So all are looked at once more, and the removal is run again, until nothing has come back.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { spoolsIn } from '../../ingest/spool-places.js'
import type { Config } from '../../shared/config.js'
import type { Partitions } from '../../shared/keys.js'
import type { Pool } from '../../shared/postgres.js'
import type { RedisClient } from '../../shared/redis.js'
import { eraseInArchives, finishArchives, listArchives, lookInArchives } from './archives.js'
import type { Counts } from './files.js'
import { awaitEmptying, eraseInSpool, lookInSpool } from './spool.js'
import { countInPostgres, countLegacyRows, eraseInPostgres, eraseInRedis, type InRedis, type Rows } from './stores.js'

const POLL_MS = 100
const HUNG = 'its sink has given no sign of life: should it wake up, it stores what it had read. Run erase again then'
const UNREADABLE = 'unreadable files'

export interface Stores {
  redis: RedisClient
  partitions: Partitions
  pool: Pool
  spoolDir: string | undefined
  archives: { given: string[]; dir: string | undefined }
  legacy: Config['LEGACY_CALL_SESSIONS']
}

/** How much of a call is where. */
export class Tally {
  private readonly counts = new Map<string, number>()

  add(where: string, what: string, n: number): void {
    if (n === 0) return
    const key = `${where}\t${what}`
    this.counts.set(key, (this.counts.get(key) ?? 0) + n)
  }

  get isEmpty(): boolean {
    return this.counts.size === 0
  }

  get rows(): { where: string; what: string; count: number }[] {
    return [...this.counts].map(([key, count]) => {
      const [where = '', what = ''] = key.split('\t')
      return { where, what, count }
    })
  }
}

export interface Outcome {
  callSid: string
  /** `unknown`: nothing is anywhere; `live`: it was left as it is; `left`: there is something that could not be removed. */
  state: 'erased' | 'found' | 'unknown' | 'live' | 'left'
  tally: Tally
  left: Tally
  /** What an operator has to know. */
  notes: string[]
}

export interface RunOptions {
  force: boolean
  dryRun: boolean
  /** For sinks, and for an ingest that empties its spool. */
  waitMs: number
}

export class Erasure {
  private readonly outcomes: Outcome[]
  private deadline = 0

  constructor(
    private readonly stores: Stores,
    callSids: string[],
    private readonly options: RunOptions,
  ) {
    this.outcomes = [...new Set(callSids)].map((callSid) => {
      return { callSid, state: 'unknown', tally: new Tally(), left: new Tally(), notes: [] }
    })
  }

  /** @throws the errors of the stores and of the file system; then run again it finishes */
  async run(): Promise<Outcome[]> {
    this.deadline = Date.now() + this.options.waitMs
    const found = await this.look(this.outcomes, 'tally')
    for (const outcome of this.outcomes) {
      if (outcome.tally.isEmpty) continue
      const inRedis = found.get(outcome)!
      outcome.state = inRedis.live && !this.options.force ? 'live' : 'found'
    }
    const meant = this.outcomes.filter(({ state }) => state === 'found')
    if (!this.options.dryRun && meant.length > 0) {
      for (const outcome of meant) outcome.tally = new Tally()
      await this.eraseAll(meant)
    }
    for (const outcome of this.outcomes) await this.noteLegacy(outcome)
    return this.outcomes
  }

  private async eraseAll(meant: Outcome[]): Promise<void> {
    for (let round = 0; ; round++) {
      await this.eraseSpool(meant)
      for (const outcome of meant) await this.eraseRedis(outcome, round > 0)
      const begun = meant.filter(({ state }) => state !== 'live')
      for (const outcome of begun) await this.awaitSink(outcome)
      for (const outcome of begun) this.addRows(outcome.tally, await eraseInPostgres(this.stores.pool, outcome.callSid))
      if (round === 0) await finishArchives(this.stores.archives.dir, this.deadline)
      await this.eraseArchives(begun)
      for (const outcome of begun) outcome.left = new Tally()
      await this.look(begun, 'left')
      for (const outcome of begun) outcome.state = outcome.left.isEmpty ? 'erased' : 'left'
      const left = begun.filter(({ state }) => state === 'left')
      const mayHelp = left.some((outcome) => !isUnreadableAlone(outcome.left))
      if (!mayHelp || Date.now() > this.deadline) return
      meant = left
      await sleep(POLL_MS)
    }
  }

  /** @param into where what was found is counted */
  private async look(outcomes: Outcome[], into: 'tally' | 'left'): Promise<Map<Outcome, InRedis>> {
    const { redis, partitions, pool, archives } = this.stores
    const found = new Map<Outcome, InRedis>()
    for (const outcome of outcomes) {
      const inRedis = await eraseInRedis(redis, partitions, outcome.callSid, 'look')
      found.set(outcome, inRedis)
      this.addRedis(outcome[into], inRedis)
      this.addRows(outcome[into], await countInPostgres(pool, outcome.callSid))
    }
    const callSids = sidsOf(outcomes)
    for (const spool of await this.spools()) this.addSpool(outcomes, into, (await lookInSpool(spool, callSids)).counts)
    const paths = await listArchives(archives.given, archives.dir)
    const { counts, unreadable } = await lookInArchives(paths, callSids)
    for (const outcome of outcomes) outcome[into].add('archives', 'entries', counts.get(outcome.callSid) ?? 0)
    for (const { reason } of into === 'left' ? unreadable : []) {
      for (const outcome of outcomes)
        note(outcome, `cannot be read to its end, and may have more of the call: ${reason}`)
      for (const outcome of outcomes) outcome.left.add('archives', UNREADABLE, 1)
    }
    return found
  }

  private async eraseSpool(outcomes: Outcome[]): Promise<void> {
    const callSids = sidsOf(outcomes)
    for (const spool of await this.spools()) {
      const mayTakeOver = await awaitEmptying(spool, callSids, this.deadline)
      const { counts, isTakenOver } = await eraseInSpool(spool, callSids, mayTakeOver)
      this.addSpool(outcomes, 'tally', counts)
      if (!isTakenOver) continue
      const says = `${spool} was taken over, for nobody was emptying it: an ingest that uses it all the same has to be restarted`
      for (const outcome of outcomes) if (counts.pending.has(outcome.callSid)) note(outcome, says)
    }
  }

  /** Of each of ingest's processes. */
  private async spools(): Promise<string[]> {
    return this.stores.spoolDir === undefined ? [] : spoolsIn(this.stores.spoolDir)
  }

  /** @param isBegun what comes now belongs to what was erased */
  private async eraseRedis(outcome: Outcome, isBegun: boolean): Promise<void> {
    const { redis, partitions } = this.stores
    const isDrained = outcome.tally.rows.some(({ where }) => where === 'spool')
    const how = this.options.force || isBegun || isDrained ? 'any' : 'ended'
    const inRedis = await eraseInRedis(redis, partitions, outcome.callSid, how)
    if (inRedis.removed) this.addRedis(outcome.tally, inRedis)
    else outcome.state = 'live' // it was not when it was looked at
    if (inRedis.leaseMs === 0) note(outcome, HUNG)
  }

  /** Until no sink has the call: what it had read is committed then, or never will be. */
  private async awaitSink(outcome: Outcome): Promise<void> {
    const { redis, partitions } = this.stores
    for (;;) {
      const inRedis = await eraseInRedis(redis, partitions, outcome.callSid, 'any')
      const { leaseMs } = inRedis
      this.addRedis(outcome.tally, { ...inRedis, lists: 0 })
      if (leaseMs === undefined) return
      if (leaseMs === 0) {
        note(outcome, HUNG)
        return
      }
      if (Date.now() > this.deadline) return
      await sleep(POLL_MS)
    }
  }

  private async eraseArchives(outcomes: Outcome[]): Promise<void> {
    const { given, dir } = this.stores.archives
    const paths = await listArchives(given, dir)
    const counts = await eraseInArchives(paths, sidsOf(outcomes))
    for (const outcome of outcomes) outcome.tally.add('archives', 'entries', counts.get(outcome.callSid) ?? 0)
  }

  private addRedis(tally: Tally, { entries, sessions, lists }: InRedis): void {
    tally.add('Redis', 'stream entries', entries)
    tally.add('Redis', 'sessions', sessions)
    tally.add('Redis', 'places in lists', lists)
  }

  private addRows(tally: Tally, rows: Rows): void {
    for (const each of rows) tally.add('PostgreSQL', each.table, each.rows)
  }

  private addSpool(
    outcomes: Outcome[],
    into: 'tally' | 'left',
    counts: Record<'pending' | 'damaged' | 'refused', Counts>,
  ) {
    for (const outcome of outcomes) {
      outcome[into].add('spool', 'events', counts.pending.get(outcome.callSid) ?? 0)
      outcome[into].add('spool', 'damaged records', counts.damaged.get(outcome.callSid) ?? 0)
      outcome[into].add('spool', 'refused events', counts.refused.get(outcome.callSid) ?? 0)
    }
  }

  private async noteLegacy(outcome: Outcome): Promise<void> {
    const { pool, legacy } = this.stores
    if (!legacy) return
    const rows = await countLegacyRows(pool, legacy, outcome.callSid)
    const name = `${legacy.schema}.${legacy.table}`
    if (rows === undefined) note(outcome, `${name} (LEGACY_CALL_SESSIONS) cannot be asked whether it has the call`)
    else if (rows > 0) note(outcome, `${name} (LEGACY_CALL_SESSIONS) is another application's: its row stays as it is`)
  }
}

/** To try again would not help: an archive that cannot be read to its end stays, with what it has. */
const isUnreadableAlone = ({ rows }: Tally) =>
  rows.some(({ what }) => what === UNREADABLE) && rows.every(({ where }) => where === 'archives')

const sidsOf = (outcomes: Outcome[]) => new Set(outcomes.map(({ callSid }) => callSid))

function note(outcome: Outcome, text: string): void {
  if (!outcome.notes.includes(text)) outcome.notes.push(text)
}
