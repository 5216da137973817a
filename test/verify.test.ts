/** `calltape verify`: exit code 0 means that all that was in the streams is in PostgreSQL; everything else is named. */
import { setTimeout as sleep } from 'node:timers/promises'
import { Redis } from 'ioredis'
import { afterAll, afterEach, beforeAll, describe, expect, onTestFinished, test } from 'vitest'
import { scanStreams } from '../cli/streams.js'
import type { Report } from '../cli/verify/report.js'
import { compareStores, readWindow } from '../cli/verify.js'
import { OperatorError, readConfig } from '../shared/config.js'
import type { CallEvent } from '../shared/events.js'
import { connectRedis, openPartitions } from '../shared/redis.js'
import { startSink } from '../sink/sink.js'
import { Calls, ended, newSid } from './support/calls.js'
import { calltape } from './support/program.js'
import { Relay } from './support/relay.js'
import { freshDatabase, log, ownRedis, until } from './support/stores.js'
import { entriesOf, groupOf, Producer, streamOf, turn } from './support/streams.js'

const ALL = { from: '-', to: '+' }
const verify = ({ stack }: Calls, callSid?: string, window = ALL, waitMs = 0): Promise<Report> =>
  compareStores(stack.config, callSid, window, waitMs)

/** Findings without the words. */
const found = ({ findings }: Report) => findings.map(({ detail: _, ...finding }) => finding)

/** By the cursor: with ids like those of foreign entries, Redis cannot always say how many are left. */
const settled = ({ stack }: Calls, sid: string) =>
  until(`${sid} is settled`, async () => {
    const [last] = await stack.redis.client.xrevrange(streamOf(stack.redis, sid), '+', '-', 'COUNT', 1)
    return (await groupOf(stack.redis, sid))?.['last-delivered-id'] === last?.[0]
  })

const started = (sid: string): CallEvent => ({ type: 'call.started', call_sid: sid, from: '+14155550100' })
const call = (sid: string, turns = 3): CallEvent[] => [
  started(sid),
  ...Array.from({ length: turns }, (_, seq) => turn(sid, seq)),
  ended(sid, turns),
]

const entryIdOf = async ({ stack }: Calls, sid: string, nth: number) => (await entriesOf(stack.redis, sid))[nth]![0]

