/** Where a replay reads: the streams in Redis, or archives of them. Both give the same pieces of calls. */
import { readdir, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { OperatorError } from '../../shared/config.js'
import { compareIds } from '../../shared/entry-ids.js'
import type { CallPlace, Partitions } from '../../shared/keys.js'
import { reasonOf } from '../../shared/log.js'
import type { RedisClient } from '../../shared/redis.js'
import { type ArchivePage, readArchive } from '../../sink/archive.js'
import type { Entry } from '../../sink/decode.js'
import type { RawField } from '../../sink/raw-fields.js'
import { readPage, readProgress, scanStreams, startWalk, type Walk, type Window } from '../streams.js'
import type { ReplayReport } from './report.js'
import type { StoredCall } from './rows.js'

/** Some entries of one call, in their order. */
export interface Piece extends CallPlace {
  entries: Entry[]
  /** The first of them that was read: an entry in quarantine is left out. Where there are none, the entry before them. */
  first: string
  /** The entry before them that was read; 0-0 for the first piece. */
  after: string
  /** No entries of the call follow. */
  isLast: boolean
  /** What there was of the call before the first piece. */
  stored: StoredCall
  /** Of an archive: the fields of those entries, by id, that are not all text. (Of a stream they are read once more.) */
  bytes?: Map<string, RawField[]> | undefined
}

export interface Source {
  pieces(): AsyncGenerator<Piece>
}

export interface Scope {
  /** Only this call. */
  callSid?: string | undefined
  window: Window
}

export type LookUp = (calls: (CallPlace & { first: string; last: string })[]) => Promise<StoredCall[]>

const PAGE_CALLS = 200

/** Pages of the calls that are meant. */
export async function* placesOf(
  redis: RedisClient,
  partitions: Partitions,
  { callSid }: Scope,
): AsyncGenerator<CallPlace[]> {
  if (callSid === undefined) yield* scanStreams(redis, PAGE_CALLS)
  else yield [{ callSid, partition: partitions.of(callSid) }]
}

interface ReplayWalk extends Walk {
  after: string
  stored: StoredCall
}

export class Streams implements Source {
  /** @param onlyCommitted what is behind the sinks' cursor is theirs: it is not given */
  constructor(
    private readonly redis: RedisClient,
    private readonly partitions: Partitions,
    private readonly scope: Scope,
    private readonly lookUp: LookUp,
    private readonly onlyCommitted: boolean,
    private readonly report: ReplayReport,
  ) {}

  async *pieces(): AsyncGenerator<Piece> {
    for await (const places of placesOf(this.redis, this.partitions, this.scope)) {
      const queue = await this.begin(places)
      const read = () => {
        const reading = queue.length > 0 ? readPage(this.redis, queue) : undefined
        reading?.catch(() => undefined) // told when it is its turn
        return reading
      }
      for (let reading = read(); reading; ) {
        const page = await reading
        const pieces = page.flatMap(({ walk, entries, isLast }): Piece[] => {
          const { callSid, partition, after, stored } = walk
          walk.after = entries.at(-1)?.[0] ?? after
          // The last one may have none: only then is it known that none follow.
          if (entries.length === 0 && after === '0-0') return []
          return [{ callSid, partition, entries, first: entries[0]?.[0] ?? after, after, isLast, stored }]
        })
        queue.unshift(...page.filter((stretch) => !stretch.isLast).map((stretch) => stretch.walk))
        reading = read() // while this page is being stored
        yield* pieces
      }
    }
  }

  private async begin(places: CallPlace[]): Promise<ReplayWalk[]> {
    const started = await Promise.all(places.map((place) => startWalk(this.redis, place, this.scope.window)))
    const walks = started.filter((walk) => walk !== undefined)
    // In this order: nothing has been added before the rows were counted if nothing has been added now.
    const stored = await this.lookUp(walks)
    const begun = await Promise.all(walks.map((walk, i) => this.bound({ ...walk, after: '0-0', stored: stored[i]! })))
    return begun.filter((walk) => walk !== undefined)
  }

  /** @returns undefined when there is nothing to be done for the call */
  private async bound(walk: ReplayWalk): Promise<ReplayWalk | undefined> {
    const { report, redis, scope } = this
    const length = walk.left
    const { cursor, behind } = await readProgress(redis, walk)
    report.calls++
    const isAll = scope.window.from === '-' && scope.window.to === '+'
    const isCommitted = compareIds(cursor, walk.last) >= 0
    const isStill = behind === 0 && cursor === walk.last
    const { rows, fits } = walk.stored
    if (isAll && isStill && rows === length && fits) {
      report.wholeCalls++
      report.wholeEntries += length
      return undefined
    }
    if (!this.onlyCommitted || isCommitted) return walk
    report.leftCalls++
    report.leftEntries += cursor === '0-0' ? length : (behind ?? 0)
    return cursor === '0-0' ? undefined : { ...walk, last: cursor }
  }
}

/** @returns the files of an archive: itself, or those in the folder, by name. @throws OperatorError when there are none */
export async function archiveFiles(path: string): Promise<{ path: string; bytes: number }[]> {
  try {
    const isFolder = (await stat(path)).isDirectory()
    const names = isFolder
      ? (await readdir(path)).filter((name) => /^[^.].*\.ndjson(\.gz|\.zst)?$/.test(name)).sort()
      : []
    const paths = isFolder ? names.map((name) => join(path, name)) : [path]
    if (paths.length === 0) throw new Error('no *.ndjson, *.ndjson.gz or *.ndjson.zst is there')
    return await Promise.all(paths.map(async (file) => ({ path: file, bytes: (await stat(file)).size })))
  } catch (error) {
    throw new OperatorError(`--from-archive ${path}: ${reasonOf(error as Error)}`, { cause: error })
  }
}

/** Pages whose calls are looked up together. */
const PAGES_TOGETHER = 100
const ENTRIES_TOGETHER = 5000

/** The call whose pages come just now. */
interface Going {
  callSid: string
  /** It has come to its end. */
  ended: boolean
  after: string
  stored: StoredCall
}

export class Archives implements Source {
  /** @param tell called with how many bytes have been read of all files */
  constructor(
    private readonly files: { path: string; bytes: number }[],
    private readonly partitions: Partitions,
    private readonly scope: Scope,
    private readonly lookUp: LookUp,
    private readonly report: ReplayReport,
    private readonly tell: (bytes: number) => void,
  ) {}

  async *pieces(): AsyncGenerator<Piece> {
    let before = 0
    for (const { path, bytes } of this.files) {
      let [pages, entries]: [ArchivePage[], number] = [[], 0]
      let going: Going | undefined
      const give = async () => {
        const given = await this.piecesOf(pages, going)
        going = given.going
        ;[pages, entries] = [[], 0]
        return given.pieces
      }
      let failure: unknown
      try {
        for await (const page of readArchive(path, (read) => this.tell(before + read))) {
          const before = pages.at(-1) ?? going
          const isItsEnd = page.ended && before?.callSid === page.callSid && !before.ended
          if (!this.isMeant(page) && !isItsEnd) continue
          pages.push(page)
          entries += page.entries.length
          if (pages.length >= PAGES_TOGETHER || entries >= ENTRIES_TOGETHER) yield* await give()
        }
      } catch (error) {
        failure = error // what could be read is stored
      }
      if (pages.length > 0) yield* await give()
      if (failure) throw failure
      before += bytes
    }
  }

  /** Leaves only the entries that are meant. @returns false when there are none */
  private isMeant(page: ArchivePage): boolean {
    const { callSid, window } = this.scope
    if (callSid !== undefined && page.callSid !== callSid) return false
    const { from, to } = window
    page.entries = page.entries.filter(
      ({ id }) => (from === '-' || compareIds(id, from) >= 0) && (to === '+' || compareIds(id, to) <= 0),
    )
    return page.entries.length > 0
  }

  /** @param going the call whose first pages were given before */
  private async piecesOf(pages: ArchivePage[], going: Going | undefined) {
    const isNew = (page: ArchivePage, i: number) => {
      const before = i === 0 ? going : pages[i - 1]
      return page.callSid !== before?.callSid || before.ended // the same call once more: it was archived twice
    }
    const begun = pages.filter(isNew)
    const places = begun.map(({ callSid, entries }) => ({
      callSid,
      partition: this.partitions.of(callSid),
      first: entries[0]!.id,
      last: entries.at(-1)!.id,
    }))
    const stored = await this.lookUp(places)
    const pieces: Piece[] = []
    let now = going
    let [nth, isWhole] = [0, false]
    for (const [i, page] of pages.entries()) {
      if (isNew(page, i)) {
        now = { callSid: page.callSid, ended: false, after: '0-0', stored: stored[nth++]! }
        this.report.calls++
        isWhole = this.isWhole(page, now.stored)
      }
      if (isWhole) continue
      const entries = page.entries.map(({ id, fields }): Entry => [id, fields.map(String)])
      const { callSid, after, stored: its } = now!
      const place = { callSid, partition: this.partitions.of(callSid) }
      pieces.push({
        ...place,
        entries,
        first: entries[0]?.[0] ?? after,
        after,
        isLast: page.ended,
        stored: its,
        bytes: bytesOf(page),
      })
      now = { ...now!, after: entries.at(-1)?.[0] ?? after }
    }
    return { pieces, going: now && { ...now, ended: pages.at(-1)!.ended } }
  }

  /** Of calls that are no longer than a page, without a window. */
  private isWhole({ ended, entries }: ArchivePage, { rows, fits }: StoredCall): boolean {
    const { from, to } = this.scope.window
    const isWhole = ended && from === '-' && to === '+' && fits && rows === entries.length
    if (!isWhole) return false
    this.report.wholeCalls++
    this.report.wholeEntries += entries.length
    return true
  }
}

function bytesOf({ entries }: ArchivePage): Map<string, RawField[]> | undefined {
  const odd = entries.filter(({ fields }) => fields.some((field) => typeof field !== 'string'))
  return odd.length > 0 ? new Map(odd.map(({ id, fields }) => [id, fields])) : undefined
}
