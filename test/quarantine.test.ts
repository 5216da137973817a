/** `calltape quarantine`: what could not be stored is seen, stored once its cause is mended, or given up; nothing else changes. */
import { afterAll, beforeAll, beforeEach, describe, expect, test, vi } from 'vitest'
import * as commands from '../cli/quarantine.js'
import {
  type Choice,
  dropQuarantined,
  findQuarantined,
  listQuarantine,
  RETRY_SETTINGS,
  type Retried,
  readFields,
  retryQuarantined,
} from '../cli/quarantined-entries.js'
import { compareStores } from '../cli/verify.js'
import { OperatorError } from '../shared/config.js'
import { createPool, type Pool } from '../shared/postgres.js'
import { Calls, ended, newSid, type Row } from './support/calls.js'
import { calltape } from './support/program.js'
import { streamOf, turn } from './support/streams.js'

let calls: Calls
let retryPool: Pool
beforeAll(async () => {
  calls = await Calls.start()
  retryPool = createPool(calls.stack.database.config, 'test-retry', 2, undefined, RETRY_SETTINGS)
})
afterAll(async () => {
  await retryPool.end()
  await calls.stack.end()
})

let sid: string
/** A rule of the database's owner that refuses some texts. Dropping it is the mending. */
const RULE = `ALTER TABLE call_transcript_turns ADD CONSTRAINT rule CHECK (text NOT LIKE 'bad%')`
const mend = () => calls.query('ALTER TABLE call_transcript_turns DROP CONSTRAINT IF EXISTS rule')
beforeEach(async () => {
  sid = newSid()
  await mend()
  await calls.query('DELETE FROM quarantined_events')
  await calls.query(`${RULE} NOT VALID`)
})

/** An entry by the hand of somebody else. */
async function foreign(...fields: (string | Buffer)[]): Promise<void> {
  await calls.foreign(sid, [fields])
  await calls.settled(sid)
}

const listed = async (choice: Choice = { callSid: sid }) =>
  (await listQuarantine(calls.stack.database.pool, choice, 1000)).entries
const idsOf = async (choice?: Choice) => (await listed(choice)).map((entry) => entry.id).toReversed()
const textsOf = async (callSid = sid) =>
  (await calls.query('SELECT text FROM call_transcript_turns WHERE call_sid = $1 ORDER BY seq', callSid)).map(
    (r) => r.text,
  )
const session = async () => (await calls.session(sid))!

async function retry(choice: Choice): Promise<{ retried: Retried[]; finalized: string[] }> {
  const [retried, finalized]: [Retried[], string[]] = [[], []]
  await retryQuarantined(retryPool, choice, {
    entry: (each) => retried.push(each),
    finalized: async ({ callSid }) => {
      finalized.push(callSid)
    },
  })
  return { retried, finalized }
}
const reasons = ({ retried }: { retried: Retried[] }) => retried.map(({ reason }) => reason)

const verify = async (callSid = sid) => await compareStores(calls.stack.config, callSid, { from: '-', to: '+' }, 0)

