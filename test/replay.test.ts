/** `calltape replay`: what the streams, or an archive of them, have comes back to PostgreSQL as the sinks had stored it. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import * as zlib from 'node:zlib'
import { afterAll, beforeAll, beforeEach, describe, expect, test, vi } from 'vitest'
import { replay as runReplay } from '../cli/replay.js'
import { childEnvironment, OperatorError } from '../shared/config.js'
import type { CallEvent } from '../shared/events.js'
import { Calls, ended, newSid, type Row, seqs } from './support/calls.js'
import { calltape, PROGRAM } from './support/program.js'
import { until } from './support/stores.js'
import { sessionOf, streamOf, turn } from './support/streams.js'

let calls: Calls
let folder: string
beforeAll(async () => {
  calls = await Calls.start()
  folder = await mkdtemp(join(tmpdir(), 'calltape-test-replay-'))
  Object.assign(process.env, environment())
})
afterAll(async () => {
  await calls.stack.end()
  await rm(folder, { recursive: true, force: true })
})

const TABLES = ['call_transcript_turns', 'call_events', 'call_sessions', 'quarantined_events']
beforeEach(async () => {
  await calls.idle()
  await calls.query(`TRUNCATE ${TABLES.join(', ')}`)
  const { client } = calls.stack.redis
  await client.flushdb()
  await client.set('ct:partitions', 64)
  await calls.query('ALTER TABLE call_transcript_turns DROP CONSTRAINT IF EXISTS rule')
})

const environment = () => ({ REDIS_URL: calls.stack.redis.url, DATABASE_URL: calls.stack.database.url })

interface Summary {
  calls: number
  whole_calls: number
  entries: number
  turns: number
  events: number
  quarantined: number
  left_in_quarantine: number
  left_to_sinks: { calls: number; entries: number }
  call_rows?: number
  first_calls?: object[]
  seconds: number
  stopped: boolean
  comparison?: { missing: number; extra: number; different: number; live: number; examples: object[] }
}

const STRINGS = ['call', 'from', 'to', 'schema', 'archive', 'from-archive', 'rate'] as const
const FLAGS = ['all', 'dry-run'] as const
const typed = <T extends string>(names: readonly string[], type: T) =>
  Object.fromEntries(names.map((name) => [name, { type }]))

/** Runs it to its end, in this process: to start one takes longer. @returns what it printed */
async function run(args: string[]): Promise<string> {
  const { values } = parseArgs({ args, options: { ...typed(STRINGS, 'string'), ...typed(FLAGS, 'boolean') } })
  const {
    'dry-run': dryRun,
    'from-archive': fromArchive,
    rate,
    ...others
  } = values as Record<string, string | undefined>
  const options = { ...others, dryRun: Boolean(dryRun), fromArchive, rate: rate ? Number(rate) : undefined }
  const lines: string[] = []
  const log = vi.spyOn(console, 'log').mockImplementation((line) => lines.push(String(line)))
  try {
    await runReplay({ ...options, json: true, data: folder } as Parameters<typeof runReplay>[0])
  } finally {
    log.mockRestore()
  }
  return lines.join('\n')
}

/** @param code that it must exit with */
async function replay(args: string[], code = 0): Promise<Summary> {
  const said = await run(args)
  expect(process.exitCode ?? 0).toBe(code)
  process.exitCode = undefined
  return JSON.parse(said) as Summary
}

/** The sentence with which it refuses. */
async function refusal(...args: string[]): Promise<string> {
  const error: unknown = await run(args).catch((thrown: unknown) => thrown)
  expect(error).toBeInstanceOf(OperatorError)
  return (error as OperatorError).message
}

/** All rows of all tables; when they were written is not what they say. */
async function content(): Promise<Record<string, Row[]>> {
  const all: Record<string, Row[]> = {}
  for (const table of TABLES) {
    const rows = await calls.query(
      `SELECT to_jsonb(t) - '{id,persisted_at,quarantined_at}'::text[] AS row FROM ${table} t`,
    )
    all[table] = rows
      .map(({ row }) => {
        const { finalized_at, dropped_at, last_event_at, ...rest } = row as Row
        // Of a live call, last_event_at may be some seconds old.
        return {
          ...rest,
          last_event_at: finalized_at && last_event_at,
          is_final: Boolean(finalized_at),
          is_dropped: Boolean(dropped_at),
        }
      })
      .sort((a, b) => (JSON.stringify(a) < JSON.stringify(b) ? -1 : 1))
  }
  return all
}

