/** `calltape erase`: nothing of a call is left, whoever works on it meanwhile, and nothing of any other call is missing. */
import { randomBytes } from 'node:crypto'
import { mkdir, mkdtemp, readdir, readFile, rm, utimes, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, beforeEach, expect, onTestFinished, test } from 'vitest'
import type { Outcome, RunOptions } from '../cli/erase/run.js'
import { eraseInRedis } from '../cli/erase/stores.js'
import { eraseCalls } from '../cli/erase.js'
import { isSpoolUsed } from '../ingest/spool-owner.js'
import { encodeRecords, readRecords, segmentName } from '../ingest/spool-segment.js'
import type { CallEvent } from '../shared/events.js'
import { ArchiveWriter, readArchive } from '../sink/archive.js'
import { Leases } from '../sink/lease.js'
import { Calls, ended, newSid } from './support/calls.js'
import { testIngest } from './support/ingest.js'
import { calltape } from './support/program.js'
import { Relay } from './support/relay.js'
import { freshRedis, until } from './support/stores.js'
import { committed, LIMITS, Producer, placesOf, sessionOf, streamOf, take, turn } from './support/streams.js'

let calls: Calls
beforeAll(async () => {
  calls = await Calls.start()
})
afterAll(() => calls.stack.end())

let sid: string
let other: string
beforeEach(() => {
  // No other test's name may be part of it: what is left is looked for by it.
  sid = `${newSid()}-${randomBytes(4).toString('hex')}`
  other = `${sid}-other`
})

const whole = (callSid: string): CallEvent[] => [
  { type: 'call.started', call_sid: callSid, from: '+14155550100' },
  turn(callSid, 0),
  turn(callSid, 1),
  ended(callSid, 2),
]

const ALL: RunOptions = { force: false, dryRun: false, waitMs: 10_000 }
const FORCE = { ...ALL, force: true }

async function erase(options: RunOptions = ALL, archives: string[] = [], spoolDir?: string): Promise<Outcome> {
  const [outcome] = await eraseCalls([sid], calls.stack.config, options, archives, spoolDir)
  return outcome!
}

const removed = ({ tally }: Outcome) =>
  Object.fromEntries(tally.rows.map(({ where, what, count }) => [`${where}: ${what}`, count]))

/** How often a call is named in all that Redis and PostgreSQL have. */
async function mentions(callSid: string): Promise<string[]> {
  const { client } = calls.stack.redis
  const found: string[] = []
  for (const key of await client.keys('*')) {
    if (key.endsWith(`:${callSid}`)) found.push(key)
    if ((await client.type(key)) === 'zset' && (await client.zscore(key, callSid)) !== null) found.push(`${key} has it`)
  }
  for (const table of ['call_transcript_turns', 'call_events', 'call_sessions', 'quarantined_events', 'legacy_held']) {
    const rows = await calls.query(
      `SELECT 1 FROM ${table} t WHERE position($1 IN t::text) > 0 AND position($2 IN t::text) = 0`,
      callSid,
      `${callSid}-`,
    )
    if (rows.length > 0) found.push(`${table} has ${rows.length}`)
  }
  return found
}

test('an_ended_call_leaves_nothing_and_another_one_with_nearly_its_name_loses_nothing', async () => {
  await calls.storeSettled(...whole(sid), ...whole(other))
  await calls.foreign(sid, [
    ['e', '{'],
    ['x', 'y'],
  ])
  await calls.settled(sid)
  await calls.query(
    `UPDATE quarantined_events SET dropped_at = now(), raw = '' WHERE entry_id = (SELECT max(entry_id) FROM quarantined_events WHERE stream_key = $1)`,
    streamOf(calls.stack.redis, sid),
  )
  await calls.query('INSERT INTO legacy_held SELECT unnest($1::text[])', [sid, other])
  const before = await mentions(other)
  expect(await mentions(sid)).toHaveLength(8)

  const outcome = await erase()
  expect(outcome).toMatchObject({ state: 'erased', notes: [] })
  expect(removed(outcome)).toEqual({
    'Redis: stream entries': 6,
    'Redis: sessions': 1,
    'Redis: places in lists': 1,
    'PostgreSQL: call_transcript_turns': 2,
    'PostgreSQL: call_events': 2,
    'PostgreSQL: call_sessions': 1,
    'PostgreSQL: quarantined_events': 2,
    'PostgreSQL: legacy_held': 1,
  })
  expect(await mentions(sid)).toEqual([])
  expect(await mentions(other)).toEqual(before)
  expect(await erase()).toMatchObject({ state: 'unknown' })
})

