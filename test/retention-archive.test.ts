/** retention with ARCHIVE_DIR: nothing goes from Redis that is not whole in an archive, whenever its sink dies. */
import { existsSync } from 'node:fs'
import { mkdtemp, readdir, rm, utimes, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, beforeEach, expect, test } from 'vitest'
import { readConfig } from '../shared/config.js'
import type { CrashPoint } from '../shared/crash.js'
import { readArchive } from '../sink/archive.js'
import { startSink } from '../sink/sink.js'
import { Calls } from './support/calls.js'
import { Service } from './support/processes.js'
import { beforePurge, comeUpAgain, finalCall, finalCalls, retentionOf, tracesOf } from './support/retention.js'
import { log, until } from './support/stores.js'
import { entriesOf, streamOf } from './support/streams.js'

let calls: Calls
let archiveDir: string
beforeAll(async () => {
  calls = await Calls.start({ STREAM_RETENTION: 'off' })
})
afterAll(() => calls.stack.end())
beforeEach(async () => {
  archiveDir = await mkdtemp(join(tmpdir(), 'calltape-test-archive-'))
  return () => rm(archiveDir, { recursive: true, force: true })
})

/** Every whole call in the archives, each as often as it is there. */
async function archived(): Promise<[callSid: string, entries: [string, string[]][]][]> {
  const found: [string, [string, string[]][]][] = []
  for (const name of await readdir(archiveDir)) {
    if (!/^calltape-\d{8}T\d{6}Z-[0-9a-f]{8}\.ndjson\.gz$/.test(name)) continue
    let entries: [string, string[]][] = []
    for await (const page of readArchive(join(archiveDir, name))) {
      entries.push(...page.entries.map(({ id, fields }): [string, string[]] => [id, fields.map(String)]))
      if (!page.ended) continue
      found.push([page.callSid, entries])
      entries = []
    }
  }
  return found
}

const inRedis = (sids: string[]) =>
  Promise.all(sids.map(async (sid): Promise<[string, unknown]> => [sid, await entriesOf(calls.stack.redis, sid)]))

test('an_archive_has_every_entry_of_what_is_removed', async () => {
  const sids = await finalCalls(calls, 120, 3)
  const [long] = (await finalCalls(calls, 1, 1300)) as [string]
  const before = await inRedis([...sids, long])
  const { round, metrics } = retentionOf(calls, { archiveDir })
  expect(await round()).toBe(121)
  expect((await archived()).toSorted()).toEqual(before.toSorted())
  expect((await metrics.archived.get()).values[0]?.value).toBe(120 * 4 + 1301)
  expect(await readdir(archiveDir), 'several calls a file').toHaveLength(1)
  for (const sid of sids) expect(await tracesOf(calls, sid)).toEqual([])
})

test('what_comes_up_while_an_archive_is_written_waits_for_the_next_round', async () => {
  await finalCall(calls)
  let next: Promise<string> | undefined
  const redis = beforePurge(calls.stack.redis.client, () => (next ??= finalCall(calls)))
  expect(await retentionOf(calls, { archiveDir }, { redis }).round()).toBe(1)
  expect(await readdir(archiveDir)).toHaveLength(1)
  expect(await retentionOf(calls, { archiveDir }).round()).toBe(1)
  expect(await readdir(archiveDir)).toHaveLength(2)
})

test('what_is_not_utf8_comes_out_of_the_archive_as_it_was', async () => {
  const sid = await finalCall(calls)
  await calls.foreign(sid, [['e', Buffer.from([0xff, 0xfe])]])
  await calls.settled(sid)
  await until('it is settled', async () => (await tracesOf(calls, sid)).join() === 'stream,session,ended')
  await retentionOf(calls, { archiveDir }).round()
  const [name] = await readdir(archiveDir)
  const fields: unknown[] = []
  for await (const page of readArchive(join(archiveDir, name!))) fields.push(...page.entries.map((e) => e.fields[1]))
  expect(fields.at(-1)).toEqual(Buffer.from([0xff, 0xfe]))
})