describe('what_is_all_there', () => {
  let s: Calls
  beforeAll(async () => {
    s = await Calls.start()
  })
  afterAll(() => s.stack.end())

  test('is_clean_also_when_it_is_awkward', async () => {
    const sid = newSid()
    const { seq: _, ...keyless } = turn(sid, 0)
    const parsed = JSON.parse('{"__proto__":{"x":1},"n":[-0,1E400,9007199254740993]}') as Record<string, unknown>
    const meta = { n: [1e21, 1e-7, 1e308, 0.1, -0, 5e-324], 'k\0': '\ud800' }
    const awkward: CallEvent[] = [
      started(sid),
      turn(sid, 0, 'first'),
      turn(sid, 0, 'first again, with another text'),
      { ...turn(sid, 1), text: 'a\0b\ud800', language: 'x\udfff', speaker: '\0' },
      { ...turn(sid, 2), meta: parsed },
      { ...turn(sid, 3), meta, confidence: 1 / 3, ts: 0, started_at: 1, ended_at: 253_402_300_799_999 },
      { ...turn(sid, 4), confidence: 1e-45, interrupted: false, ts: 4_294_967_296_123 },
      { ...turn(sid, 5), id: 'x' },
      { type: 'call.status', call_sid: sid, id: 'x', status: 'ringing' },
      { type: 'call.status', call_sid: sid, id: 'x', status: 'completed' },
      { ...keyless, id: '6' },
      turn(sid, 6, 'the same key as a number'),
      keyless,
      keyless,
      { type: 'call.data', call_sid: sid, data: { 'k\0': ['\ud800', 1.0] }, objections: ['\0'] },
      ended(sid),
      turn(sid, 7, 'late'),
    ]
    await s.storeSettled(...awkward)
    await s.storeSettled(turn(sid, 1, 'again in another batch'), turn(sid, 8, 'later'))
    const report = await verify(s, sid)
    expect(found(report)).toEqual([])
    expect(report.counts).toMatchObject({ calls: 1, entries: 19, turns: 11, events: 4, duplicates: 4, quarantined: 0 })
  })

  test('is_clean_with_entries_of_somebody_else', async () => {
    const sid = newSid()
    const bad = [
      ['other', 'field'],
      ['e', '{'],
      ['e', '[]'],
      ['e', '{"type":"turn","speaker":"agent"}'],
      ['e', JSON.stringify(turn('of-another-call', 0))],
      ['e', Buffer.from([0x7b, 0xff, 0x7d])],
      [Buffer.from([0xff]), 'x'],
    ]
    await s.foreign(sid, [['e', '{"type":"turn","speaker":"bot","text":"not ours, but right"}']], '0-1')
    for (const [i, fields] of bad.entries()) await s.foreign(sid, [fields], `${i + 1}-18446744073709551615`)
    await s.foreign(sid, [['v', '1', 'e', JSON.stringify(turn(sid, 5))]], '18446744073709551615-1')
    await settled(s, sid)
    const report = await verify(s, sid)
    expect(found(report)).toEqual([])
    expect(report.counts).toMatchObject({ entries: 9, turns: 2, quarantined: 7 })
  })

  test('is_clean_with_a_stream_whose_name_PostgreSQL_cannot_hold', async () => {
    const sid = `${newSid()}\0`
    await s.foreign(sid, [['e', '{}']])
    await settled(s, sid)
    const report = await verify(s, sid)
    expect(found(report)).toEqual([])
    expect(report.counts).toMatchObject({ calls: 1, entries: 1, quarantined: 1 })
  })

  test('is_clean_while_the_call_goes_on_and_is_paged_however_long_it_is', async () => {
    const [live, long] = [newSid(), newSid()]
    const turns = Array.from({ length: 3500 }, (_, seq) => turn(long, seq))
    await s.storeSettled(started(live), turn(live, 0), ...turns, turn(long, 7), turn(long, 3499), ended(long, 3500))
    const report = await verify(s)
    expect(found(report)).toEqual([])
    expect((await verify(s, long)).counts).toMatchObject({ entries: 3503, turns: 3500, events: 1, duplicates: 2 })
    await s.query(`DELETE FROM call_transcript_turns WHERE call_sid = $1 AND seq IN (7, 2345)`, long)
    const missing = await verify(s, long)
    expect(missing.findings.map(({ kind, seq, entry_id: id }) => [kind, seq, id]).slice(0, 2)).toEqual([
      ['missing', 7, await entryIdOf(s, long, 7)],
      ['missing', 2345, await entryIdOf(s, long, 2345)],
    ])
    // The repeated turn 7 is in another page; what is left of the call does not fit its transcript any more.
    expect(missing.kinds).toMatchObject({ missing: 3, 'wrong transcript': 1, unexpected: 0, different: 0 })
    await s.query('DELETE FROM call_transcript_turns WHERE call_sid = $1', long)
    await s.query('DELETE FROM call_sessions WHERE call_sid = $1', long)
  })

  test('is_looked_at_once_also_when_SCAN_gives_its_key_twice', async () => {
    const key = streamOf(s.stack.redis, 'CA1')
    const scan = async (cursor: string) => (cursor === '0' ? ['1', [key, key]] : ['0', ['ct:{x}:call:y', key]])
    const pages: string[][] = []
    for await (const page of scanStreams({ scan } as unknown as Redis, 10))
      pages.push(page.map(({ callSid }) => callSid))
    expect(pages).toEqual([['CA1']])
  })

  test('no_streams_at_all_are_said_to_be_none', async () => {
    const empty = await Calls.start({}, 0)
    onTestFinished(() => empty.stack.end())
    expect((await verify(empty)).describe()).toMatch(/no entries/)
    await expect(verify(empty, 'nobody')).rejects.toThrow(OperatorError)
  })
})