test('what_a_killed_erase_has_left_is_removed_by_the_next_one', async () => {
  await calls.storeSettled(...whole(sid))
  await eraseInRedis(calls.stack.redis.client, calls.stack.redis.partitions, sid, 'any') // and there it died
  expect(await erase()).toMatchObject({ state: 'erased' })
  expect(await mentions(sid)).toEqual([])
})

test('a_live_call_is_left_as_it_is_without_force_and_erased_with_it', async () => {
  await calls.storeSettled(turn(sid, 0))
  const before = await mentions(sid)
  expect(await erase()).toMatchObject({ state: 'live' })
  expect(await erase({ ...FORCE, dryRun: true })).toMatchObject({ state: 'found' })
  expect(await mentions(sid)).toEqual(before)
  expect(await erase(FORCE)).toMatchObject({ state: 'erased' })
  expect(await mentions(sid)).toEqual([])
})

test('an_event_behind_the_erasure_begins_the_call_anew', async () => {
  await calls.storeSettled(...whole(sid))
  await erase()
  await calls.storeSettled(turn(sid, 7), ended(sid))
  expect(await calls.session(sid)).toMatchObject({ turn_count: 1, from_number: null })
})

test('a_sink_that_is_about_to_commit_what_it_has_read_leaves_no_row', async () => {
  const gate = await calls.stack.database.pool.connect()
  onTestFinished(async () => {
    await calls.query('DROP TRIGGER IF EXISTS hold ON call_transcript_turns')
    gate.release()
  })
  await gate.query('SELECT pg_advisory_lock(17)')
  await calls.query(`CREATE OR REPLACE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_advisory_xact_lock_shared(17); RETURN NEW; END $$`)
  await calls.query('CREATE TRIGGER hold BEFORE INSERT ON call_transcript_turns FOR EACH ROW EXECUTE FUNCTION hold()')
  await calls.producer.store(...whole(sid))
  const places = () => placesOf(calls.stack.redis, sid)
  const waiting = `SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND application_name = 'calltape-sink'`
  await until('a sink holds it in its hands', async () => (await calls.query(waiting)).length > 0)

  const erasing = erase(FORCE)
  await until(
    'Redis has it no more',
    async () => (await calls.stack.redis.client.exists(streamOf(calls.stack.redis, sid))) === 0,
  )
  expect(Object.keys(await places())).toEqual(['leased'])
  await gate.query('SELECT pg_advisory_unlock(17)')
  const outcome = await erasing
  expect(outcome).toMatchObject({ state: 'erased', notes: [] })
  expect(removed(outcome)).toMatchObject({ 'PostgreSQL: call_transcript_turns': 2 })
  await calls.idle()
  expect(await mentions(sid)).toEqual([])
})

test('a_sink_that_does_not_come_to_its_end_is_told_and_nothing_is_called_erased', async () => {
  const redis = await freshRedis()
  onTestFinished(() => redis.drop())
  await new Producer(redis).store(turn(sid, 0))
  const leases = new Leases(redis.client, redis.partitions, LIMITS.leaseMs)
  await take(leases, redis)
  const config = { ...calls.stack.config, REDIS_URL: redis.url }
  const [outcome] = await eraseCalls([sid], config, { ...FORCE, waitMs: 300 })
  expect(outcome).toMatchObject({ state: 'left' })
  expect(outcome!.left.rows).toEqual([{ where: 'Redis', what: 'places in lists', count: 1 }])
})