/** Ended calls of all kinds, a live one, and one that goes on after its end. @returns their names */
async function storeCalls(turns = 30): Promise<string[]> {
  const sids = Array.from({ length: 6 }, newSid)
  const [plain, late, live, keyless, presumed, events] = sids as [string, string, string, string, string, string]
  const started = (call_sid: string): CallEvent => ({
    type: 'call.started',
    call_sid,
    direction: 'inbound',
    from: '+14155550100',
  })
  const { seq: _, ...noSeq } = turn(keyless, 0)
  await calls.producer.store(
    ...sids.map(started),
    ...seqs(turns).map((n) => turn(plain, n)),
    turn(plain, 3, 'sent again, in other words'),
    ended(plain, turns),
    turn(late, 1),
    ended(late, 3),
    turn(late, 0),
    turn(late, 2),
    ...seqs(5).map((n) => turn(live, n)),
    noSeq,
    { ...noSeq, text: 'NUL \0 and 🎧' },
    ended(keyless),
    turn(presumed, 0),
    { type: 'call.ended', call_sid: presumed, source: 'calltape', reason: 'abandoned' } as CallEvent,
    turn(presumed, 1),
    { type: 'call.data', call_sid: events, data: { name: 'Ada' } } as CallEvent,
    ended(events, 0),
  )
  await calls.idle()
  return sids
}

