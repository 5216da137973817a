/**
 * verify's way through the streams. Each call is a walk from its first entry to the one that was last when the walk began.
 * A walk that meets an entry which is not in PostgreSQL is parked there: a sink may be about to write it. When all others
 * are through, the parked ones go on as the sinks' cursors pass where they stand, or when the patience is at its end.
 *
 * What is read at a time, and what is remembered, does not grow with the number of entries; the set of calls' names does
 * with the number of calls (see scanStreams).
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { compareIds, isEntryId } from '../../shared/entry-ids.js'
import type { CallPlace } from '../../shared/keys.js'
import type { Pool } from '../../shared/postgres.js'
import type { RedisClient } from '../../shared/redis.js'
import { decodeAlone, leaseFromStart } from '../entries.js'
import {
  readCursor,
  readEntriesById,
  readPage,
  scanStreams,
  startWalk,
  streamInfo,
  type Walk,
  type Window,
} from '../streams.js'
import { type ComparedEntry, compareEntries, type EntryFacts, factsOf, type Outcome } from './compare.js'
import type { Finding, Report } from './report.js'
import { type CallState, pair, readCalls, rowsOfCall, TABLES, type Table } from './rows.js'

const PAGE_CALLS = 200
/** Pages that are worked on at once: while one waits for a store, the other is compared. */
const PARALLEL_PAGES = 2
/** Beyond so many parked walks they are waited for before more calls are begun. */
const MOST_PARKED = 10_000
const LOOK_MS = 250
const ROWS_PAGE = 1000

interface Scope {
  /** Only this call. */
  only?: CallPlace | undefined
  window: Window
}

interface CallWalk extends Walk {
  /** Rows whose entry has been seen. */
  matched: Record<Table, number>
  /** What its stored entries say of its end. */
  end: EntryFacts['says']
  /** The sinks' cursor, read before the rows: what is missing up to there is lost. Undefined: not known. */
  cursor: string | undefined
}

/** Compares streams with rows, and puts what it finds into the report. */
export class Verification {
  private parked: CallWalk[] = []
  /** Of the time for which is waited at most, ms. */
  private patienceMs: number
  private isPatient = true

  constructor(
    private readonly redis: RedisClient,
    private readonly pool: Pool,
    private readonly scope: Scope,
    waitMs: number,
    private readonly report: Report,
  ) {
    this.patienceMs = waitMs
  }

  /** How many calls are waited for. */
  get waitingCalls(): number {
    return this.parked.length
  }

  async run(): Promise<void> {
    const { only } = this.scope
    const pages = only ? onePage([only]) : scanStreams(this.redis, PAGE_CALLS)
    let isDone = false
    const takePages = async () => {
      while (!isDone && this.parked.length < MOST_PARKED) {
        const { value, done } = await pages.next()
        if (done) isDone = true
        else await this.begin(value)
      }
    }
    while (!isDone) {
      await Promise.all(Array.from({ length: PARALLEL_PAGES }, takePages))
      await this.lookAgain()
    }
  }

  private async begin(names: CallPlace[]): Promise<void> {
    const walks = await Promise.all(names.map((name) => startWalk(this.redis, name, this.scope.window)))
    const begun = walks.flatMap((walk): CallWalk[] =>
      walk ? [{ ...walk, matched: { turns: 0, events: 0 }, end: undefined, cursor: undefined }] : [],
    )
    this.report.counts.calls += begun.length
    for (const [i, { callSid }] of names.entries()) {
      if (walks[i] === undefined && callSid.includes('\uFFFD')) this.addUnreadable(callSid)
    }
    await this.goOn(begun)
  }

  /** No sink can be told of it either: its name does not pass through UTF-8. */
  private addUnreadable(callSid: string): void {
    const detail = 'a stream whose name is not UTF-8: no sink reads it'
    this.report.add({ kind: 'missing', call_sid: callSid, table: 'quarantined_events', detail })
  }

