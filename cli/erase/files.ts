/** Files without the lines of some calls: written anew beside the old one, then renamed into its place. */
import { randomBytes } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { type FileHandle, open, readdir, rename, rm, stat } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { syncDirectory } from '../../shared/sync-directory.js'

/** How many of what were found, by call. */
export type Counts = Map<string, number>

export function count(counts: Counts, callSid: string, n = 1): void {
  counts.set(callSid, (counts.get(callSid) ?? 0) + n)
}

const LINE_FEED = 10

/** A file's lines, each with its line feed; the last one may have none. @throws the file system's errors */
export async function* readLines(path: string, from = 0): AsyncGenerator<Buffer> {
  let parts: Buffer[] = []
  for await (const chunk of createReadStream(path, { start: from }) as AsyncIterable<Buffer>) {
    let start = 0
    for (let end = chunk.indexOf(LINE_FEED); end >= 0; end = chunk.indexOf(LINE_FEED, start)) {
      parts.push(chunk.subarray(start, end + 1))
      yield Buffer.concat(parts)
      parts = []
      start = end + 1
    }
    if (start < chunk.length) parts.push(chunk.subarray(start))
  }
  if (parts.length > 0) yield Buffer.concat(parts)
}

/** Beside `path`, hidden, with the same ending. (A sink takes it for an archive that its writer did not finish, and removes it.) */
export const draftOf = (path: string) =>
  join(dirname(path), `.calltape-erase-${randomBytes(4).toString('hex')}-${basename(path)}`)

/** Of a process that was killed: what it was to replace is there still. */
const DRAFT = /^\.calltape-erase-/
const DEAD_AFTER_MS = 60_000

export async function removeDeadDrafts(directory: string): Promise<void> {
  for (const name of await readdir(directory)) {
    const path = join(directory, name)
    const isDead = DRAFT.test(name) && Date.now() - (await stat(path)).mtimeMs > DEAD_AFTER_MS
    if (isDead) await rm(path, { force: true })
  }
}

/** Puts what was written beside a file into its place; an empty one takes the old one away. */
export async function putInPlace(draft: string, path: string, isEmpty: boolean): Promise<void> {
  if (isEmpty) {
    await rm(path, { force: true })
    await rm(draft, { force: true })
  } else {
    await rename(draft, path)
  }
  await syncDirectory(dirname(path))
}

/**
 * Writes a file anew.
 *
 * @param rewrite what a line becomes: itself, others, or nothing
 * @throws the file system's errors; then it is as it was
 */
export async function rewriteLines(path: string, mode: number, rewrite: (line: Buffer) => Buffer): Promise<void> {
  const draft = draftOf(path)
  const old = await open(path, 'r')
  const file = await open(draft, 'wx', mode)
  try {
    let [read, written] = [0, 0]
    const copy = async () => {
      for await (const line of readLines(path, read)) {
        read += line.length
        const kept = rewrite(line)
        written += kept.length
        if (kept.length > 0) await file.appendFile(kept)
      }
    }
    await copy()
    await file.datasync()
    await putInPlace(draft, path, written === 0)
    await appendTail(old, read, path, mode, rewrite)
  } catch (error) {
    await rm(draft, { force: true })
    throw error
  } finally {
    await file.close()
    await old.close()
  }
}

/** What somebody who had the old file open has appended to it meanwhile. */
async function appendTail(
  old: FileHandle,
  read: number,
  path: string,
  mode: number,
  rewrite: (line: Buffer) => Buffer,
): Promise<void> {
  const { size } = await old.stat()
  if (size <= read) return
  const tail = Buffer.alloc(size - read)
  await old.read(tail, 0, tail.length, read)
  const file = await open(path, 'a', mode)
  try {
    await file.appendFile(rewrite(tail))
    await file.datasync()
  } finally {
    await file.close()
  }
}