describe('a_finding', () => {
  let s: Calls
  beforeAll(async () => {
    s = await Calls.start()
  })
  afterAll(() => s.stack.end())

  /** A call of its own, settled, and then spoiled. @returns what verify finds */
  async function spoiled(sql: string, events: (sid: string) => CallEvent[] = call) {
    const sid = newSid()
    await s.storeSettled(...events(sid))
    expect(found(await verify(s, sid))).toEqual([])
    await s.query(sql.replaceAll('$sid', `'${sid}'`))
    const report = await verify(s, sid)
    return { sid, report, findings: found(report).map(({ call_sid: _, ...finding }) => finding) }
  }
  const turns = 'call_transcript_turns'

  test('is_a_turn_that_is_missing_and_its_transcript', async () => {
    const { sid, findings, report } = await spoiled(`DELETE FROM ${turns} WHERE call_sid = $sid AND seq = 1`)
    expect(findings).toEqual([
      { kind: 'missing', table: turns, entry_id: await entryIdOf(s, sid, 2), key: '1', seq: 1 },
      { kind: 'wrong transcript', table: 'call_sessions', columns: ['turn_count', 'full_transcript'] },
    ])
    expect(report.counts.waiting).toBe(0)
    expect(report.describe()).toMatch(
      /missing: call call-\d+ entry \d+-\d+ \(turn 1\): call_transcript_turns: not there/,
    )
  })

  test('is_one_for_all_entries_of_a_turn_that_is_missing', async () => {
    const events = (sid: string) => [turn(sid, 0), turn(sid, 1), turn(sid, 1, 'again'), turn(sid, 1, 'and again')]
    const { sid, findings, report } = await spoiled(`DELETE FROM ${turns} WHERE call_sid = $sid AND seq = 1`, events)
    expect(findings).toMatchObject([{ kind: 'missing', entry_id: await entryIdOf(s, sid, 1), seq: 1 }])
    expect(report.counts).toMatchObject({ entries: 4, turns: 1, duplicates: 2 })
  })

  test.each([
    ['text', `text = 'changed'`, ['full_transcript']],
    ['speaker', `speaker = 'changed'`, ['full_transcript']],
    ['seq', 'seq = 77', ['full_transcript']],
    ['spoken_at', `spoken_at = spoken_at + interval '1 ms'`, ['full_transcript']],
    ['started_at', 'started_at = now()', []],
    ['ended_at', 'ended_at = now()', []],
    ['confidence', 'confidence = 0.1', []],
    ['language', `language = ''`, []],
    ['interrupted', 'interrupted = false', []],
    ['meta', `meta = '{}'`, []],
    ['ingested_at', `ingested_at = ingested_at - interval '1 ms'`, []],
  ])('is_a_turn_that_differs_in_%s', async (column, change, inSession) => {
    const { sid, findings } = await spoiled(`UPDATE ${turns} SET ${change} WHERE call_sid = $sid AND turn_id = '1'`)
    const entry = { table: turns, entry_id: await entryIdOf(s, sid, 2), key: '1', seq: 1 }
    const transcript = { kind: 'wrong transcript', table: 'call_sessions', columns: inSession }
    expect(findings).toEqual([
      { kind: 'different', ...entry, columns: [column] },
      ...(inSession.length > 0 ? [transcript] : []),
    ])
  })

  test('is_meta_that_differs_deep_down_and_not_in_its_spelling', async () => {
    const events = (sid: string): CallEvent[] => [{ ...turn(sid, 0), meta: { a: { b: [1, 2] }, c: 1e2 } }]
    const same = `UPDATE ${turns} SET meta = '{"c":100.0,"a":{"b":[1,2.00]}}' WHERE call_sid = $sid`
    expect((await spoiled(same, events)).findings).toEqual([])
    const other = `UPDATE ${turns} SET meta = '{"c":100.0,"a":{"b":[1,3]}}' WHERE call_sid = $sid`
    expect((await spoiled(other, events)).findings).toMatchObject([{ kind: 'different', columns: ['meta'] }])
  })

  test('is_a_turn_that_was_made_from_a_later_entry_than_its_first', async () => {
    const sid = newSid()
    for (const [id, text] of [
      ['100000-1', 'first'],
      ['200000-1', 'second'],
      ['300000-1', 'third'],
    ] as const) {
      await s.foreign(sid, [['e', JSON.stringify(turn(sid, 0, text))]], id)
    }
    await settled(s, sid)
    expect((await verify(s, sid)).counts).toMatchObject({ entries: 3, turns: 1, duplicates: 2 })
    const spoil = `UPDATE ${turns} SET stream_id = '200000-1', text = 'second', ingested_at = to_timestamp(200) WHERE call_sid = $1`
    await s.query(spoil, sid)
    const first = { kind: 'different', call_sid: sid, table: turns, entry_id: '100000-1', key: '0', seq: 0 }
    expect(found(await verify(s, sid))).toEqual([
      { ...first, columns: ['text', 'stream_id', 'ingested_at'] },
      { ...first, entry_id: '200000-1', columns: ['spoken_at'] },
    ])
  })

  test('is_an_event_that_is_missing_or_differs', async () => {
    const missing = await spoiled(`DELETE FROM call_events WHERE call_sid = $sid AND type = 'call.started'`)
    expect(missing.findings).toMatchObject([{ kind: 'missing', table: 'call_events', entry_id: expect.any(String) }])
    const other = await spoiled(
      `UPDATE call_events SET event = event || '{"from":"+1"}', occurred_at = now() WHERE call_sid = $sid AND type = 'call.started'`,
    )
    expect(other.findings).toMatchObject([
      { kind: 'different', table: 'call_events', columns: ['occurred_at', 'event'] },
    ])
  })

  test('is_a_call_that_is_not_finalized_although_it_has_ended', async () => {
    const { findings } = await spoiled('UPDATE call_sessions SET finalized_at = NULL WHERE call_sid = $sid')
    expect(findings).toEqual([{ kind: 'not finalized', table: 'call_sessions' }])
  })

  test('is_a_call_that_was_presumed_over_unless_it_went_on', async () => {
    const presumed = (sid: string): CallEvent =>
      ({ ...ended(sid), source: 'calltape', reason: 'abandoned' }) as CallEvent
    const unfinalize = 'UPDATE call_sessions SET finalized_at = NULL WHERE call_sid = $sid'
    const over = await spoiled(unfinalize, (sid) => [turn(sid, 0), presumed(sid)])
    expect(over.findings).toEqual([{ kind: 'not finalized', table: 'call_sessions' }])
    const live = await spoiled('SELECT', (sid) => [turn(sid, 0), presumed(sid), turn(sid, 1)])
    expect(await s.session(live.sid)).toMatchObject({ finalized_at: null })
    const again = await spoiled(unfinalize, (sid) => [turn(sid, 0), presumed(sid), turn(sid, 0)])
    expect(again.findings, 'a duplicate is no news').toHaveLength(1)
    const late = await spoiled(unfinalize, (sid) => [turn(sid, 0), ended(sid), turn(sid, 1)])
    expect(late.findings).toHaveLength(1)
  })

  test('is_a_call_without_its_row', async () => {
    const { findings } = await spoiled('DELETE FROM call_sessions WHERE call_sid = $sid', (sid) => [turn(sid, 0)])
    expect(findings).toEqual([{ kind: 'missing', table: 'call_sessions' }])
  })

  test.each([
    ['turn_count', 'turn_count = 4', ['turn_count']],
    ['another_length', `full_transcript = full_transcript - 0`, ['full_transcript']],
    [
      'another_text',
      `full_transcript = jsonb_set(full_transcript, '{1,text}', '"said otherwise"')`,
      ['full_transcript'],
    ],
    ['one_turn_twice', `full_transcript = jsonb_set(full_transcript, '{1}', full_transcript->0)`, ['full_transcript']],
    ['no_array', `full_transcript = '{}'`, ['full_transcript']],
    ['nothing', 'full_transcript = NULL', ['full_transcript']],
  ])('is_a_transcript_that_does_not_fit_%s', async (_name, change, columns) => {
    const { findings } = await spoiled(`UPDATE call_sessions SET ${change} WHERE call_sid = $sid`)
    expect(findings).toEqual([{ kind: 'wrong transcript', table: 'call_sessions', columns }])
  })

  test('is_an_unreadable_entry_that_is_not_in_quarantine', async () => {
    const sid = newSid()
    const [id] = await s.foreign(sid, [['e', '{']])
    await settled(s, sid)
    expect((await verify(s, sid)).counts).toMatchObject({ entries: 1, quarantined: 1 })
    await s.query('DELETE FROM quarantined_events WHERE stream_key = $1', streamOf(s.stack.redis, sid))
    expect(found(await verify(s, sid))).toEqual([
      { kind: 'missing', call_sid: sid, table: 'quarantined_events', entry_id: id, key: id },
    ])
  })

  const stray = (streamId: string, key = 'stray') =>
    `INSERT INTO ${turns} SELECT call_sid, '${key}', seq, speaker, text, spoken_at, started_at, ended_at, confidence, language,
       interrupted, meta, ${streamId}, ingested_at FROM ${turns} WHERE call_sid = $sid AND seq = 1`

  test.each([
    ['an_entry_that_is_not_there', `split_part(stream_id, '-', 1) || '-99999999'`],
    ['the_entry_of_another_turn', 'stream_id'],
    ['no_entry_at_all', `'made up'`],
  ])('is_a_row_too_many_that_names_%s', async (_name, streamId) => {
    const { findings } = await spoiled(stray(streamId), (sid) => call(sid).slice(0, -1))
    expect(findings).toMatchObject([{ kind: 'unexpected', table: turns, key: 'stray', entry_id: expect.any(String) }])
    const event = await spoiled(
      `INSERT INTO call_events SELECT call_sid, 'stray', type, occurred_at, event, ${streamId}, ingested_at
       FROM call_events WHERE call_sid = $sid AND type = 'call.started'`,
    )
    expect(event.findings).toMatchObject([{ kind: 'unexpected', table: 'call_events', key: 'stray' }])
  })

  test('is_not_a_row_whose_entry_was_trimmed_away_or_that_is_older_than_its_stream', async () => {
    const sid = newSid()
    await s.storeSettled(...call(sid, 9))
    await s.stack.redis.client.xtrim(streamOf(s.stack.redis, sid), 'MAXLEN', 4)
    const trimmed = await verify(s, sid)
    expect(found(trimmed)).toEqual([])
    expect(trimmed.counts).toMatchObject({ entries: 4, turns: 3, events: 1, rows_without_entry: 7 })
    const other = newSid()
    await s.storeSettled(...call(other))
    await s.stack.redis.client.xdel(streamOf(s.stack.redis, other), await entryIdOf(s, other, 2))
    const holed = await verify(s, other)
    expect(found(holed)).toEqual([])
    expect(holed.counts).toMatchObject({ entries: 4, turns: 2, rows_without_entry: 1 })
    await s.stack.redis.client.del(streamOf(s.stack.redis, sid)) // as after FLUSHALL: the next stream of the call is whole from its beginning
    await s.storeSettled(turn(sid, 9))
    const anew = await verify(s, sid)
    expect(found(anew)).toEqual([])
    expect(anew.counts).toMatchObject({ entries: 1, turns: 1, rows_without_entry: 11 })
  })

  test('counts_beyond_what_is_shown', async () => {
    const sid = newSid()
    await s.storeSettled(...Array.from({ length: 50 }, (_, seq) => turn(sid, seq, `secret ${seq}`)))
    await s.query(`UPDATE ${turns} SET text = text || '!' WHERE call_sid = $1`, sid)
    const report = await verify(s, sid)
    expect(report.wrong).toBe(50)
    const text = report.describe()
    expect(text).toMatch(/^ {2}calls +1\n {2}entries +\d+\n/)
    expect(text.match(/^ {2}different: call/gm)).toHaveLength(20)
    expect(text).toMatch(/… and 30 more/)
    expect(text + JSON.stringify(report)).not.toContain('secret')
  })

  test('is_a_stream_whose_name_no_sink_can_read', async () => {
    const key = Buffer.concat([Buffer.from('ct:{1}:call:'), Buffer.from([0xff])])
    await s.stack.redis.client.xadd(key, '*', 'e', '{}')
    onTestFinished(async () => void (await s.stack.redis.client.del(key)))
    const { findings } = await verify(s)
    expect(findings.find(({ call_sid: sid }) => sid === '\uFFFD')).toMatchObject({
      kind: 'missing',
      detail: expect.stringMatching(/not UTF-8/),
    })
  })

  test('is_looked_for_within_the_window_only', async () => {
    const sid = newSid()
    await s.storeSettled(...call(sid, 5))
    const ids = (await entriesOf(s.stack.redis, sid)).map(([id]) => id)
    await s.query(`DELETE FROM ${turns} WHERE call_sid = $1 AND seq IN (0, 4)`, sid)
    const missing = async (from: string, to: string) => {
      const { findings, counts } = await verify(s, sid, readWindow({ from, to }))
      return [findings.flatMap(({ kind, seq }) => (kind === 'missing' ? [seq] : [])), counts.entries]
    }
    expect(await missing(ids[0]!, ids.at(-1)!)).toEqual([[0, 4], 7])
    expect(await missing(ids[2]!, ids[4]!)).toEqual([[], 3])
    expect(await missing(ids[2]!, ids[5]!)).toEqual([[4], 4])
    const ms = Number.parseInt(ids[0]!, 10)
    expect(await missing(`${ms}`, new Date(ms + 60_000).toISOString())).toEqual([[0, 4], 7])
    expect(await missing('0', `${ms - 1}`)).toEqual([[], 0])
  })
})

