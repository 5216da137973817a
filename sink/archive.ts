/**
 * Archives: streams in a file, so that a replay outlives Redis. NDJSON, a line an entry, and one behind a call's last entry:
 *
 *     {"call_sid":"…","id":"1700000000000-0","fields":["e","{…}"]}
 *     {"call_sid":"…","end":true,"entries":12}
 *
 * A field that is not UTF-8 is {"base64":"…"}. Compressed with gzip when the file's name ends in .gz, with zstd when it ends
 * in .zst (where Node has it: from 22.15 on).
 */
import { createReadStream } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { dirname } from 'node:path'
import { PassThrough, type Transform } from 'node:stream'
import * as zlib from 'node:zlib'
import { isBug, OperatorError } from '../shared/config.js'
import { isEntryId } from '../shared/entry-ids.js'
import { reasonOf } from '../shared/log.js'
import { syncDirectory } from '../shared/sync-directory.js'
import { fieldsFromJson, fieldToJson, type RawField } from './raw-fields.js'

export interface ArchivedEntry {
  id: string
  /** Field, value, field, value … */
  fields: RawField[]
}

/** Some entries of one call, in their order. */
export interface ArchivePage {
  callSid: string
  entries: ArchivedEntry[]
  /** It is the call's last page. */
  ended: boolean
}

const PAGE_ENTRIES = 1000
/** About: of the file's lines. */
const PAGE_BYTES = 1024 * 1024
const NEWLINE = 10

/** What the types of Node 20 do not know. */
const { createZstdCompress, createZstdDecompress } = zlib as typeof zlib & {
  createZstdCompress?: () => Transform
  createZstdDecompress?: () => Transform
}

function codec(path: string): { compress(): Transform; decompress(): Transform } {
  if (path.endsWith('.gz')) return { compress: () => zlib.createGzip(), decompress: () => zlib.createGunzip() }
  if (!path.endsWith('.zst')) return { compress: () => new PassThrough(), decompress: () => new PassThrough() }
  if (createZstdCompress && createZstdDecompress) {
    return { compress: createZstdCompress, decompress: createZstdDecompress }
  }
  throw new OperatorError(`${path}: Node ${process.versions.node} has no zstd (22.15 has): use .gz, or a newer Node`)
}

export class ArchiveWriter {
  private readonly written: Promise<void>
  private failure: Error | undefined

  private constructor(
    private readonly path: string,
    private readonly file: FileHandle,
    private readonly head: Transform,
  ) {
    head.on('error', () => undefined) // of whoever writes on when the file has failed, and is told so anyway
    this.written = this.writeOut()
    // Told by the next call; until then nobody may be waiting for it.
    this.written.catch((error: Error) => (this.failure = error))
  }

  /** @throws OperatorError when there is a file of this name already, or it cannot be created */
  static async open(path: string): Promise<ArchiveWriter> {
    const { compress } = codec(path)
    const file = await open(path, 'wx').catch((error: Error) => {
      throw new OperatorError(`the archive ${path} cannot be created: ${reasonOf(error)}`, { cause: error })
    })
    return new ArchiveWriter(path, file, compress())
  }

  /**
   * Entries of a call, in their order, in as many portions as one likes; those of different calls do not mix.
   *
   * @throws OperatorError when the file cannot be written; then it is of no use
   */
  async write(callSid: string, entries: ArchivedEntry[]): Promise<void> {
    const line = ({ id, fields }: ArchivedEntry) =>
      `${JSON.stringify({ call_sid: callSid, id, fields: fields.map(fieldToJson) })}\n`
    for (let from = 0; from < entries.length; from += PAGE_ENTRIES) {
      await this.put(
        entries
          .slice(from, from + PAGE_ENTRIES)
          .map(line)
          .join(''),
      )
    }
  }

  /**
   * Behind a call's last entry. @param entries how many there are of it
   *
   * @throws OperatorError when the file cannot be written; then it is of no use
   */
  async endCall(callSid: string, entries: number): Promise<void> {
    await this.put(`${JSON.stringify({ call_sid: callSid, end: true, entries })}\n`)
  }

  /**
   * Afterwards the file is whole, and on the disk.
   *
   * @throws OperatorError when it is not
   */
  async close(): Promise<void> {
    try {
      this.head.end()
      await this.written
      await this.file.datasync()
      await syncDirectory(dirname(this.path))
    } catch (error) {
      throw this.notWritten(error as Error)
    } finally {
      await this.file.close()
    }
  }

  private async writeOut(): Promise<void> {
    for await (const chunk of this.head as AsyncIterable<Buffer>) await this.file.appendFile(chunk)
  }

  private async put(lines: string): Promise<void> {
    if (this.failure) throw this.notWritten(this.failure)
    if (lines === '' || this.head.write(lines)) return
    const drained = new Promise<void>((resolve) => this.head.once('drain', resolve))
    await Promise.race([drained, this.written]).catch((error: Error) => {
      throw this.notWritten(error)
    })
  }

  private notWritten(error: Error): OperatorError {
    return new OperatorError(`the archive ${this.path} cannot be written: ${reasonOf(error)}`, { cause: error })
  }
}