describe('from the streams', () => {
  test('truncated_tables_come_back_with_the_same_content_and_a_second_run_changes_nothing', async () => {
    await storeCalls()
    const before = await content()
    await calls.query('TRUNCATE call_transcript_turns, call_events, call_sessions')
    expect(await replay(['--all'])).toMatchObject({ calls: 6, whole_calls: 0, turns: 30 + 3 + 5 + 2 + 2, events: 12 })
    expect(await content()).toEqual(before)
    const versions = () => calls.query('SELECT xmin::text, call_sid FROM call_sessions ORDER BY call_sid')
    const rows = await versions()
    // All but the one that holds an event sent again.
    expect(await replay(['--all'])).toMatchObject({ calls: 6, whole_calls: 5, turns: 0, events: 0 })
    expect(await content()).toEqual(before)
    expect(await versions()).toHaveLength(rows.length)
  })

  test('two_of_three_tables_come_back_as_well', async () => {
    await storeCalls()
    const before = await content()
    await calls.query('TRUNCATE call_transcript_turns, call_sessions')
    await replay(['--all'])
    expect(await content()).toEqual(before)
    await calls.query('DELETE FROM call_transcript_turns WHERE seq = 2')
    await calls.query('DELETE FROM call_events')
    await replay(['--all'])
    expect(await content()).toEqual(before)
  })

  test('the_first_entry_of_a_key_wins_also_where_a_later_one_was_stored_after_a_truncation', async () => {
    const sid = newSid()
    const data = (n: number) => ({ type: 'call.data', call_sid: sid, id: 'same', data: { n } }) as CallEvent
    await calls.storeSettled(turn(sid, 0), data(1), turn(sid, 1))
    const before = await content()
    await calls.query('TRUNCATE call_transcript_turns, call_events, call_sessions')
    await calls.storeSettled(turn(sid, 0, 'sent again, in other words'), data(2))
    expect((await calls.turns(sid)).map((row) => row.text)).toEqual(['sent again, in other words'])
    expect(await replay(['--all', '--dry-run'])).toMatchObject({ turns: 2, events: 1 })
    expect(await replay(['--all'])).toMatchObject({ turns: 2, events: 1 })
    expect(await content()).toEqual(before)
    expect(await replay(['--all'])).toMatchObject({ turns: 0, events: 0 })
  })

  test('a_call_whose_row_cannot_be_right_is_not_taken_for_whole', async () => {
    const [presumed, live] = [newSid(), newSid()]
    await calls.storeSettled(turn(live, 0), turn(presumed, 0), {
      type: 'call.ended',
      call_sid: presumed,
      source: 'calltape',
      reason: 'abandoned',
    } as CallEvent)
    const before = await content()
    await calls.query(
      `UPDATE call_sessions SET finalized_at = NULL, status = 'in-progress', full_transcript = NULL, turn_count = NULL
       WHERE call_sid = $1`,
      presumed,
    )
    await calls.query(`UPDATE call_sessions SET initiated_at = now() + interval '1 h' WHERE call_sid = $1`, live)
    expect(await replay(['--all'])).toMatchObject({ whole_calls: 0, turns: 0 })
    expect(await content()).toEqual(before)
    expect(await replay(['--call', live])).toMatchObject({ whole_calls: 1 })
  })

  test('what_is_in_quarantine_from_an_older_stream_stands_for_no_row_of_this_one', async () => {
    const sid = newSid()
    await calls.storeSettled(turn(sid, 0), ended(sid, 1))
    await calls.foreign(sid, [['no', 'event']])
    await calls.settled(sid)
    const { redis } = calls.stack
    await redis.client.del(streamOf(redis, sid), sessionOf(redis, sid))
    await calls.storeSettled({
      type: 'call.status',
      call_sid: sid,
      recording_url: 'https://example.com/1',
    } as CallEvent)
    await calls.query("DELETE FROM call_events WHERE type = 'call.status'")
    expect(await replay(['--all'])).toMatchObject({ whole_calls: 0, events: 1 })
  })

  test('turns_that_arrive_meanwhile_are_stored_once_and_their_calls_are_whole', async () => {
    const sids = Array.from({ length: 20 }, newSid)
    await calls.producer.store(...sids.flatMap((sid) => seqs(300).map((n) => turn(sid, n))))
    await calls.idle()
    await calls.query('TRUNCATE call_transcript_turns, call_events, call_sessions')
    const replayed = replay(['--all'])
    for (let n = 300; n < 340; n++) await calls.producer.store(...sids.map((sid) => turn(sid, n)))
    await calls.producer.store(...sids.map((sid) => ended(sid, 340)))
    await replayed
    await calls.idle()
    const rows = await calls.query(
      'SELECT count(*)::int AS calls, min(turn_count) AS turns, bool_and(complete) AS complete FROM call_sessions',
    )
    expect(rows).toEqual([{ calls: 20, turns: 340, complete: true }])
  })

  test('what_the_sinks_have_not_committed_is_left_to_them', async () => {
    const [sid, fresh] = [newSid(), newSid()]
    await calls.storeSettled(turn(sid, 0), turn(sid, 1))
    await calls.stop()
    try {
      await calls.producer.store(turn(sid, 2), turn(fresh, 0))
      await calls.query('TRUNCATE call_transcript_turns, call_sessions')
      expect(await replay(['--all'])).toMatchObject({ turns: 2, left_to_sinks: { calls: 2, entries: 2 } })
      expect((await calls.turns(sid)).map((row) => row.seq)).toEqual([0, 1])
    } finally {
      await calls.start()
    }
  })

  test('only_the_call_and_the_window_that_were_named_are_replayed', async () => {
    const [sid, other] = [newSid(), newSid()]
    await calls.storeSettled(turn(sid, 0), turn(sid, 1), turn(sid, 2))
    await calls.storeSettled(turn(other, 0))
    const ids = (await calls.turns(sid)).map((row) => String(row.stream_id))
    await calls.query('TRUNCATE call_transcript_turns, call_sessions')
    await replay(['--call', sid, '--from', ids[1]!, '--to', ids[1]!])
    expect((await calls.turns(sid)).map((row) => row.seq)).toEqual([1])
    await replay(['--from', ids[2]!, '--to', ids[2]!])
    expect((await calls.turns(sid)).map((row) => row.seq)).toEqual([1, 2])
    await replay(['--call', sid])
    expect(await calls.turns(sid)).toHaveLength(3)
    expect(await calls.turns(other)).toEqual([])
    await replay(['--from', ids[2]!])
    expect(await calls.turns(other)).toHaveLength(1)
  })

  test('quarantined_and_dropped_entries_stay_as_they_were', async () => {
    const sid = newSid()
    await calls.query("ALTER TABLE call_transcript_turns ADD CONSTRAINT rule CHECK (text NOT LIKE 'bad%')")
    await calls.storeSettled(turn(sid, 0), turn(sid, 1, 'bad'), turn(sid, 2, 'bad, too'), ended(sid))
    await calls.foreign(sid, [
      ['e', Buffer.from([0xff, 0xfe])],
      ['x', 'y'],
    ])
    await calls.settled(sid)
    await calls.query(
      "UPDATE quarantined_events SET dropped_at = now(), raw = '' WHERE raw::text LIKE '%' AND id = (SELECT min(id) FROM quarantined_events)",
    )
    const before = await content()
    expect(before.quarantined_events).toHaveLength(4)
    // Even though they could be stored now: that is what `quarantine retry` is for.
    await calls.query('ALTER TABLE call_transcript_turns DROP CONSTRAINT rule')
    await calls.query('TRUNCATE call_transcript_turns, call_events, call_sessions')
    expect(await replay(['--all'])).toMatchObject({ turns: 1, quarantined: 0, left_in_quarantine: 4 })
    expect(await content()).toEqual(before)
  })

  test('what_cannot_be_stored_goes_to_quarantine_as_a_sink_would_put_it_and_nothing_else_does', async () => {
    const sid = newSid()
    await calls.query("ALTER TABLE call_transcript_turns ADD CONSTRAINT rule CHECK (text NOT LIKE 'bad%')")
    await calls.storeSettled(...seqs(20).map((n) => turn(sid, n, n === 7 ? 'bad' : undefined)), ended(sid))
    await calls.foreign(sid, [['e', Buffer.from([0xff, 0xfe])]])
    await calls.settled(sid)
    const before = await content()
    await calls.query(`TRUNCATE ${TABLES.join(', ')}`)
    expect(await replay(['--all'])).toMatchObject({ turns: 19, quarantined: 2 })
    expect(await content()).toEqual(before)
  })

  test('streams_of_any_name_come_back_as_the_sinks_had_them', async () => {
    const sid = newSid()
    await calls.storeSettled(turn(sid, 0, 'NUL \0'), turn(sid, 1, 'half \ud83c'), ended(sid))
    for (const name of ['no call_sid!', 'nul\0name', '\ufffd']) {
      await calls.foreign(name, [
        ['e', JSON.stringify(turn(name, 0))],
        ['x'.repeat(10), ''],
      ])
    }
    await calls.idle()
    const before = await content()
    await calls.query('TRUNCATE call_transcript_turns, call_events, call_sessions')
    expect(await replay(['--all'])).toMatchObject({ calls: 4, left_in_quarantine: 6 })
    expect(await content()).toEqual(before)
    await calls.query(`TRUNCATE ${TABLES.join(', ')}`)
    expect(await replay(['--all'])).toMatchObject({ calls: 4, quarantined: 6 })
    // Where neither the entry nor the call's row can be stored, either may be the reason.
    const keys = (all: Record<string, Row[]>) =>
      all.quarantined_events!.map((row) => `${row.stream_key} ${row.entry_id} ${row.raw}`).sort()
    expect(keys(await content())).toEqual(keys(before))
  })

  test('a_dry_run_changes_nothing_and_says_what_would', async () => {
    const [sid] = await storeCalls()
    await calls.query('DELETE FROM call_transcript_turns WHERE call_sid = $1 AND seq >= 20', sid)
    await calls.query('DELETE FROM call_events WHERE call_sid = $1', sid)
    const before = await content()
    const said = await replay(['--all', '--dry-run'])
    expect(said).toMatchObject({
      turns: 10,
      events: 2,
      call_rows: 1,
      first_calls: [{ call_sid: sid, turns: 10, events: 2 }],
    })
    expect(await content()).toEqual(before)
    expect(await replay(['--all'])).toMatchObject({ turns: 10, events: 2 })
  })

  test('rate_is_kept', async () => {
    const sids = Array.from({ length: 3 }, newSid)
    await calls.producer.store(...sids.flatMap((sid) => seqs(5000).map((n) => turn(sid, n))))
    await calls.idle()
    await calls.query('TRUNCATE call_transcript_turns, call_sessions')
    const { seconds, turns } = await replay(['--all', '--rate', '10000'])
    expect(turns).toBe(15_000)
    expect(seconds).toBeGreaterThan(0.9) // the third batch is due a second after the first one
  })

  test('a_killed_replay_goes_on_where_it_was_and_a_stopped_one_says_how_far_it_came', async () => {
    const sids = Array.from({ length: 20 }, newSid)
    await calls.producer.store(...sids.flatMap((sid) => [...seqs(1000).map((n) => turn(sid, n)), ended(sid, 1000)]))
    await calls.idle()
    const before = await content()
    await calls.query('TRUNCATE call_transcript_turns, call_events, call_sessions')
    const start = () =>
      spawn(process.execPath, [PROGRAM, 'replay', '--all', '--rate', '3000', '--json'], {
        env: childEnvironment(environment()),
        stdio: ['ignore', 'pipe', 'inherit'],
      })
    const stored = async () => Number((await calls.query('SELECT count(*) AS n FROM call_transcript_turns'))[0]!.n)
    const killed = start()
    await until('something is stored', async () => (await stored()) > 0)
    killed.kill('SIGKILL')
    await once(killed, 'close')
    const after = await stored()
    expect(after).toBeLessThan(20_000)
    const stopped = start()
    let out = ''
    stopped.stdout.on('data', (data) => (out += data))
    await until('more is stored', async () => (await stored()) > after)
    stopped.kill('SIGTERM')
    expect((await once(stopped, 'close'))[0]).toBe(143)
    expect(JSON.parse(out)).toMatchObject({ stopped: true })
    const rest = await replay(['--all'])
    expect(rest.whole_calls).toBeGreaterThan(0)
    expect(rest.whole_calls).toBeLessThan(20)
    expect(await content()).toEqual(before)
  })
})