describe('retry', () => {
  test('stores_it_as_if_it_had_been_stored_at_once', async () => {
    const { seq: _, ...keyless } = turn(sid, 0, 'bad, keyless')
    await calls.storeSettled(turn(sid, 0), turn(sid, 1, 'bad'), keyless, { ...turn(sid, 2), ts: 1000 }, ended(sid, 4))
    expect(await session()).toMatchObject({ turn_count: 2, complete: false })
    await mend()
    expect(reasons(await retry({ callSid: sid }))).toEqual([undefined, undefined])
    expect(await textsOf()).toEqual(['turn 0', 'bad', 'turn 2', 'bad, keyless'])
    const { turn_count, complete, full_transcript: transcript, finalized_at: finalized } = await session()
    expect({ turn_count, complete, finalized }).toEqual({ turn_count: 4, complete: true, finalized: expect.any(Date) })
    expect((transcript as Row[]).map(({ text }) => text)).toContain('bad, keyless')
    expect(await listed()).toEqual([])
    const report = await verify() // ids and times are those of the entries
    expect(report.findings).toEqual([])
    expect(report.counts).toMatchObject({ turns: 4, quarantined: 0 })
  })

  test('of_what_is_still_bad_keeps_it_with_its_new_reason_and_stores_the_others', async () => {
    const texts = ['bad 0', 'bad 1', 'bad 2', 'bad 3', 'bad 4', 'bad 5', 'bad 6']
    await calls.storeSettled(...texts.map((text, seq) => turn(sid, seq, text)))
    const other = newSid()
    await calls.storeSettled(turn(other, 0, 'bad 0'))
    await mend()
    await calls.query(
      `ALTER TABLE call_transcript_turns ADD CONSTRAINT rule CHECK (text NOT IN ('bad 2', 'bad 6')) NOT VALID`,
    )
    const { retried } = await retry({ all: true })
    expect(retried.filter(({ reason }) => reason === undefined)).toHaveLength(6)
    expect(await textsOf()).toEqual(texts.filter((text) => !['bad 2', 'bad 6'].includes(text)))
    expect(await textsOf(other)).toEqual(['bad 0'])
    const stay = await listed()
    expect(stay).toHaveLength(2)
    for (const { reason } of stay) expect(reason).toMatch(/^not_storable: .*violates check constraint "rule"/)
    expect((await verify()).counts).toMatchObject({ turns: 5, quarantined: 2 })
    expect((await verify()).wrong).toBe(0)
  })

  test('of_what_cannot_be_read_keeps_it_and_says_why', async () => {
    await foreign('e', '{')
    await foreign('other', 'field')
    await calls.query(`UPDATE quarantined_events SET reason = 'old'`)
    expect(reasons(await retry({ callSid: sid }))).toEqual([
      expect.stringMatching(/^invalid_json/),
      expect.stringMatching(/^missing_field/),
    ])
    expect((await listed()).map(({ reason }) => reason)).not.toContain('old')
    await calls.query(`UPDATE quarantined_events SET raw = 'not JSON' WHERE reason LIKE 'invalid_json%'`)
    expect(reasons(await retry({ callSid: sid }))[0]).toMatch(/^unreadable_raw/)
    expect((await verify()).counts).toMatchObject({ entries: 2, quarantined: 2 })
  })

  test('of_two_with_the_same_key_stores_the_first_one', async () => {
    await calls.storeSettled(turn(sid, 0, 'bad first'), turn(sid, 0, 'bad second'))
    const [first] = await idsOf()
    await calls.query('UPDATE quarantined_events SET id = DEFAULT WHERE id = $1', first) // now the higher one
    expect(await idsOf()).not.toContain(first)
    await mend()
    expect(reasons(await retry({ callSid: sid }))).toEqual([undefined, undefined])
    expect(await textsOf()).toEqual(['bad first'])
    expect((await verify()).findings).toEqual([])
  })

  test('of_a_turn_whose_place_a_later_entry_has_taken_keeps_it_and_says_so', async () => {
    await calls.storeSettled(turn(sid, 1), turn(sid, 0, 'bad first'), turn(sid, 0, 'second'))
    expect((await verify()).findings).toEqual([])
    await mend()
    expect(reasons(await retry({ callSid: sid }))).toEqual([
      expect.stringMatching(/^duplicate: turn 0 .* drop this one$/),
    ])
    expect(await textsOf()).toEqual(['second', 'turn 1'])
    expect((await verify()).findings).toEqual([])
    await dropQuarantined(calls.stack.database.pool, { callSid: sid })
    expect((await verify()).counts).toMatchObject({ turns: 2, dropped: 1 })
  })

  test('of_an_end_finalizes_the_call_and_what_comes_later_is_worked_in', async () => {
    const rule = `ALTER TABLE call_events ADD CONSTRAINT rule CHECK (type <> 'call.ended') NOT VALID`
    await calls.query(rule)
    await calls.storeSettled(turn(sid, 0), ended(sid, 2))
    await calls.query('ALTER TABLE call_events DROP CONSTRAINT rule')
    expect((await session()).finalized_at).toBe(null)
    const done = await printed((options) => commands.retry([], { ...options, call: sid }))
    expect(done).toMatch(/^stored .*\n\n1 stored, 0 still in quarantine$/)
    expect(await session()).toMatchObject({ finalized_at: expect.any(Date), turn_count: 1, complete: false })
    await calls.storeSettled(turn(sid, 1, 'late'))
    expect(await session()).toMatchObject({ turn_count: 2, complete: true })
    expect((await verify()).findings).toEqual([])
  })

  test('of_many_goes_page_by_page', async () => {
    await calls.storeSettled(turn(sid, 0), ended(sid, 1101))
    const key = streamOf(calls.stack.redis, sid)
    await calls.query(
      `INSERT INTO quarantined_events (stream_key, entry_id, reason, raw)
       SELECT $1, n || '-0', 'r', convert_to(jsonb_build_array('e', jsonb_build_object(
         'type', 'turn', 'call_sid', $2::text, 'seq', n, 'speaker', 'agent', 'text', 'turn ' || n)::text)::text, 'UTF8')
       FROM generate_series(1, 1100) n`,
      key,
      sid,
    )
    expect((await retry({ callSid: sid })).retried).toHaveLength(1100)
    expect(await textsOf()).toHaveLength(1101)
    expect(await listed()).toEqual([])
    expect(await session()).toMatchObject({ turn_count: 1101, complete: true })
  })

  test('of_an_unknown_or_dropped_id_changes_nothing', async () => {
    await calls.storeSettled(turn(sid, 0, 'bad'), turn(sid, 1, 'bad'))
    await mend()
    const [first, second] = await idsOf()
    await dropQuarantined(calls.stack.database.pool, { ids: [second!] })
    for (const [ids, says] of [
      [[first!, '999999999'], /no.*999999999/],
      [[first!, second!], new RegExp(`dropped.*${second}`)],
    ] as const) {
      const error = await retry({ ids: [...ids] }).catch((reason: Error) => reason)
      expect(error).toBeInstanceOf(OperatorError)
      expect((error as Error).message).toMatch(says)
    }
    expect(await textsOf()).toEqual([])
    expect(reasons(await retry({ ids: [first!] }))).toEqual([undefined])
  })
})