test('the_lease_of_a_sink_that_has_hung_proves_nothing_any_more', async () => {
  const redis = await freshRedis()
  onTestFinished(() => redis.drop())
  await new Producer(redis).store(turn(sid, 0), ended(sid))
  const leases = new Leases(redis.client, redis.partitions, LIMITS.leaseMs)
  const leased = await take(leases, redis, { leaseMs: 1 })
  const config = { ...calls.stack.config, REDIS_URL: redis.url }
  await until(
    'it has lapsed',
    async () => (await eraseInRedis(redis.client, redis.partitions, sid, 'look')).leaseMs === 0,
  )
  const [outcome] = await eraseCalls([sid], config, FORCE)
  expect(outcome).toMatchObject({ state: 'erased', notes: [expect.stringContaining('no sign of life')] })
  await leases.prolong([leased.lease])
  expect(await leases.isolate(leased.lease, '1-0')).toBe(false)
  expect(await leases.settle([committed(leased, 2, true)])).toMatchObject({ lapsed: 1, again: [] })
  expect(await placesOf(redis, sid)).toEqual({})
  expect(await redis.client.exists(streamOf(redis, sid), sessionOf(redis, sid))).toBe(0)
})

test('a_call_that_goes_on_and_on_is_not_called_erased', async () => {
  await calls.storeSettled(turn(sid, 0))
  let isOver = false
  const talk = (async () => {
    for (let seq = 1; !isOver; seq++) await calls.producer.store(turn(sid, seq))
  })()
  const outcome = await erase({ ...FORCE, waitMs: 500 })
  isOver = true
  await talk
  expect(outcome).toMatchObject({ state: 'left' })
  await calls.producer.store(ended(sid))
  await calls.idle()
  expect(await erase()).toMatchObject({ state: 'erased' })
})

async function folder(): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), 'calltape-test-erase-'))
  onTestFinished(() => rm(path, { recursive: true, force: true }))
  return path
}

/** One record of each request's events. */
const segmentOf = (...requests: CallEvent[][]) =>
  Buffer.concat(requests.flatMap((events) => [...encodeRecords(events.map((event) => JSON.stringify(event)))]))

async function eventsIn(path: string): Promise<unknown[]> {
  const events: unknown[] = []
  for await (const record of readRecords(path)) events.push(...(record === 'damaged' ? [record] : record))
  return events
}

test('a_spool_that_nobody_empties_is_taken_over_and_keeps_all_that_is_of_others', async () => {
  const directory = await folder()
  const [mixed, pure, kept] = [1, 2, 3].map((place) => join(directory, segmentName(place, 'abcdef01'))) as [
    string,
    string,
    string,
  ]
  const damaged = segmentOf([turn(sid, 9)])
  damaged[20]! ^= 1
  await writeFile(join(directory, 'owner'), 'abcdef01abcdef01abcdef01abcdef01')
  await utimes(join(directory, 'owner'), 0, 0)
  await writeFile(
    mixed,
    Buffer.concat([
      segmentOf([turn(sid, 0), turn(other, 0)], [turn(other, 1)], [turn(sid, 1)]),
      damaged,
      Buffer.from('torn'),
    ]),
  )
  await writeFile(pure, segmentOf([turn(sid, 2)]))
  const ofOthers = segmentOf([{ ...turn(other, 2), meta: { about: sid } }])
  await writeFile(kept, ofOthers)
  await writeFile(`${pure}.damaged`, Buffer.concat([damaged, segmentOf([turn(other, 5)])]))
  const refusal = (event: CallEvent) =>
    `${JSON.stringify({ at: '2026-01-01T00:00:00Z', code: 'not_stored', message: 'no', event })}\n`
  await writeFile(join(directory, 'refused.ndjson'), refusal(turn(sid, 6)) + refusal(turn(other, 6)))

  const outcome = await erase(ALL, [], directory)
  expect(outcome).toMatchObject({ state: 'erased', notes: [expect.stringContaining('was taken over')] })
  expect(removed(outcome)).toEqual({ 'spool: events': 4, 'spool: damaged records': 1, 'spool: refused events': 1 })
  expect(await eventsIn(mixed)).toEqual([turn(other, 0), turn(other, 1)])
  expect((await readFile(mixed)).subarray(-4).toString()).toBe('torn')
  expect(await readFile(kept)).toEqual(ofOthers)
  expect(await eventsIn(`${pure}.damaged`)).toEqual([turn(other, 5)])
  expect(await readFile(join(directory, 'refused.ndjson'), 'utf8')).toBe(refusal(turn(other, 6)))
  expect((await readdir(directory)).toSorted()).toEqual(
    [mixed, `${pure}.damaged`, kept]
      .map((path) => path.slice(directory.length + 1))
      .concat('owner', 'refused.ndjson')
      .toSorted(),
  )
  expect(await readFile(join(directory, 'owner'), 'utf8')).not.toContain('abcdef01')
})