describe('into another schema', () => {
  test('it_compares_equal_and_a_tampered_row_is_found', async () => {
    const [plain, late] = await storeCalls()
    expect((await replay(['--all', '--schema', 'rebuilt'])).comparison).toMatchObject({
      missing: 0,
      extra: 0,
      different: 0,
      live: 0,
    })
    await calls.query("UPDATE call_transcript_turns SET text = 'secret' WHERE call_sid = $1 AND seq = 1", plain)
    await calls.query('UPDATE call_sessions SET end_reason = $2 WHERE call_sid = $1', late, 'forged')
    await calls.query('DELETE FROM call_events WHERE call_sid = $1', late)
    const { comparison } = await replay(['--all', '--schema', 'rebuilt'], 1)
    expect(comparison).toMatchObject({ missing: 0, extra: 2, different: 2 })
    expect(comparison!.examples).toContainEqual({
      call_sid: plain,
      table: 'call_transcript_turns',
      kind: 'different',
      key: '1',
    })
    expect(comparison!.examples).toContainEqual({ call_sid: late, table: 'call_sessions', kind: 'different' })
    expect(JSON.stringify(comparison)).not.toContain('secret')
    await calls.query('DROP SCHEMA rebuilt CASCADE')
  })
})

describe('archives', () => {
  const EXTENSIONS = ['.ndjson', '.ndjson.gz', ...('createZstdCompress' in zlib ? ['.ndjson.zst'] : [])]
  test.each(EXTENSIONS)('an_archive_outlives_a_flushed_redis: %s', async (extension) => {
    const [sid] = await storeCalls(2500)
    await calls.foreign(sid!, [['e', Buffer.from([0xff, 0xfe])]])
    await calls.settled(sid!)
    const before = await content()
    const file = join(folder, `${newSid()}${extension}`)
    const written = await replay(['--all', '--archive', file])
    expect(written).toMatchObject({ calls: 6, stopped: false })
    await calls.stack.redis.client.flushdb()
    await calls.query(`TRUNCATE ${TABLES.join(', ')}`)
    await replay(['--all', '--from-archive', file])
    expect(await content()).toEqual(before)
    expect(await replay(['--all', '--from-archive', file])).toMatchObject({ turns: 0, events: 0, quarantined: 0 })
    expect(await content()).toEqual(before)
  })

  test('a_folder_of_archives_is_replayed_without_any_redis', async () => {
    const sids = await storeCalls()
    const before = await content()
    const parts = await mkdtemp(join(folder, 'parts-'))
    for (const [i, sid] of sids.entries()) await replay(['--call', sid, '--archive', join(parts, `${i}.ndjson.gz`)])
    await calls.query(`TRUNCATE ${TABLES.join(', ')}`)
    const ran = await calltape(['replay', '--all', '--from-archive', parts], {
      ...environment(),
      REDIS_URL: 'redis://127.0.0.1:1',
    })
    expect(ran).toMatchObject({ code: 0 })
    expect(ran.out).toContain('All that was meant is in PostgreSQL.')
    expect(await content()).toEqual(before)
  })

  const line = (call_sid: string, id: number, event: object) =>
    JSON.stringify({ call_sid, id: `${1_700_000_000_000 + id}-0`, fields: ['e', JSON.stringify(event)] })
  const end = (call_sid: string, entries: number) => JSON.stringify({ call_sid, end: true, entries })

  test('a_call_whose_last_page_is_full_has_all_its_turns_in_its_transcript', async () => {
    const [sid, turns] = [newSid(), 6999] // pages are of 1000, batches of 5000
    const lines = [line(sid, 0, ended(sid, turns)), ...seqs(turns).map((n) => line(sid, n + 1, turn(sid, n)))]
    const file = join(folder, 'full-page.ndjson')
    await writeFile(file, `${[...lines, end(sid, turns + 1)].join('\n')}\n`)
    expect(await replay(['--all', '--from-archive', file])).toMatchObject({ turns })
    expect(await calls.session(sid)).toMatchObject({ turn_count: turns, complete: true })
  })

  test('a_call_that_was_archived_twice_is_stored_from_both', async () => {
    const sid = newSid()
    const lines = [line(sid, 0, turn(sid, 0)), end(sid, 1), line(sid, 1, turn(sid, 1)), end(sid, 1)]
    const file = join(folder, 'twice.ndjson')
    await writeFile(file, `${lines.join('\n')}\n`)
    expect(await replay(['--all', '--from-archive', file])).toMatchObject({ turns: 2 })
    await calls.query('DELETE FROM call_transcript_turns WHERE seq = 1')
    expect(await replay(['--all', '--from-archive', file])).toMatchObject({ turns: 1 })
  })

  test('a_damaged_archive_names_file_and_line_and_what_could_be_read_is_stored', async () => {
    const sid = newSid()
    await calls.storeSettled(...seqs(50).map((n) => turn(sid, n)))
    const file = join(folder, 'damaged.ndjson')
    await replay(['--all', '--archive', file])
    await truncate(file, 4000)
    await calls.query('TRUNCATE call_transcript_turns, call_sessions')
    expect(await refusal('--all', '--from-archive', file)).toMatch(
      /damaged\.ndjson is cut off or damaged behind line \d+/,
    )
    expect((await calls.turns(sid)).length).toBeGreaterThan(10)
    await writeFile(file, '{"call_sid":"x"}\n')
    expect(await refusal('--all', '--from-archive', file)).toContain(`${file}, line 1: neither an entry`)
  })
})

test.each([
  [[], /say what to replay: --call SID/],
  [['--all', '--call', 'x'], /--all means every call/],
  [['--all', '--archive', 'x.ndjson.gz', '--dry-run'], /--archive only writes a file: it does not go with --dry-run/],
  [['--all', '--schema', 'public'], /another schema than DATABASE_SCHEMA/],
  [['--all', '--schema', 'Bad Name'], /--schema wants a plain name/],
  [['--from', '1', '--schema', 'x'], /--schema compares whole calls/],
  [['--from', 'yesterday'], /--from wants epoch milliseconds/],
  [['--call', 'nobody'], /Redis has no stream of call nobody .*: there is nothing to replay/],
  [['--all', '--from-archive', '/nowhere.ndjson'], /--from-archive \/nowhere.ndjson: ENOENT/],
])('what_makes_no_sense_is_refused_with_a_sentence: %j', async (args, sentence) => {
  expect(await refusal(...args)).toMatch(sentence)
})

test('an_option_that_is_no_number_is_refused_before_anything_is_asked', async () => {
  const { code, err } = await calltape(['replay', '--all', '--rate', '0'], environment())
  expect({ code, err }).toEqual({ code: 2, err: expect.stringMatching(/--rate wants a number above 0/) })
})