describe('drop', () => {
  test('takes_the_data_and_keeps_that_it_was_there', async () => {
    await calls.storeSettled(turn(sid, 0), turn(sid, 1, 'bad secret'), turn(sid, 2, 'bad secret'))
    const [first, second] = await idsOf()
    expect(await dropQuarantined(calls.stack.database.pool, { ids: [first!] })).toBe(1)
    expect(await dropQuarantined(calls.stack.database.pool, { ids: [first!] })).toBe(0)
    expect(await idsOf()).toEqual([second])
    const [kept] = await findQuarantined(calls.stack.database.pool, [first!])
    expect(kept).toMatchObject({ reason: expect.stringMatching(/^not_storable/), droppedAt: expect.any(Date) })
    expect(kept!.raw).toHaveLength(0)
    const report = await verify()
    expect(report.findings).toEqual([])
    expect(report.counts).toMatchObject({ entries: 3, turns: 1, quarantined: 1, dropped: 1 })
    expect((await retry({ callSid: sid })).retried.map(({ id }) => id)).toEqual([second])
  })
})

test('what_is_not_UTF_8_is_read_back_byte_for_byte', () => {
  const bytes = Buffer.from([0xff, 0x00, 0x7b])
  const raw = JSON.stringify(['e', { base64: bytes.toString('base64') }, 'x', ''])
  expect(readFields(Buffer.from(raw))).toEqual(['e', bytes, 'x', ''])
  for (const other of ['', '{}', '"e"', '[1]', '[null]', '[{"base64":1}]', '["e"']) {
    expect(readFields(Buffer.from(other)), other).toBe(undefined)
  }
})

/** As a process. */
const run = (...args: string[]) => {
  const { REDIS_URL, DATABASE_URL } = calls.stack.config
  return calltape(['quarantine', ...args], { REDIS_URL, DATABASE_URL })
}

/** A command in this process, which is much faster. @returns what it prints */
async function printed(command: (options: { data: string }) => Promise<void>): Promise<string> {
  vi.stubEnv('REDIS_URL', calls.stack.redis.url)
  vi.stubEnv('DATABASE_URL', calls.stack.database.url)
  const lines: string[] = []
  const log = vi.spyOn(console, 'log').mockImplementation((line: string) => void lines.push(line))
  try {
    await command({ data: 'unused' })
  } finally {
    log.mockRestore()
    vi.unstubAllEnvs()
  }
  return lines.join('\n')
}

