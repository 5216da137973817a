/**
 * The files of the spool. A segment is append-only, a record (some events of one request) a line: the CRC-32 of its JSON in
 * hex, a space, a JSON array of events, a line feed. Its name says its place among the segments, and who wrote it:
 *
 *     000000000042-9f86d081.segment
 *
 * A segment is written by one process only, and never again after a write that failed. So whatever a crash or a full disk
 * leaves of a write stands at its end, without a line feed, and was never acked: it is no record. A line that is complete and
 * has another CRC was changed by something else.
 */
import { createReadStream, existsSync } from 'node:fs'
import { mkdir, readdir, stat } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { crc32 } from 'node:zlib'
import { parseJson } from '../shared/events.js'
import { syncDirectory } from '../shared/sync-directory.js'

export interface Segment {
  path: string
  bytes: number
  /** Of those left by another process: what has been read so far. */
  events: number
}

/** A record may be larger by one event. */
const RECORD_CHARS = 256 * 1024
const READ_BYTES = 256 * 1024
const LINE_FEED = 10
/** What people said on the phone is nobody else's business. */
export const FILE_MODE = 0o600
const CRC_CHARS = 8

const NAME = /^(\d{12})-[0-9a-f]{8}\.segment$/

/** @param writer 8 hex digits of its process' own: two processes never write the same file */
export const segmentName = (place: number, writer: string) => `${String(place).padStart(12, '0')}-${writer}.segment`

/** @returns a segment's place; undefined for any other file */
export function segmentPlace(name: string): number | undefined {
  const [, place] = NAME.exec(name) ?? []
  return place === undefined ? undefined : Number(place)
}

/**
 * @param payloads each an event's JSON
 * @returns the lines that hold them, of bounded size whatever their number
 */
export function* encodeRecords(payloads: string[]): Generator<Buffer> {
  for (let first = 0; first < payloads.length; ) {
    let chars = 0
    let next = first
    while (next < payloads.length && chars < RECORD_CHARS) chars += payloads[next++]!.length
    const json = Buffer.from(`[${payloads.slice(first, next).join(',')}]`)
    yield Buffer.concat([Buffer.from(`${crcOf(json)} `), json, Buffer.of(LINE_FEED)])
    first = next
  }
}

/**
 * Reads a segment record by record; what is held at a time is a record and READ_BYTES.
 *
 * @returns each record's events, as they were given to `encodeRecords`; 'damaged' for a line that is none
 */
export async function* readRecords(path: string): AsyncGenerator<unknown[] | 'damaged'> {
  let parts: Buffer[] = []
  for await (const chunk of createReadStream(path, { highWaterMark: READ_BYTES }) as AsyncIterable<Buffer>) {
    let start = 0
    for (let end = chunk.indexOf(LINE_FEED); end >= 0; end = chunk.indexOf(LINE_FEED, start)) {
      parts.push(chunk.subarray(start, end))
      yield decodeRecord(Buffer.concat(parts)) ?? 'damaged'
      parts = []
      start = end + 1
    }
    if (start < chunk.length) parts.push(chunk.subarray(start))
  }
  // All of a record but its line feed is a record, too.
  const last = decodeRecord(Buffer.concat(parts))
  if (last) yield last
}

/** @param line without its line feed @returns its events; undefined when it is no record */
export function decodeRecord(line: Buffer): unknown[] | undefined {
  const json = line.subarray(CRC_CHARS + 1)
  if (line.toString('latin1', 0, CRC_CHARS + 1) !== `${crcOf(json)} `) return undefined
  const events = parseJson(json.toString('utf8'))
  return Array.isArray(events) ? events : undefined
}

const crcOf = (json: Buffer) => crc32(json).toString(16).padStart(CRC_CHARS, '0')

/** Made level by level, so that each one outlives a power failure (and because mkdir's `recursive` never ends below /proc). */
export async function createDirectory(directory: string): Promise<void> {
  if (existsSync(directory)) return
  await createDirectory(dirname(directory))
  await mkdir(directory, { mode: 0o700 })
  await syncDirectory(dirname(directory))
}

/** Oldest first. Files of other names are somebody else's, or kept for the operator. */
export async function listSegments(directory: string): Promise<Segment[]> {
  const names = (await readdir(directory)).filter((name) => segmentPlace(name) !== undefined).sort()
  const found = await Promise.all(names.map((name) => findSegment(join(directory, name))))
  return found.filter((segment) => segment !== undefined)
}

async function findSegment(path: string): Promise<Segment | undefined> {
  try {
    return { path, bytes: (await stat(path)).size, events: 0 }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined // a former owner has just seen it stored
    throw error
  }
}