test('a_spool_that_somebody_empties_is_not_taken_over', async () => {
  const directory = await folder()
  const segments = [1, 2, 3].map((place) => join(directory, segmentName(place, 'abcdef01')))
  await writeFile(join(directory, 'owner'), 'of an ingest')
  for (const path of segments) await writeFile(path, segmentOf([turn(sid, 0), turn(other, 0)]))
  const emptying = (async () => {
    for (const path of segments) {
      await sleep(400)
      await rm(path)
    }
  })()
  expect(await erase(ALL, [], directory)).toMatchObject({ state: 'erased', notes: [] })
  await emptying
  expect(await readdir(directory)).toEqual(['owner'])
  expect(await readFile(join(directory, 'owner'), 'utf8')).toBe('of an ingest')
})

test('a_spool_that_is_still_being_emptied_in_the_end_is_left_to_its_ingest', async () => {
  const directory = await folder()
  const segments = [1, 2].map((place) => join(directory, segmentName(place, 'abcdef01')))
  await writeFile(join(directory, 'owner'), 'of an ingest')
  for (const path of segments) await writeFile(path, segmentOf([turn(sid, 0), turn(other, 0)]))
  const outcome = await erase({ ...ALL, waitMs: 200 }, [], directory)
  expect(outcome).toMatchObject({ state: 'left', notes: [] })
  expect(outcome.left.rows).toEqual([{ where: 'spool', what: 'events', count: 2 }])
  expect(await readFile(join(directory, 'owner'), 'utf8')).toBe('of an ingest')
  expect(await eventsIn(segments[0]!)).toHaveLength(2)
})

test('the_spools_of_all_processes_of_an_ingest_are_searched', async () => {
  const directory = await folder()
  for (const place of ['', 'process-0', 'process-5']) {
    await mkdir(join(directory, place), { recursive: true })
    await writeFile(join(directory, place, segmentName(1, 'abcdef01')), segmentOf([turn(sid, 0), turn(other, 0)]))
  }
  const outcome = await erase(ALL, [], directory)
  expect(outcome.tally.rows).toContainEqual({ where: 'spool', what: 'events', count: 3 })
  expect(outcome.state).toBe('erased')
  expect(await eventsIn(join(directory, 'process-5', segmentName(1, 'abcdef01')))).toHaveLength(1)
})

test('a_spool_that_an_ingest_empties_is_waited_for_and_stays_its_own', async () => {
  const directory = await folder()
  const many = Array.from({ length: 3000 }, (_, seq) => [turn(other, seq), turn(sid, seq)])
  await writeFile(join(directory, segmentName(1, 'abcdef01')), segmentOf(...many))
  const ingest = await testIngest({ REDIS_URL: calls.stack.redis.url, SPOOL_DIR: directory })
  const owner = await readFile(join(directory, 'owner'), 'utf8')
  const outcome = await erase(FORCE, [], directory)
  expect(outcome).toMatchObject({ state: 'erased', notes: [] })
  await calls.idle()
  expect(await readFile(join(directory, 'owner'), 'utf8')).toBe(owner)
  expect((await calls.turns(other)).length).toBe(3000)
  expect(await mentions(sid)).toEqual([])
  await ingest.stop()
})

test('a_spool_is_never_taken_from_an_ingest_that_lives_and_cannot_empty_it', async () => {
  const directory = await folder()
  const relay = await Relay.start(calls.stack.redis.url)
  onTestFinished(() => relay.stop())
  const ingest = await testIngest({ REDIS_URL: relay.url, SPOOL_DIR: directory })
  relay.holdRequests = true
  const body = JSON.stringify([turn(sid, 0), turn(other, 0)])
  const headers = { 'Content-Type': 'application/json' }
  const answer = await fetch(`${ingest.url}/v1/events?spool=true`, { method: 'POST', headers, body })
  expect(answer.status).toBe(202)
  const owner = await readFile(join(directory, 'owner'), 'utf8')
  const [segment] = (await readdir(directory)).filter((name) => name.endsWith('.segment'))
  const outcome = await erase({ ...FORCE, waitMs: 5000 }, [], directory)
  expect(outcome).toMatchObject({ state: 'left', notes: [] })
  expect(outcome.left.rows).toContainEqual({ where: 'spool', what: 'events', count: 1 })
  expect(await readFile(join(directory, 'owner'), 'utf8')).toBe(owner)
  expect(await eventsIn(join(directory, segment!))).toHaveLength(2)
  relay.holdRequests = false
  await calls.idle()
  expect(await isSpoolUsed(directory)).toBe(true)
  await ingest.stop()
  expect(await isSpoolUsed(directory), 'what it left can be taken over at once').toBe(false)
}, 30_000)