test('late_event_between_archive_and_purge_stays', async () => {
  const sid = await finalCall(calls)
  await comeUpAgain(calls, sid)
  const late = { type: 'call.status', call_sid: sid, recording_url: 'https://example.com/r.mp3' } as const
  const isArchived: string[][] = []
  const redis = beforePurge(calls.stack.redis.client, async () => {
    isArchived.push(await readdir(archiveDir))
    await calls.storeSettled(late)
  })
  const settings = { archiveDir, retentionMs: 60_000 }
  expect(await retentionOf(calls, settings, { redis }).round()).toBe(0)
  expect(isArchived).toHaveLength(1)
  expect(isArchived[0]).toHaveLength(1)
  expect(await entriesOf(calls.stack.redis, sid)).toHaveLength(4)
  await comeUpAgain(calls, sid)
  expect(await retentionOf(calls, settings).round()).toBe(1)
  expect((await archived()).map(([callSid, entries]) => [callSid, entries.length])).toEqual(
    expect.arrayContaining([
      [sid, 3],
      [sid, 4],
    ]),
  )
})

test('two_sinks_that_archive_put_each_call_into_one_archive', async () => {
  const sids = await finalCalls(calls, 150)
  const purged = await Promise.all(
    [retentionOf(calls, { archiveDir }), retentionOf(calls, { archiveDir })].map((r) => r.round()),
  )
  expect(purged.reduce((sum, n) => sum + n)).toBe(150)
  expect((await archived()).map(([sid]) => sid).toSorted()).toEqual(sids.toSorted())
})

test('a_disk_that_cannot_take_it_removes_nothing_and_is_told', async () => {
  const sid = await finalCall(calls)
  await rm(archiveDir, { recursive: true })
  const { round, metrics } = retentionOf(calls, { archiveDir })
  await expect(round()).rejects.toThrow(archiveDir)
  expect((await metrics.purgeFailures.get()).values[0]?.value).toBe(1)
  expect(await tracesOf(calls, sid)).toEqual(['stream', 'session', 'ended'])
  await calls.stack.redis.client.del(streamOf(calls.stack.redis, sid))
  await comeUpAgain(calls, sid)
  await retentionOf(calls).round()
})

test('a_directory_that_is_not_there_is_told_at_the_start', async () => {
  const config = { ...calls.stack.config, ARCHIVE_DIR: join(archiveDir, 'missing') }
  await expect(startSink(config, log)).rejects.toThrow(/ARCHIVE_DIR/)
  expect(readConfig({ ARCHIVE_DIR: archiveDir }).ARCHIVE_DIR).toBe(archiveDir)
})

test('what_a_dead_sink_has_left_unfinished_goes_at_the_next_start_and_what_is_being_written_stays', async () => {
  const [dead, writing] = ['.calltape-a.ndjson.gz', '.calltape-b.ndjson.gz'].map((name) => join(archiveDir, name)) as [
    string,
    string,
  ]
  for (const path of [dead, writing]) await writeFile(path, 'half')
  await utimes(dead, 1, 1)
  const sink = await startSink({ ...calls.stack.config, ARCHIVE_DIR: archiveDir }, log)
  await sink.stop()
  expect([existsSync(dead), existsSync(writing)]).toEqual([false, true])
})

test.each<[CrashPoint, string]>([
  ['before-archived', 'all is in Redis'],
  ['after-archived', 'all is in Redis and in the archive'],
  ['after-purge', 'what is gone is in the archive'],
])(
  'archive_is_complete_before_removal_even_if_killed: %s',
  async (point) => {
    const sids = await finalCalls(calls, 70)
    const before = await inRedis(sids)
    const environment = {
      REDIS_URL: calls.stack.redis.url,
      DATABASE_URL: calls.stack.database.url,
      SINK_METRICS_PORT: '0',
      STREAM_RETENTION: '0',
      ARCHIVE_DIR: archiveDir,
      CRASH_AT: point,
    }
    const sink = new Service({ name: 'sink', environment, logFile: join(archiveDir, 'sink.log'), unsupervised: true })
    await until('it is dead', () => sink.deaths.length > 0, 30_000)
    expect(sink.deaths[0]!.signal).toBe('SIGKILL')

    const left = (await inRedis(sids)).filter(([, entries]) => (entries as unknown[]).length > 0)
    const saved = await archived()
    if (point === 'after-purge') expect(left.length).toBeLessThan(sids.length)
    else expect(left).toEqual(before)
    if (point === 'before-archived') expect(saved).toEqual([])
    const has = new Map([...left, ...saved] as [string, unknown][])
    expect([...has].toSorted()).toEqual(before.toSorted())

    await comeUpAgain(calls, ...sids) // as when its claims have lapsed
    await retentionOf(calls, { archiveDir }).round()
    expect([...new Map(await archived())].toSorted()).toEqual(before.toSorted())
    for (const sid of sids) expect(await tracesOf(calls, sid)).toEqual([])
  },
  60_000,
)
