/**
 * Where the processes of an ingest keep their spools. One alone uses SPOOL_DIR itself; of several, each has a folder in it by its
 * place, `process-0`, `process-1`, …, so that whoever is started for one that died finds what it left.
 *
 * With another number of processes than before, some of these are nobody's any more. They are not forgotten: the processes that
 * there are divide them, and move the segments into their own spools before these are opened.
 */
import { readdir, rename } from 'node:fs/promises'
import { basename, join, resolve } from 'node:path'
import { OperatorError } from '../shared/config.js'
import { syncDirectory } from '../shared/sync-directory.js'
import { SpoolOwner } from './spool-owner.js'
import { createDirectory, listSegments } from './spool-segment.js'

const OF_PROCESS = /^process-(\d{1,4})$/

/** A process' place among those of its ingest. */
export interface Place {
  /** From 0. */
  index: number
  size: number
}

const ownSpool = (root: string, { index, size }: Place) => (size === 1 ? root : join(root, `process-${index}`))

/** All folders that are, or were, a process' spool; none when there is no SPOOL_DIR yet. @throws the file system's errors */
export async function spoolsIn(root: string): Promise<string[]> {
  const found = await readdir(root, { withFileTypes: true }).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return undefined
    throw error
  })
  if (!found) return []
  const places = found.filter((entry) => entry.isDirectory() && OF_PROCESS.test(entry.name))
  return [root, ...places.map(({ name }) => join(root, name)).sort()]
}

/**
 * Moves into this process' spool what is in those that are nobody's any more and fall to it.
 *
 * A former owner may still be there, by mistake. It is told as by any other that takes its spool over (spool-owner.ts): what
 * it writes after the claim is not acked, what it wrote before is in the files that are moved. To be killed in between is no
 * harm, either: each file is in one spool or in the other.
 *
 * @param root SPOOL_DIR
 * @returns the spool's directory, and how many segments were moved
 * @throws OperatorError when it cannot be used
 */
export async function takeOverSpools(root: string, place: Place): Promise<{ directory: string; moved: number }> {
  const directory = ownSpool(resolve(root), place)
  const inUse = Array.from({ length: place.size }, (_, index) => ownSpool(resolve(root), { index, size: place.size }))
  let moved = 0
  try {
    for (const left of await spoolsIn(resolve(root))) {
      const number = Number(OF_PROCESS.exec(basename(left))?.[1] ?? 0)
      if (inUse.includes(left) || number % place.size !== place.index) continue
      if ((await listSegments(left)).length > 0) moved += await moveSegments(left, directory)
    }
  } catch (error) {
    throw new OperatorError(`SPOOL_DIR: ${root} cannot be used: ${(error as Error).message}`, { cause: error })
  }
  return { directory, moved }
}

async function moveSegments(from: string, to: string): Promise<number> {
  await createDirectory(to)
  const owner = await SpoolOwner.claim(from)
  const segments = await listSegments(from) // only what is read behind the claim is complete
  // Their names are their writers' own: none can be in the way of another.
  for (const { path } of segments) await rename(path, join(to, basename(path)))
  await syncDirectory(to)
  await syncDirectory(from)
  await owner.leave()
  return segments.length
}