/**
 * Pages of one call each, in the file's order. A file that is cut off in the middle gives all its whole lines, and then throws.
 *
 * @param tell called now and then with how many bytes of the file have been read
 * @throws OperatorError that names the file, and the line where it is one's fault, for what cannot be read
 */
export async function* readArchive(
  path: string,
  tell: (bytes: number) => void = () => undefined,
): AsyncGenerator<ArchivePage> {
  const pages = new Pages(path)
  let failure: unknown
  try {
    for await (const lines of readLines(path, tell)) for (const line of lines) yield* pages.add(line)
  } catch (error) {
    if (isBug(error)) throw error
    failure = error
  }
  yield* pages.rest()
  if (failure instanceof OperatorError) throw failure
  const reason = failure ? reasonOf(failure as Error) : pages.open && `call ${pages.open} has no end`
  if (reason)
    throw new OperatorError(`${path} is cut off or damaged behind line ${pages.lines}: ${reason}`, { cause: failure })
}

/** Lines into pages. */
class Pages {
  lines = 0
  /** The call whose end is yet to come. */
  open: string | undefined
  private entries: ArchivedEntry[] = []
  private bytes = 0
  /** Entries of the call so far. */
  private total = 0

  constructor(private readonly path: string) {}

  *add(text: string): Generator<ArchivePage> {
    this.lines++
    const line = parseLine(text)
    if (!line) throw new OperatorError(`${this.path}, line ${this.lines}: neither an entry of a call nor a call's end`)
    if (this.open !== line.callSid) {
      yield* this.rest()
      this.open = line.callSid
      this.total = 0
    }
    if ('total' in line) {
      if (line.total !== this.total) throw new OperatorError(this.miscounted(line))
      const { entries } = this
      this.open = undefined
      this.entries = []
      yield { callSid: line.callSid, entries, ended: true }
      return
    }
    this.total++
    this.entries.push(line.entry)
    this.bytes += text.length
    if (this.entries.length >= PAGE_ENTRIES || this.bytes >= PAGE_BYTES) yield* this.rest()
  }

  /** What there is of a page, if there is anything. */
  *rest(): Generator<ArchivePage> {
    const { entries, open } = this
    this.entries = []
    this.bytes = 0
    if (open !== undefined && entries.length > 0) yield { callSid: open, entries, ended: false }
  }

  private miscounted({ callSid, total }: { callSid: string; total: number }): string {
    return `${this.path}, line ${this.lines}: call ${callSid} had ${total} entries, here are ${this.total}`
  }
}

type Line = { callSid: string; entry: ArchivedEntry } | { callSid: string; total: number }

/** @returns undefined when it is none */
function parseLine(text: string): Line | undefined {
  let given: unknown
  try {
    given = JSON.parse(text)
  } catch {
    return undefined
  }
  if (typeof given !== 'object' || given === null) return undefined
  const { call_sid: callSid, end, entries: total, id, fields: raw } = given as Record<string, unknown>
  if (typeof callSid !== 'string' || callSid === '') return undefined
  if (end === true) return typeof total === 'number' ? { callSid, total } : undefined
  const fields = fieldsFromJson(raw)
  return fields && typeof id === 'string' && isEntryId(id) ? { callSid, entry: { id, fields } } : undefined
}

/** The file's whole lines, as many at a time as come together. @throws what the file or its compression says */
async function* readLines(path: string, tell: (bytes: number) => void): AsyncGenerator<string[]> {
  let begun: Buffer[] = [] // of a line that is not whole yet
  for await (const chunk of decompressed(path, tell)) {
    const end = chunk.lastIndexOf(NEWLINE)
    if (end < 0) {
      begun.push(chunk)
      continue
    }
    const whole = Buffer.concat([...begun, chunk.subarray(0, end)])
    begun = [chunk.subarray(end + 1)]
    yield whole.toString().split('\n')
  }
  if (begun.some((part) => part.length > 0)) throw new Error('its last line is not whole')
}

/**
 * Not a pipeline: where a file is cut off, that would destroy the decompressor together with what it has given already.
 *
 * @throws what the file or its compression says, when all that could be read has been given
 */
async function* decompressed(path: string, tell: (bytes: number) => void): AsyncGenerator<Buffer> {
  const transform = codec(path).decompress()
  let out: Buffer[] = []
  transform.on('data', (data: Buffer) => out.push(data))
  let hasEnded = false // zstd says so as soon as its frame has ended, before it is told that no more comes
  transform.on('end', () => (hasEnded = true))
  const failed = new Promise<never>((_, reject) => transform.on('error', reject))
  failed.catch(() => undefined) // told by whoever waits next
  let [bytes, failure]: [number, unknown] = [0, undefined]
  const step = async (work: (done: () => void) => void) => {
    await Promise.race([new Promise<void>(work), failed]).catch((error: unknown) => (failure = error))
    const given = out
    out = []
    return given
  }
  try {
    for await (const chunk of createReadStream(path) as AsyncIterable<Buffer>) {
      yield* await step((done) => transform.write(chunk, () => done()))
      if (failure) throw failure
      bytes += chunk.length
      tell(bytes)
    }
    yield* await step((done) => (hasEnded ? done() : transform.once('end', done).end()))
    if (failure) throw failure
  } finally {
    transform.destroy()
  }
}