  /** Lets the parked walks go on, each when the sinks have committed the entry it waits for, at last all of them. */
  private async lookAgain(): Promise<void> {
    const deadline = performance.now() + this.patienceMs
    while (this.parked.length > 0) {
      this.isPatient = performance.now() < deadline
      const waiting = this.parked
      this.parked = []
      for (let i = 0; i < waiting.length; i += PAGE_CALLS) {
        const page = waiting.slice(i, i + PAGE_CALLS)
        await Promise.all(page.map(async (walk) => (walk.cursor = await readCursor(this.redis, walk))))
        const isDue = (walk: CallWalk) => !this.isPatient || compareIds(walk.next, walk.cursor!) <= 0
        this.parked.push(...page.filter((walk) => !isDue(walk)))
        await this.goOn(page.filter(isDue))
      }
      if (this.parked.length > 0) await sleep(LOOK_MS)
    }
    this.patienceMs = Math.max(0, deadline - performance.now())
    this.isPatient = true
  }

  /** Takes the walks to their ends, or to where they are parked. */
  private async goOn(walks: CallWalk[]): Promise<void> {
    const queue = [...walks]
    while (queue.length > 0) {
      const page = await readPage(this.redis, queue)
      const ended: CallWalk[] = []
      const compared = await compareEntries(this.pool, page)
      for (const stretch of page) {
        const isParked = !this.judgeAll(stretch.walk, compared.get(stretch.walk)!)
        if (isParked) this.parked.push(stretch.walk)
        else if (stretch.isLast) ended.push(stretch.walk)
        else queue.unshift(stretch.walk)
      }
      await this.judgeCalls(ended)
    }
  }

  /** @returns false when one of the entries is not there, but may yet come; the walk then stands at it */
  private judgeAll(walk: CallWalk, entries: ComparedEntry[]): boolean {
    const missingKeys = new Set<string>()
    for (const [i, entry] of entries.entries()) {
      if (entry.outcome === 'absent') {
        const isCommitted = walk.cursor !== undefined && compareIds(entry.id, walk.cursor) <= 0
        if (!isCommitted && (walk.cursor === undefined || this.isPatient)) {
          walk.next = entry.id
          walk.left += entries.length - i
          return false
        }
        this.missing(walk, entry, isCommitted, missingKeys)
      } else this.found(walk, entry, entry.outcome)
      this.report.counts.entries++
    }
    return true
  }

  private missing(walk: CallWalk, entry: ComparedEntry, isCommitted: boolean, missingKeys: Set<string>): void {
    const key = entry.table && pair(entry.table, entry.key)
    if (key !== undefined && missingKeys.has(key)) {
      this.report.counts.duplicates++ // of a turn that is missing: one finding
      return
    }
    if (key !== undefined) missingKeys.add(key)
    if (!isCommitted) this.report.counts.waiting++
    const detail = isCommitted ? 'not there, although the sink is past it' : 'not committed yet'
    this.report.add(finding('missing', walk, entry, { detail }))
  }

  private found(walk: CallWalk, entry: ComparedEntry, outcome: Exclude<Outcome, 'absent'>): void {
    const { counts } = this.report
    if (outcome === 'duplicate') counts.duplicates++
    else if (outcome === 'quarantined') counts.quarantined++
    else if (outcome === 'dropped') counts.dropped++
    else {
      counts[entry.table!]++
      if (outcome === 'stored') walk.matched[entry.table!]++
      if (entry.wrong.length > 0) {
        const detail = entry.wrong.includes('stream_id') ? 'made from another entry' : 'not what the entry says'
        this.report.add(finding('different', walk, entry, { columns: entry.wrong, detail }))
      }
    }
    // As the fold does: a word that the call is over stands; a presumption falls with the next new turn or connection.
    if (outcome !== 'stored') return
    if (entry.says === 'over') walk.end = 'over'
    else if (entry.says && walk.end !== 'over') walk.end = entry.says
  }

