/**
 * A call's events in the spool (ingest/spool.ts): segments that wait for Redis, records that were damaged, events that can never be
 * stored.
 *
 * Whose files they are decides what may be done. An ingest that runs empties its spool by itself as long as Redis takes what is in it:
 * so it is waited for, and what it brings is erased in Redis; one that cannot empty it keeps it all the same. What nobody uses any more
 * is taken over as a new ingest would do it (spool-owner.ts), and nothing that an old owner acks from then on is in the files that are
 * read: rewriting them loses nothing, even if there should be one that merely hung.
 */
import { existsSync } from 'node:fs'
import { readdir, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { isSpoolUsed, SpoolOwner } from '../../ingest/spool-owner.js'
import { decodeRecord, encodeRecords, FILE_MODE, segmentPlace } from '../../ingest/spool-segment.js'
import { isObject } from '../../shared/json.js'
import { type Counts, count, readLines, removeDeadDrafts, rewriteLines } from './files.js'

/** An ingest that empties its spool makes a difference in less time. */
const QUIET_MS = 3000
const POLL_MS = 100
const REFUSED_FILE = 'refused.ndjson'
const NOTHING = Buffer.alloc(0)
const LINE_FEED = 10

type Kind = 'pending' | 'damaged' | 'refused'

function kindOf(name: string): Kind | undefined {
  if (segmentPlace(name) !== undefined) return 'pending'
  if (name === REFUSED_FILE) return 'refused'
  return name.endsWith('.segment.damaged') ? 'damaged' : undefined
}

/** Of each kind how many events, and in which files. */
export interface InSpool {
  counts: Record<Kind, Counts>
  files: { path: string; kind: Kind }[]
}

/** @param directory of one process, below SPOOL_DIR or SPOOL_DIR itself; one that is not there has nothing */
export async function lookInSpool(directory: string, callSids: ReadonlySet<string>): Promise<InSpool> {
  const found: InSpool = { counts: { pending: new Map(), damaged: new Map(), refused: new Map() }, files: [] }
  for (const name of await namesIn(directory)) {
    const kind = kindOf(name)
    if (!kind) continue
    const path = join(directory, name)
    const here: Counts = new Map()
    try {
      for await (const line of readLines(path)) without(line, kind, callSids, here)
    } catch (error) {
      if (!isGone(error)) throw error
      continue // an ingest has just brought it to Redis
    }
    if (here.size > 0) found.files.push({ path, kind })
    for (const [callSid, n] of here) count(found.counts[kind], callSid, n)
  }
  return found
}

/**
 * Waits as long as somebody empties the spool, until nothing of the calls is pending.
 *
 * @param deadline epoch ms
 * @returns whether what is pending may be taken over: false while somebody is at it
 */
export async function awaitEmptying(
  directory: string,
  callSids: ReadonlySet<string>,
  deadline: number,
): Promise<boolean> {
  const pendingFiles = async () =>
    (await lookInSpool(directory, callSids)).files.filter(({ kind }) => kind === 'pending').map(({ path }) => path)
  // Without one nobody has ever opened it as a spool.
  const hasOwner = existsSync(join(directory, 'owner'))
  for (let files = await pendingFiles(); files.length > 0; files = await pendingFiles()) {
    // Only their names are looked at: a spool may be large.
    for (let [seen, since] = ['', Date.now()]; files.some((path) => existsSync(path)); await sleep(POLL_MS)) {
      const now = await stateOf(directory)
      if (now !== seen) [seen, since] = [now, Date.now()]
      const isQuiet = Date.now() - since > QUIET_MS
      if (!hasOwner || (isQuiet && !(await isSpoolUsed(directory)))) return true
      if (Date.now() > deadline) return false
    }
  }
  return true
}

/**
 * @param mayTakeOver else what is pending stays
 * @returns what was removed, and whether the spool was taken over for it
 * @throws the file system's errors; then run again it finishes
 */
export async function eraseInSpool(
  directory: string,
  callSids: ReadonlySet<string>,
  mayTakeOver: boolean,
): Promise<{ counts: InSpool['counts']; isTakenOver: boolean }> {
  let { files } = await lookInSpool(directory, callSids)
  const isTakenOver = mayTakeOver && files.some(({ kind }) => kind === 'pending')
  if (isTakenOver) {
    await (await SpoolOwner.claim(directory)).leave()
    files = (await lookInSpool(directory, callSids)).files // only what is read behind the claim is complete
  } else {
    files = files.filter(({ kind }) => kind !== 'pending')
  }
  const counts: InSpool['counts'] = { pending: new Map(), damaged: new Map(), refused: new Map() }
  if ((await namesIn(directory)).length > 0) await removeDeadDrafts(directory)
  for (const { path, kind } of files) {
    await rewriteLines(path, FILE_MODE, (line) => without(line, kind, callSids, counts[kind])).catch(
      (error: unknown) => {
        if (!isGone(error)) throw error
      },
    )
  }
  return { counts, isTakenOver }
}

/** What is left of a line; of one that cannot be read nothing, if it is of one of the calls. @param found is added to */
function without(line: Buffer, kind: Kind, callSids: ReadonlySet<string>, found: Counts): Buffer {
  const mentioned = [...callSids].filter((callSid) => line.includes(JSON.stringify(callSid)))
  if (mentioned.length === 0) return line
  if (kind === 'refused') return withoutRefused(line, mentioned, found)
  const isWhole = line.at(-1) === LINE_FEED
  const events = decodeRecord(isWhole ? line.subarray(0, -1) : line)
  if (!events) return withoutUnreadable(line, mentioned, found)
  const kept = events.filter((event) => {
    const callSid = callSidOf(event)
    if (callSid === undefined || !callSids.has(callSid)) return true
    count(found, callSid)
    return false
  })
  if (kept.length === events.length) return line
  return kept.length === 0 ? NOTHING : Buffer.concat([...encodeRecords(kept.map((event) => JSON.stringify(event)))])
}

function withoutRefused(line: Buffer, mentioned: string[], found: Counts): Buffer {
  let given: unknown
  try {
    given = JSON.parse(line.toString())
  } catch {
    return withoutUnreadable(line, mentioned, found)
  }
  const callSid = isObject(given) ? callSidOf(given.event) : undefined
  if (callSid === undefined || !mentioned.includes(callSid)) return line
  count(found, callSid)
  return NOTHING
}

function withoutUnreadable(line: Buffer, mentioned: string[], found: Counts): Buffer {
  const callSid = mentioned.find((each) => line.includes(`"call_sid":${JSON.stringify(each)}`))
  if (callSid === undefined) return line
  count(found, callSid)
  return NOTHING
}

const callSidOf = (event: unknown) =>
  isObject(event) && typeof event.call_sid === 'string' ? event.call_sid : undefined

const isGone = (error: unknown) => (error as NodeJS.ErrnoException).code === 'ENOENT'

async function namesIn(directory: string): Promise<string[]> {
  try {
    return (await readdir(directory)).sort()
  } catch (error) {
    if (isGone(error)) return []
    throw error
  }
}

/** Changes with each file that comes, grows or goes. */
async function stateOf(directory: string): Promise<string> {
  const names = (await namesIn(directory)).filter((name) => kindOf(name) === 'pending')
  const sizes = await Promise.all(
    names.map((name) =>
      stat(join(directory, name)).then(
        (s) => s.size,
        () => 0,
      ),
    ),
  )
  return JSON.stringify([names, sizes])
}