async function archive(path: string, ...callSids: string[]): Promise<string> {
  const writer = await ArchiveWriter.open(path)
  for (const callSid of callSids) {
    await writer.write(callSid, [{ id: '1-0', fields: ['e', JSON.stringify(turn(callSid, 0))] }])
    await writer.write(callSid, [{ id: '2-0', fields: ['e', Buffer.from([0xff])] }])
    await writer.endCall(callSid, 2)
  }
  await writer.close()
  return path
}

async function archived(path: string) {
  const found: string[] = []
  for await (const { callSid, entries, ended } of readArchive(path)) found.push(`${callSid} ${entries.length} ${ended}`)
  return found
}

test('archives_are_written_anew_without_it_and_one_with_nothing_else_goes', async () => {
  const directory = await folder()
  const both = await archive(join(directory, 'a.ndjson.gz'), other, sid)
  const pure = await archive(join(directory, 'b.ndjson'), sid)
  const kept = await archive(join(directory, 'c.ndjson'), other)
  const before = await readFile(kept)
  const outcome = await erase(ALL, [both, directory])
  expect(outcome).toMatchObject({ state: 'erased' })
  expect(removed(outcome)).toEqual({ 'archives: entries': 4 })
  expect(await archived(both)).toEqual([`${other} 2 true`])
  expect(await readFile(kept)).toEqual(before)
  expect((await readdir(directory)).toSorted()).toEqual(['a.ndjson.gz', 'c.ndjson'])
  expect(pure).toContain(directory)
})

test('an_archive_that_is_cut_off_is_told_and_nothing_is_called_erased', async () => {
  const directory = await folder()
  const path = await archive(join(directory, 'a.ndjson'), sid, other)
  const cut = (await readFile(path)).subarray(0, -30)
  await writeFile(path, cut)
  await calls.storeSettled(...whole(sid))
  const outcome = await erase(ALL, [directory])
  expect(outcome).toMatchObject({ state: 'left', notes: [expect.stringContaining('a.ndjson')] })
  expect(outcome.left.rows).toContainEqual({ where: 'archives', what: 'unreadable files', count: 1 })
  expect(await readFile(path)).toEqual(cut)
  expect(await mentions(sid)).toEqual([])
})

test('the_command_says_what_it_removed_and_exits_0_only_if_nothing_is_left', async () => {
  const { redis, database } = calls.stack
  await calls.query('CREATE TABLE IF NOT EXISTS legacy_calls (call_sid text PRIMARY KEY)')
  await calls.query('INSERT INTO legacy_calls VALUES ($1)', sid)
  await calls.storeSettled(...whole(sid), ...whole(other))
  const run = (...args: string[]) =>
    calltape(['erase', ...args], {
      REDIS_URL: redis.url,
      DATABASE_URL: database.url,
      LEGACY_CALL_SESSIONS: 'legacy_calls',
    })
  const dry = await run(sid, '--dry-run')
  expect(dry).toMatchObject({ code: 0, err: '' })
  expect(dry.out).toMatch(/would be removed[\s\S]*call_transcript_turns +2/)
  const done = await run(sid)
  expect(done).toMatchObject({ code: 0, err: '' })
  expect(done.out).toMatch(
    /is erased[\s\S]*stream entries +4[\s\S]*call_transcript_turns +2[\s\S]*public\.legacy_calls .* stays as it is[\s\S]*append-only file/,
  )
  expect(await calls.query('SELECT * FROM legacy_calls WHERE call_sid = $1', sid)).toHaveLength(1)
  const again = await run(sid, other, '--json', '--rewrite-aof')
  expect(again.code).toBe(1)
  expect(JSON.parse(again.out)).toMatchObject({
    calls: [
      { call_sid: sid, state: 'unknown' },
      { call_sid: other, state: 'erased', left: [] },
    ],
  })
  expect((await run(sid)).out).toContain(`nothing is known of call ${sid}`)
})