  /** What is to be said of whole calls, once all their entries have been seen. */
  private async judgeCalls(walks: CallWalk[]): Promise<void> {
    if (walks.length === 0) return
    const states = await readCalls(
      this.pool,
      walks.map((walk) => walk.callSid),
    )
    for (const walk of walks) {
      const state = states.get(walk.callSid)
      if (!state) continue // a name that PostgreSQL cannot hold: nothing is stored of it
      this.judgeCall(walk, state)
      const isWholeStream = this.scope.window.from === '-' && this.scope.window.to === '+'
      if (!isWholeStream) continue
      for (const table of ['turns', 'events'] as const) {
        if (state[table] !== walk.matched[table]) await this.judgeRows(walk, table)
      }
    }
  }

  private judgeCall(walk: CallWalk, state: CallState): void {
    const add = (kind: Finding['kind'], detail: string, columns: string[] = []) =>
      this.report.add({
        kind,
        call_sid: walk.callSid,
        table: 'call_sessions',
        ...(columns.length > 0 ? { columns } : {}),
        detail,
      })
    if (!state.known) {
      if (walk.matched.turns + walk.matched.events > 0) add('missing', 'the call has rows, but none here')
    } else if ((walk.end === 'over' || walk.end === 'presumed over') && !state.finalized)
      add('not finalized', 'call.ended is stored')
    const misfits = [state.countFits ? '' : 'turn_count', state.transcriptFits ? '' : 'full_transcript'].filter(Boolean)
    if (misfits.length > 0) add('wrong transcript', `the call has ${state.turns} turns`, misfits)
  }

  /**
   * There are more rows than entries that made them: looks up the entry of each row. New ones may have come meanwhile. A row
   * older than all that the stream has tells nothing: the stream was trimmed, or Redis emptied. Otherwise, if the stream has
   * lost nothing since it began, nothing can have made such a row.
   */
  private async judgeRows(walk: CallWalk, table: Table): Promise<void> {
    const lease = leaseFromStart(walk.callSid, walk.partition)
    for await (const rows of rowsOfCall(this.pool, table, walk.callSid, ROWS_PAGE)) {
      const known = rows.filter((row) => isEntryId(row.streamId))
      const ids = known.map((row) => row.streamId)
      const entries = new Map((await readEntriesById(this.redis, walk, ids)).map((entry, i) => [ids[i]!, entry]))
      const unmatched = rows.filter(({ streamId, key }) => {
        const entry = entries.get(streamId)
        const decoded = entry && factsOf(decodeAlone(lease, entry), streamId)
        return decoded?.table !== table || decoded.key !== key
      })
      if (unmatched.length === 0) continue
      const stream = await streamInfo(this.redis, walk) // after the look-ups: what is whole now was whole then
      for (const { key, streamId } of unmatched) {
        const first = stream?.first
        const isOlder = first === undefined || (isEntryId(streamId) && compareIds(streamId, first) < 0)
        if (isOlder || !stream!.isWhole) {
          this.report.counts.rows_without_entry++
          continue
        }
        const detail = entries.get(streamId)
          ? 'a row, but this entry makes another one'
          : 'a row, but the stream has no such entry: it was made by somebody else, or Redis has lost entries'
        this.report.add(finding('unexpected', walk, { id: streamId, table, key, seq: undefined }, { detail }))
      }
    }
  }
}

async function* onePage(page: CallPlace[]): AsyncGenerator<CallPlace[]> {
  yield page
}

function finding(
  kind: Finding['kind'],
  { callSid }: CallPlace,
  { id, table, key, seq }: Pick<EntryFacts, 'id' | 'table' | 'key' | 'seq'>,
  more: { detail: string; columns?: string[] },
): Finding {
  const name = table ? TABLES[table].name : 'quarantined_events'
  return { kind, call_sid: callSid, table: name, entry_id: id, key, ...(seq === undefined ? {} : { seq }), ...more }
}
