/** Archives: what was written is read back; what is damaged is named, and gives what it has. */
import { mkdtemp, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import * as zlib from 'node:zlib'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { OperatorError } from '../shared/config.js'
import { type ArchivedEntry, type ArchivePage, ArchiveWriter, readArchive } from '../sink/archive.js'

let folder: string
let names = 0
const newPath = (extension: string) => join(folder, `${names++}.ndjson${extension}`)
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'calltape-test-archive-'))
})
afterAll(async () => await rm(folder, { recursive: true }))

const entry = (n: number, text = `turn ${n}`): ArchivedEntry => ({ id: `1700000000000-${n}`, fields: ['e', text] })
const entries = (count: number) => Array.from({ length: count }, (_, n) => entry(n))

async function write(path: string, calls: Record<string, ArchivedEntry[]>): Promise<void> {
  const writer = await ArchiveWriter.open(path)
  for (const [callSid, its] of Object.entries(calls)) {
    await writer.write(callSid, its)
    await writer.endCall(callSid, its.length)
  }
  await writer.close()
}

/** What is read up to the end, or up to an error. */
async function read(path: string): Promise<{ pages: ArchivePage[]; error: OperatorError | undefined }> {
  const pages: ArchivePage[] = []
  try {
    for await (const page of readArchive(path)) pages.push(page)
  } catch (error) {
    if (!(error instanceof OperatorError)) throw error
    return { pages, error }
  }
  return { pages, error: undefined }
}

const hasZstd = 'createZstdCompress' in zlib
const EXTENSIONS = ['', '.gz', ...(hasZstd ? ['.zst'] : [])]

describe.each(EXTENSIONS)('ndjson%s', (extension) => {
  test('what_was_written_is_read_back_whatever_it_holds', async () => {
    const odd: ArchivedEntry[] = [
      { id: '0-1', fields: [] },
      { id: '18446744073709551615-18446744073709551615', fields: ['e', 'line\nbreak \u2028 \0 नमस्ते 🎧', 'e'] },
      { id: '5-0', fields: [Buffer.from([0xff, 0x00, 0x0a]), Buffer.from('text'), 'x'.repeat(3_000_000)] },
    ]
    const path = newPath(extension)
    await write(path, { odd, empty: [], other: entries(2) })
    const read3 = [odd[0], odd[1], { id: '5-0', fields: [odd[2]!.fields[0], 'text', odd[2]!.fields[2]] }]
    const { pages, error } = await read(path)
    expect(error).toBeUndefined()
    const ended = pages.filter((page) => page.ended).map((page) => page.callSid)
    expect(ended).toEqual(['odd', 'empty', 'other'])
    const of = (callSid: string) => pages.filter((page) => page.callSid === callSid).flatMap((page) => page.entries)
    expect(of('odd')).toEqual(read3)
    expect(of('other')).toEqual(entries(2))
  })

  test('a_long_call_comes_in_pages_and_only_the_last_one_says_that_it_ended', async () => {
    const path = newPath(extension)
    await write(path, { long: entries(2500), next: entries(1) })
    const { pages } = await read(path)
    expect(pages.map(({ callSid, ended, entries }) => [callSid, entries.length, ended])).toEqual([
      ['long', 1000, false],
      ['long', 1000, false],
      ['long', 500, true],
      ['next', 1, true],
    ])
  })

  test('a_file_that_is_cut_off_gives_its_whole_lines_and_then_says_so', async () => {
    const path = newPath(extension)
    await write(path, { long: entries(40_000) })
    const { length } = await readFile(path)
    await truncate(path, Math.floor(length / 2))
    const { pages, error } = await read(path)
    const all = pages.flatMap((page) => page.entries)
    expect(all.length).toBeGreaterThan(1000)
    expect(all).toEqual(entries(all.length))
    expect(error?.message).toContain(`${path} is cut off or damaged behind line ${all.length}: `)
  })
})

test('a_file_that_is_cut_off_between_two_lines_of_a_call_says_so', async () => {
  const path = newPath('')
  await write(path, { 'a-call': entries(2) })
  const text = await readFile(path, 'utf8')
  await writeFile(path, `${text.split('\n').slice(0, 2).join('\n')}\n`)
  const { pages, error } = await read(path)
  expect(pages).toEqual([{ callSid: 'a-call', entries: entries(2), ended: false }])
  expect(error?.message).toBe(`${path} is cut off or damaged behind line 2: call a-call has no end`)
})

test.each([
  ['{"call_sid":"c","id":"1-1","fiel'],
  ['{"call_sid":"c","id":"1-1","fields":[1]}'],
  ['{"call_sid":"c","id":"first","fields":[]}'],
  ['{"id":"1-1","fields":[]}'],
  ['null'],
  [''],
])('a_line_that_is_none_is_named: %s', async (line) => {
  const path = newPath('')
  await writeFile(path, `{"call_sid":"c","id":"1-0","fields":["e","x"]}\n${line}\n`)
  const { pages, error } = await read(path)
  expect(pages).toEqual([{ callSid: 'c', entries: [{ id: '1-0', fields: ['e', 'x'] }], ended: false }])
  expect(error?.message).toBe(`${path}, line 2: neither an entry of a call nor a call's end`)
})

test('a_line_that_is_missing_is_noticed_at_its_calls_end', async () => {
  const path = newPath('')
  await write(path, { 'a-call': entries(3) })
  const lines = (await readFile(path, 'utf8')).split('\n')
  await writeFile(path, lines.toSpliced(1, 1).join('\n'))
  expect((await read(path)).error?.message).toBe(`${path}, line 3: call a-call had 3 entries, here are 2`)
})

test('damage_within_compressed_data_is_an_error_that_names_the_file', async () => {
  const path = newPath('.gz')
  await write(path, { long: entries(40_000) })
  const bytes = await readFile(path)
  bytes.fill(0xff, bytes.length >> 1, (bytes.length >> 1) + 100)
  await writeFile(path, bytes)
  expect((await read(path)).error?.message).toMatch(/line \d+/)
})

test('an_archive_is_never_overwritten', async () => {
  const path = newPath('')
  await write(path, { call: entries(1) })
  await expect(ArchiveWriter.open(path)).rejects.toThrow(/the archive .* cannot be created: EEXIST/)
})

test('a_disk_that_takes_nothing_is_an_error_of_write_or_close', async () => {
  const writer = await ArchiveWriter.open(newPath(''))
  const file = (writer as unknown as { file: { close(): Promise<void> } }).file
  await file.close()
  await expect(writer.write('call', entries(40_000))).rejects.toThrow(/cannot be written/)
  await expect(writer.close()).rejects.toThrow(/cannot be written/)
})

test.skipIf(hasZstd)('zst_where_node_has_none_is_explained', async () => {
  await expect(ArchiveWriter.open(newPath('.zst'))).rejects.toThrow(/has no zstd .* use \.gz/)
})
