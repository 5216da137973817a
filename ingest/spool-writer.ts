/** Writes records into segments and makes them durable. One write at a time: the caller sees to that. */
import { type FileHandle, open, stat, unlink } from 'node:fs/promises'
import { join } from 'node:path'
import { syncDirectory } from '../shared/sync-directory.js'
import { FILE_MODE, type Segment, segmentName } from './spool-segment.js'

/** Small records go to the system together. */
const CHUNK_BYTES = 1024 * 1024

interface Active {
  segment: Segment
  file: FileHandle
}

export class SpoolWriter {
  private active: Active | undefined

  /**
   * @param writer see `segmentName`
   * @param place of its first segment
   * @param segmentBytes a segment that has as many gets no more
   */
  constructor(
    private readonly directory: string,
    private readonly writer: string,
    private place: number,
    private readonly segmentBytes: number,
  ) {}

  isWriting(segment: Segment): boolean {
    return this.active?.segment === segment
  }

  /**
   * @param records as of `encodeRecords`
   * @param events how many are in them
   * @returns the segment that has them, on the disk
   * @throws the file system's errors; that segment gets no more then
   */
  async write(records: Iterable<Buffer>, events: number): Promise<Segment> {
    if (this.active && this.active.segment.bytes >= this.segmentBytes) await this.seal()
    this.active ??= await this.create()
    const { segment, file } = this.active
    try {
      const bytes = await writeAll(file, records)
      await file.datasync()
      segment.bytes += bytes
      segment.events += events
      return segment
    } catch (error) {
      // Also after a failed fdatasync: the system may have dropped the pages, and the next one would succeed without them.
      await this.giveUp()
      throw error
    }
  }

  /** What comes next goes into a new segment. */
  async seal(): Promise<void> {
    const active = this.active
    this.active = undefined
    await active?.file.close()
  }

  private async create(): Promise<Active> {
    const path = join(this.directory, segmentName(this.place++, this.writer))
    const file = await open(path, 'wx', FILE_MODE)
    try {
      await syncDirectory(this.directory)
    } catch (error) {
      await file.close()
      await unlink(path)
      throw error
    }
    return { segment: { path, bytes: 0, events: 0 }, file }
  }

  /** Leaves the segment as it is; or removes it, if nothing in it was ever acked: a full disk would fill with empty files. */
  private async giveUp(): Promise<void> {
    const segment = this.active?.segment
    await this.seal()
    if (segment?.events === 0) await unlink(segment.path)
    else if (segment) segment.bytes = (await stat(segment.path)).size
  }
}

/** @returns how many bytes they were */
async function writeAll(file: FileHandle, records: Iterable<Buffer>): Promise<number> {
  let total = 0
  let chunk: Buffer[] = []
  let bytes = 0
  const flush = async () => {
    await file.writeFile(Buffer.concat(chunk)) // at the file's position; other than write(), it goes on after a short write
    total += bytes
    chunk = []
    bytes = 0
  }
  for (const record of records) {
    chunk.push(record)
    bytes += record.length
    if (bytes >= CHUNK_BYTES) await flush()
  }
  if (bytes > 0) await flush()
  return total
}