describe('the_window', () => {
  test('is_given_as_epoch_ms_as_entry_id_or_as_time', () => {
    expect(readWindow({})).toEqual({ from: '-', to: '+' })
    expect(readWindow({ from: '1767268800000', to: '1767268800000' })).toEqual({
      from: '1767268800000-0',
      to: '1767268800000-18446744073709551615',
    })
    expect(readWindow({ from: '2026-01-01T12:00:00Z', to: '5000000000000-7' })).toEqual({
      from: '1767268800000-0',
      to: '5000000000000-7',
    })
  })

  test.each(['yesterday', '2026-01-01', '2026-01-01T12:00:00', '-5', '1-2-3', '', '1e3', '01-1'])(
    'refuses_%j_and_says_what_it_wants',
    (text) => {
      expect(() => readWindow({ from: text })).toThrow(/^--from wants epoch milliseconds.*entry.*RFC 3339/)
      expect(() => readWindow({ to: text })).toThrow(OperatorError)
    },
  )

  test('does_not_end_before_it_begins', () => {
    expect(() => readWindow({ from: '6', to: '5' })).toThrow('--from 6 is later than --to 5')
  })
})

describe('what_is_not_committed_yet', () => {
  let s: Calls
  beforeAll(async () => {
    s = await Calls.start({}, 0)
    await s.producer.store(...['a', 'b', 'c'].flatMap((sid) => call(sid)))
  })
  afterAll(() => s.stack.end())

  const isAsked = async (about: string) => {
    const ours = `datname = current_database() AND application_name = 'calltape-verify'`
    return (await s.query(`SELECT FROM pg_stat_activity WHERE ${ours} AND query LIKE $1`, about)).length > 0
  }
  /** A verification that runs has looked at the streams, and compares what it has found there. */
  const hasBegun = () => until('it has begun', () => isAsked('%FROM quarantined_events%'))
  afterEach(() => until('its connections are closed', async () => !(await isAsked('%'))))

  test('is_missing_when_nobody_commits_it', async () => {
    const report = await verify(s, undefined, ALL, 300)
    expect(report.counts).toMatchObject({ calls: 3, entries: 15, waiting: 15, turns: 0 })
    expect(report.kinds).toMatchObject({ missing: 15, 'not finalized': 0 })
    expect(report.findings[0]!.detail).toBe('not committed yet')
    expect(report.describe()).toMatch(/is a sink running/)
  })

  test('is_waited_for_and_what_comes_meanwhile_does_not_matter', async () => {
    const report = verify(s, undefined, ALL, 30_000)
    await hasBegun()
    await s.producer.store(turn('a', 3))
    await s.start()
    const { counts, wrong } = await report
    expect(wrong).toBe(0)
    expect(counts).toMatchObject({ calls: 3, entries: 15, turns: 9, events: 6 })
  })

  test('is_waited_for_as_long_as_the_sink_goes_on', async () => {
    await s.storeSettled(...call('d'))
    await s.stop()
    const setCursor = (id: string) => s.stack.redis.client.xgroup('SETID', streamOf(s.stack.redis, 'd'), 'sink', id)
    await s.query(`CREATE TABLE aside AS SELECT * FROM call_transcript_turns WHERE call_sid = 'd'`)
    await s.query(`DELETE FROM call_transcript_turns WHERE call_sid = 'd'`)
    await setCursor(await entryIdOf(s, 'd', 0))
    const report = verify(s, 'd', ALL, 30_000)
    for (const seq of [0, 1, 2]) {
      await sleep(400) // more than one look
      await s.query('INSERT INTO call_transcript_turns SELECT * FROM aside WHERE seq = $1', seq)
      await setCursor(await entryIdOf(s, 'd', seq + 1))
    }
    await setCursor(await entryIdOf(s, 'd', 4))
    expect(found(await report)).toEqual([])
  })

  test('is_not_called_missing_when_a_store_goes_away_meanwhile', async () => {
    const relay = await Relay.start(s.stack.redis.url)
    await s.producer.store(turn('e', 0))
    const report = compareStores({ ...s.stack.config, REDIS_URL: relay.url }, 'e', ALL, 30_000)
    const [outcome] = await Promise.all([report.catch((error: Error) => error), hasBegun().then(() => relay.stop())])
    expect(outcome).toBeInstanceOf(OperatorError)
    expect((outcome as Error).message).toMatch(/^could not compare to the end: /)
  })

  test('is_not_waited_for_when_the_sink_is_past_it', async () => {
    await s.start()
    for (const sid of ['a', 'b', 'c']) await settled(s, sid)
    await s.query(`DELETE FROM call_transcript_turns WHERE call_sid = 'b'`)
    const started = performance.now()
    const report = await verify(s, undefined, ALL, 3_600_000)
    expect(performance.now() - started).toBeLessThan(20_000)
    expect(report.kinds.missing).toBe(3)
    expect(report.counts.waiting).toBe(0)
  })
})

