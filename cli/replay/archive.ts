/** `replay --archive`: the streams into a file, which has its name only once it is whole. */
import { access, rename, rm, stat } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { OperatorError } from '../../shared/config.js'
import { type Partitions, streamKey } from '../../shared/keys.js'
import type { RedisClient } from '../../shared/redis.js'
import { syncDirectory } from '../../shared/sync-directory.js'
import { type ArchivedEntry, ArchiveWriter } from '../../sink/archive.js'
import type { Entry } from '../../sink/decode.js'
import { readPage, type Stretch, startWalk, type Walk } from '../streams.js'
import type { ReplayReport } from './report.js'
import { placesOf, type Scope } from './source.js'

interface Archiving {
  redis: RedisClient
  partitions: Partitions
  scope: Scope
  report: ReplayReport
  /** Before so many entries are written. */
  pace: { before(entries: number): Promise<void> }
  signal: AbortSignal
}

/**
 * All entries up to each stream's end as it is when its turn comes.
 *
 * @returns the file's bytes; undefined when it was stopped: then there is no file
 * @throws OperatorError when there is such a file already, or it cannot be written; Redis' errors
 */
export async function archiveStreams(path: string, archiving: Archiving): Promise<number | undefined> {
  await access(path).then(
    () => {
      throw new OperatorError(`--archive ${path}: there is such a file already`)
    },
    () => undefined,
  )
  const unfinished = join(dirname(path), `.unfinished-${basename(path)}`)
  await rm(unfinished, { force: true })
  const writer = await ArchiveWriter.open(unfinished)
  let isWhole = false
  try {
    isWhole = await writeStreams(writer, archiving)
  } finally {
    await writer.close()
    if (!isWhole) await rm(unfinished, { force: true })
  }
  if (!isWhole) return undefined
  await rename(unfinished, path)
  await syncDirectory(dirname(path))
  return (await stat(path)).size
}

/** @returns false when it was stopped */
async function writeStreams(writer: ArchiveWriter, archiving: Archiving): Promise<boolean> {
  const { redis, partitions, scope, report, pace, signal } = archiving
  for await (const places of placesOf(redis, partitions, scope)) {
    const started = await Promise.all(places.map((place) => startWalk(redis, place, scope.window)))
    const queue = started.filter((walk) => walk !== undefined)
    while (queue.length > 0) {
      for (let stretch of await readPage(redis, queue)) {
        if (signal.aborted) return false
        let entries = 0
        for (;;) {
          await pace.before(stretch.entries.length)
          await writer.write(stretch.walk.callSid, await archived(redis, stretch))
          entries += stretch.entries.length
          report.entries += stretch.entries.length
          if (stretch.isLast) break
          stretch = (await readPage(redis, [stretch.walk]))[0]!
        }
        if (entries === 0) continue
        if ((await redis.exists(streamKey(stretch.walk))) === 0) report.goneCalls.add(stretch.walk.callSid)
        await writer.endCall(stretch.walk.callSid, entries)
        report.calls++
      }
    }
  }
  return true
}

/** What is not UTF-8 was read as U+FFFD: such entries are read once more, as bytes. */
function archived(redis: RedisClient, { walk, entries }: Stretch<Walk>): Promise<ArchivedEntry[]> {
  const key = streamKey(walk)
  return Promise.all(
    entries.map(async ([id, fields]: Entry): Promise<ArchivedEntry> => {
      if (!fields.some((field) => field.includes('\uFFFD'))) return { id, fields }
      const [entry] = await redis.xrangeBuffer(key, id, id)
      return { id, fields: entry?.[1] ?? fields }
    }),
  )
}
