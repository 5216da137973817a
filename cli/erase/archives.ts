/**
 * A call's entries in archives. One that holds the call is written anew without it; one that holds nothing else goes.
 *
 * Finished archives are nobody's any more. One that a sink is writing just now is hidden until it is whole, which takes seconds: it is
 * waited for. What is still hidden then has lost its writer, or loses it now: what is in such a file is in Redis still.
 */
import { readdir, rm, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { OperatorError } from '../../shared/config.js'
import { reasonOf } from '../../shared/log.js'
import { ArchiveWriter, readArchive } from '../../sink/archive.js'
import { type Counts, count, draftOf, putInPlace, removeDeadDrafts } from './files.js'

const ARCHIVE = /\.ndjson(?:\.gz|\.zst)?$/
const POLL_MS = 200

export interface InArchives {
  counts: Counts
  /** Could not be read to their end: what is behind that may be of the calls. */
  unreadable: { path: string; reason: string }[]
}

/**
 * The archives that are meant: files, and those in folders. (ARCHIVE_DIR need not be there yet.)
 *
 * @throws OperatorError for one that was named and is not there
 */
export async function listArchives(given: string[], archiveDir: string | undefined): Promise<string[]> {
  const paths: string[] = []
  for (const path of [...given, ...(archiveDir === undefined ? [] : [archiveDir])]) {
    const found = await stat(path).catch((error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT' && path === archiveDir) return undefined
      throw new OperatorError(`--archive: ${path} cannot be read: ${reasonOf(error)}`, { cause: error })
    })
    if (found?.isDirectory()) paths.push(...(await archivesIn(path)).filter((file) => !isHidden(file)))
    else if (found) paths.push(path)
  }
  return [...new Set(paths)]
}

const archivesIn = async (directory: string) =>
  (await readdir(directory)).filter((name) => ARCHIVE.test(name)).map((name) => join(directory, name))
const isHidden = (path: string) => /\/\.[^/]*$/.test(`/${path}`)

export async function lookInArchives(paths: string[], callSids: ReadonlySet<string>): Promise<InArchives> {
  const found: InArchives = { counts: new Map(), unreadable: [] }
  for (const path of paths) {
    try {
      for await (const { callSid, entries } of readArchive(path)) {
        if (callSids.has(callSid)) count(found.counts, callSid, entries.length)
      }
    } catch (error) {
      if (!(error instanceof OperatorError)) throw error
      found.unreadable.push({ path, reason: error.message })
    }
  }
  return found
}

/**
 * Writes the archives that hold the calls anew. One that cannot be read to its end stays as it is.
 *
 * @returns how many entries were removed
 * @throws OperatorError when one cannot be written; then it is as it was
 */
export async function eraseInArchives(paths: string[], callSids: ReadonlySet<string>): Promise<Counts> {
  const removed: Counts = new Map()
  for (const path of paths) {
    const { counts, unreadable } = await lookInArchives([path], callSids)
    if (counts.size === 0 || unreadable.length > 0) continue
    await rewriteWithout(path, callSids)
    for (const [callSid, n] of counts) count(removed, callSid, n)
  }
  return removed
}

async function rewriteWithout(path: string, callSids: ReadonlySet<string>): Promise<void> {
  const draft = draftOf(path)
  const writer = await ArchiveWriter.open(draft)
  let calls = 0
  try {
    const entriesOf: Counts = new Map()
    for await (const { callSid, entries, ended } of readArchive(path)) {
      if (callSids.has(callSid)) continue
      await writer.write(callSid, entries)
      count(entriesOf, callSid, entries.length)
      if (!ended) continue
      calls++
      await writer.endCall(callSid, entriesOf.get(callSid)!)
      entriesOf.delete(callSid)
    }
  } catch (error) {
    await writer.close().catch(() => undefined) // why it came to nothing is known already
    await rm(draft, { force: true })
    throw error
  }
  await writer.close()
  await putInPlace(draft, path, calls === 0)
}

/**
 * Those that are being written have their names, or are removed.
 *
 * @param deadline epoch ms
 */
export async function finishArchives(archiveDir: string | undefined, deadline: number): Promise<void> {
  if (archiveDir === undefined) return
  const hidden = async () => (await archivesIn(archiveDir).catch(() => [])).filter(isHidden)
  const begun = await hidden()
  if (begun.length === 0) return
  await removeDeadDrafts(archiveDir)
  for (;;) {
    const there = await hidden()
    const left = begun.filter((path) => there.includes(path))
    if (left.length === 0) return
    if (Date.now() > deadline) {
      for (const path of left) await rm(path, { force: true })
      return
    }
    await sleep(POLL_MS)
  }
}