describe('the_command', () => {
  test('lists_shows_retries_and_drops', async () => {
    const listed = (more: { call?: string; json?: true }, limit = 50) =>
      printed((options) => commands.list({ ...options, ...more, limit }))
    const shown = (id: string, json = false) => printed((options) => commands.show(id, { ...options, json }))
    expect(await listed({})).toBe('Nothing is in quarantine.')
    await calls.storeSettled(turn(sid, 0, 'bad "one"'), turn(sid, 1, 'bad two'))
    await foreign('e', '{', 'v', Buffer.from([0xff]))
    const [one, two, three] = (await idsOf()) as [string, string, string]

    const list = await listed({ call: sid }, 2)
    expect(list).toMatch(new RegExp(`${three} .*${sid} .*invalid_json`))
    expect(list).not.toMatch(new RegExp(`^ *${one} `, 'm'))
    expect(list).toMatch(/3 in quarantine, the newest 2 shown[\s\S]*quarantine show ID[\s\S]*retry ID[\s\S]*drop ID/)
    const json = JSON.parse(await listed({ json: true })) as { total: number; entries: Row[] }
    expect(json).toMatchObject({ total: 3, entries: [{ id: three, call_sid: sid }, { id: two }, { id: one }] })

    const text = await shown(one)
    expect(text).toMatch(new RegExp(`call +${sid}`))
    expect(text).toMatch(/reason +not_storable: .*rule/)
    expect(text).toContain('  e = {\n    "type": "turn",')
    expect(text).toContain('"text": "bad \\"one\\""')
    expect(await shown(three)).toMatch(/ {2}e = "\{"\n {2}v = 1 bytes, not UTF-8: "ÿ"/)
    const { fields } = JSON.parse(await shown(one, true)) as { fields: string[] }
    expect(JSON.parse(fields[1]!)).toMatchObject({ text: 'bad "one"' })
    expect(JSON.parse(await shown(three, true))).toMatchObject({ fields: ['e', '{', 'v', { base64: '/w==' }] })

    const bad = await run('retry', '--all')
    expect(bad).toMatchObject({
      code: 1,
      out: expect.stringMatching(/still bad .*\n\n0 stored, 3 still in quarantine\n$/),
    })
    await mend()
    const good = await run('retry', one, two)
    expect(good).toMatchObject({ code: 0, out: expect.stringMatching(/2 stored, 0 still in quarantine\n$/) })
    expect(await textsOf()).toEqual(['bad "one"', 'bad two'])

    expect(await run('drop', '--all')).toMatchObject({ code: 2, err: expect.stringMatching(/--yes/) })
    expect(await run('drop', '--all', '--yes')).toMatchObject({ code: 0, out: expect.stringMatching(/^1 dropped/) })
    expect((await run('list')).out).toBe('Nothing is in quarantine.\n')
    expect(await shown(three)).toMatch(/dropped +\d{4}-.*its data is gone/)
    expect((await verify()).counts).toMatchObject({ turns: 2, quarantined: 0, dropped: 1 })
    expect((await verify()).wrong).toBe(0)
  })

  test('says_what_it_wants', async () => {
    const attempts: [(options: { data: string }) => Promise<void>, RegExp][] = [
      [(options) => commands.retry([], options), /say which/],
      [(options) => commands.retry(['1'], { ...options, all: true }), /say which/],
      [(options) => commands.drop([], { ...options, call: sid, all: true, yes: true }), /say which/],
      [(options) => commands.retry(['x'], options), /an id is a whole number.*got x/],
      [(options) => commands.show('0', options), /an id is a whole number/],
      [(options) => commands.show('9223372036854775808', options), /an id is a whole number/],
      [
        (options) => commands.show('9223372036854775807', options),
        /nothing in quarantine has the id 9223372036854775807/,
      ],
      [(options) => commands.drop(['424242'], options), /nothing in quarantine has the id 424242/],
    ]
    for (const [attempt, says] of attempts) {
      const error = await printed(attempt).catch((reason: Error) => reason)
      expect(error).toBeInstanceOf(OperatorError)
      expect((error as Error).message).toMatch(says)
    }
    const [bare, limit] = await Promise.all([run(), run('list', '--limit', '0')])
    expect(bare).toMatchObject({ code: 2, err: expect.stringMatching(/Usage: calltape quarantine/) })
    expect(limit).toMatchObject({ code: 2, err: expect.stringMatching(/--limit wants/) })
  })
})
