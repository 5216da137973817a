/** The streams, for commands that read all of them (verify, replay): which there are, how far they go, and their entries, a page at a time. */
import { compareIds } from '../shared/entry-ids.js'
import { type CallPlace, GROUP, parseStreamKey, STREAM_PATTERN, sessionKey, streamKey } from '../shared/keys.js'
import { everyMasterOf, type RedisClient } from '../shared/redis.js'
import type { Entry } from '../sink/decode.js'

/** Entries that are looked at together, and about how many bytes they may have. */
const PAGE_ENTRIES = 1000
const PAGE_BYTES = 2 * 1024 * 1024
/** How many keys SCAN looks at in one go. */
const SCAN_COUNT = 1000
/** What an entry is taken to have where the session does not say. */
const UNKNOWN_BYTES = 1024

/** Bounds of entry ids, as XRANGE takes them: inclusive. */
export interface Window {
  from: string
  to: string
}

/** How far one call has been looked through. */
export interface Walk extends CallPlace {
  /** Where XRANGE goes on. */
  next: string
  /** The first entry that is in the stream. */
  first: string
  /** The last entry that is looked at: what comes later was not there when the stream was first looked at. */
  last: string
  /** About how many entries are left. */
  left: number
  bytesAnEntry: number
}

/** A walk, and the next of its entries. */
export interface Stretch<W extends Walk> {
  walk: W
  entries: Entry[]
  /** No entries follow that are to be looked at. */
  isLast: boolean
}

/** All calls' streams, in pages. SCAN may give a key more than once; here each comes once, which takes a set of all names. */
export async function* scanStreams(client: RedisClient, pageSize: number): AsyncGenerator<CallPlace[]> {
  const seen = new Set<string>()
  let page: CallPlace[] = []
  for (const node of everyMasterOf(client)) {
    let cursor = '0'
    do {
      const [next, keys] = await node.scan(cursor, 'MATCH', STREAM_PATTERN, 'COUNT', SCAN_COUNT, 'TYPE', 'stream')
      cursor = next
      for (const key of keys) {
        const name = parseStreamKey(key)
        if (!name || seen.has(key)) continue
        seen.add(key)
        page.push(name)
        if (page.length < pageSize) continue
        yield page
        page = []
      }
    } while (cursor !== '0')
  }
  if (page.length > 0) yield page
}

/** @returns nothing of the window to look at: undefined */
export async function startWalk(client: RedisClient, name: CallPlace, window: Window): Promise<Walk | undefined> {
  const info = await streamInfo(client, name)
  if (!info || info.length === 0) return undefined
  // The session may be gone, or be somebody else's key; it only tells how much to read at once.
  const said = await client.hget(sessionKey(name), 'bytes').catch(() => null)
  const bytesAnEntry = said === null ? UNKNOWN_BYTES : Math.ceil(Number(said) / info.length)
  const last = window.to === '+' || compareIds(info.last, window.to) < 0 ? info.last : window.to
  return { ...name, next: window.from, first: info.first ?? info.last, last, left: info.length, bytesAnEntry }
}

interface StreamInfo {
  length: number
  /** The last entry that was ever added. */
  last: string
  /** The first entry that is there; undefined when there is none. */
  first: string | undefined
  /** Every entry that was ever added is still there. */
  isWhole: boolean
}

/** @returns undefined when there is no such stream */
export async function streamInfo(client: RedisClient, name: CallPlace): Promise<StreamInfo | undefined> {
  try {
    const info = named((await client.xinfo('STREAM', streamKey(name))) as unknown[])
    const first = info['first-entry'] as Entry | null
    return {
      length: Number(info.length),
      last: String(info['last-generated-id']),
      first: first?.[0],
      isWhole: info['entries-added'] === info.length,
    }
  } catch (error) {
    if (/no such key|^WRONGTYPE/.test((error as Error).message)) return undefined
    throw error
  }
}

/** The last entry that is committed, as the sinks' group has it; 0-0 when there is no such group. */
export async function readCursor(client: RedisClient, name: CallPlace): Promise<string> {
  return (await readProgress(client, name)).cursor
}

/** @returns also how many entries are behind the cursor; undefined where Redis does not know */
export async function readProgress(
  client: RedisClient,
  name: CallPlace,
): Promise<{ cursor: string; behind: number | undefined }> {
  const groups = await client.xinfo('GROUPS', streamKey(name)).catch((error: Error) => {
    if (/no such key/.test(error.message)) return []
    throw error
  })
  for (const group of (groups as unknown[][]).map(named)) {
    if (group.name !== GROUP) continue
    const behind = group.lag === null ? undefined : Number(group.lag)
    return { cursor: String(group['last-delivered-id']), behind }
  }
  return { cursor: '0-0', behind: undefined }
}

/** Takes as many walks from the front of `walks` as make up a page (one at least), and reads their next entries. */
export async function readPage<W extends Walk>(client: RedisClient, walks: W[]): Promise<Stretch<W>[]> {
  const page: { walk: W; count: number }[] = []
  let [entriesLeft, bytesLeft] = [PAGE_ENTRIES, PAGE_BYTES]
  for (const walk of walks) {
    const most = Math.min(PAGE_ENTRIES, Math.max(1, Math.floor(PAGE_BYTES / Math.max(1, walk.bytesAnEntry))))
    const count = Math.max(1, Math.min(walk.left, most))
    if (page.length > 0 && (count > entriesLeft || count * walk.bytesAnEntry > bytesLeft)) break
    entriesLeft -= count
    bytesLeft -= count * walk.bytesAnEntry
    page.push({ walk, count })
  }
  walks.splice(0, page.length)
  return Promise.all(
    page.map(async ({ walk, count }) => {
      const entries = await client.xrange(streamKey(walk), walk.next, walk.last, 'COUNT', count)
      const last = entries.at(-1)?.[0]
      walk.left = Math.max(1, walk.left - entries.length)
      if (last !== undefined) walk.next = `(${last}`
      return { walk, entries, isLast: entries.length < count || last === walk.last }
    }),
  )
}

/** @returns which of the entries are there; undefined for each that is not */
export function readEntriesById(client: RedisClient, name: CallPlace, ids: string[]): Promise<(Entry | undefined)[]> {
  return Promise.all(ids.map(async (id) => (await client.xrange(streamKey(name), id, id))[0]))
}

function named(flat: unknown[]): Record<string, unknown> {
  return Object.fromEntries(flat.flatMap((name, i) => (i % 2 === 0 ? [[String(name), flat[i + 1]]] : [])))
}
