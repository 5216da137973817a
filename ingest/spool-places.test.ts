import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { OperatorError } from '../shared/config.js'
import { OwnershipLost, SpoolOwner } from './spool-owner.js'
import { spoolsIn, takeOverSpools } from './spool-places.js'
import { segmentName } from './spool-segment.js'

let root: string
beforeEach(async () => {
  root = await mkdtemp(join(tmpdir(), 'calltape-spools-'))
})
afterEach(() => rm(root, { recursive: true, force: true }))

let writers = 0
/** @returns its name */
async function segmentIn(folder: string, content = 'x'): Promise<string> {
  await mkdir(folder, { recursive: true })
  const name = segmentName(1, String(++writers).padStart(8, '0'))
  await writeFile(join(folder, name), content)
  return name
}

const segments = async (folder: string) => (await readdir(folder)).filter((name) => name.endsWith('.segment')).sort()
const ofProcess = (index: number) => join(root, `process-${index}`)

test('one_process_has_SPOOL_DIR_itself_and_several_have_folders_in_it', async () => {
  expect(await takeOverSpools(root, { index: 0, size: 1 })).toEqual({ directory: root, moved: 0 })
  expect(await takeOverSpools(root, { index: 1, size: 2 })).toEqual({ directory: ofProcess(1), moved: 0 })
})

test('what_its_predecessor_in_its_place_left_stays_where_it_is', async () => {
  const name = await segmentIn(ofProcess(1))
  await takeOverSpools(root, { index: 1, size: 2 })
  await takeOverSpools(root, { index: 0, size: 2 })
  expect(await segments(ofProcess(1))).toEqual([name])
})

test.each([
  [4, 2],
  [4, 1],
  [1, 4],
  [1, 2],
  [3, 2],
])('what_%i_processes_left_is_taken_over_by_%i_each_segment_once', async (before, now) => {
  const names: string[] = []
  for (let index = 0; index < before; index++) names.push(await segmentIn(before === 1 ? root : ofProcess(index)))
  const found: string[] = []
  for (let index = 0; index < now; index++) {
    const { directory } = await takeOverSpools(root, { index, size: now })
    found.push(...(await segments(directory).catch(() => [])))
  }
  expect(found.sort()).toEqual(names.sort())
})

test('several_processes_share_what_is_left', async () => {
  for (const index of [0, 1, 2, 3]) await segmentIn(ofProcess(index))
  expect((await takeOverSpools(root, { index: 0, size: 2 })).moved).toBe(1)
  expect((await takeOverSpools(root, { index: 1, size: 2 })).moved).toBe(1)
})

test('who_still_uses_a_spool_that_is_taken_over_acks_nothing_any_more', async () => {
  const name = await segmentIn(ofProcess(1), 'what was acked before')
  const former = await SpoolOwner.claim(ofProcess(1))
  await former.verify()
  await takeOverSpools(root, { index: 0, size: 1 })
  await expect(former.verify()).rejects.toThrow(OwnershipLost)
  expect(await readFile(join(root, name), 'utf8')).toBe('what was acked before')
})

test('folders_of_others_and_files_kept_for_the_operator_stay', async () => {
  await segmentIn(join(root, 'somebody'))
  await segmentIn(ofProcess(1))
  await writeFile(join(ofProcess(1), 'refused.ndjson'), '{}\n')
  expect((await takeOverSpools(root, { index: 0, size: 1 })).moved).toBe(1)
  expect(await segments(join(root, 'somebody'))).toHaveLength(1)
  expect(await readdir(ofProcess(1))).toContain('refused.ndjson')
  expect(await spoolsIn(root)).toEqual([root, ofProcess(1)])
})

test('a_SPOOL_DIR_that_is_no_directory_is_a_clear_error', async () => {
  const file = join(root, 'file')
  await writeFile(file, '')
  const taken = takeOverSpools(file, { index: 0, size: 1 })
  await expect(taken).rejects.toThrow(OperatorError)
  await expect(taken).rejects.toThrow(/^SPOOL_DIR: .*file cannot be used: /)
  expect(await spoolsIn(join(root, 'nowhere'))).toEqual([])
})