test('a_cluster_is_looked_through_as_well', async () => {
  const server = await ownRedis('cluster')
  const node = new Redis(server.url)
  await node.call('CLUSTER', 'ADDSLOTSRANGE', '0', '16383')
  await until('the cluster is up', async () => String(await node.call('CLUSTER', 'INFO')).includes('cluster_state:ok'))
  node.disconnect()
  const database = await freshDatabase()
  const REDIS_URL = `${server.url},${server.url}`
  const config = readConfig({ REDIS_URL, DATABASE_URL: database.url, SINK_METRICS_PORT: '0' })
  const client = await connectRedis(REDIS_URL, log)
  const store = { client, partitions: await openPartitions(client, config.PARTITIONS) }
  const sink = await startSink(config, log)
  onTestFinished(async () => {
    await sink.stop()
    client.disconnect()
    await database.drop()
    await server.stop()
  })
  const sids = Array.from({ length: 120 }, (_, i) => `CA${i}`)
  await new Producer(store).store(...sids.flatMap((sid) => call(sid)))
  const report = await compareStores(config, undefined, ALL, 20_000)
  expect(found(report)).toEqual([])
  expect(report.counts).toMatchObject({ calls: 120, entries: 600, turns: 360, events: 240 })
  await database.pool.query(`DELETE FROM call_transcript_turns WHERE call_sid = 'CA77'`)
  expect((await compareStores(config, undefined, ALL, 0)).kinds.missing).toBe(3)
})

describe('the_command', () => {
  let s: Calls
  beforeAll(async () => {
    s = await Calls.start()
    await s.storeSettled(...call('CA1'), ...call('CA2'))
  })
  afterAll(() => s.stack.end())

  function run(args: string[], environment: Record<string, string> = {}) {
    const { REDIS_URL, DATABASE_URL } = s.stack.config
    return calltape(['verify', ...args], { REDIS_URL, DATABASE_URL, ...environment })
  }

  test('exits_with_0_when_all_is_there_and_with_1_when_not', async () => {
    const clean = await run([])
    expect(clean).toMatchObject({ code: 0, out: expect.stringMatching(/calls +2\n[\s\S]*Everything is there\.\n$/) })
    expect(JSON.parse((await run(['--json'])).out)).toMatchObject({ clean: true, calls: 2, entries: 10, findings: [] })
    await s.query(`UPDATE call_transcript_turns SET text = 'x' WHERE call_sid = 'CA2' AND seq = 0`)
    const spoiled = await run(['--json'])
    expect(spoiled.code).toBe(1)
    expect(JSON.parse(spoiled.out)).toMatchObject({ clean: false, different: 1, wrong_transcript: 1 })
    expect((await run(['--call', 'CA2'])).code).toBe(1)
    expect((await run(['--call', 'CA1'])).code).toBe(0)
  })

  test('exits_with_2_when_it_could_not_compare', async () => {
    const attempts = await Promise.all([
      run(['--from', 'yesterday']),
      run(['--wait', '-1']),
      run(['--call', 'nobody']),
      run(['--no-such-option']),
      run([], { DATABASE_URL: 'postgres://127.0.0.1:1/x' }),
      run([], { REDIS_URL: 'redis://127.0.0.1:1' }),
    ])
    expect(attempts.map(({ code }) => code)).toEqual([2, 2, 2, 2, 2, 2])
    const says = [
      /--from wants/,
      /--wait wants/,
      /no stream of call nobody/,
      /unknown option/,
      /DATABASE_URL/,
      /REDIS_URL/,
    ]
    for (const [i, { err }] of attempts.entries()) expect(err).toMatch(says[i]!)
  })
})
