/** `calltape rescue`: what a legacy bot keeps in Redis, once, with everything that may be wrong with it. */
import type { Redis } from 'ioredis'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { readConfig } from '../shared/config.js'
import { connectRedis } from '../shared/redis.js'
import { type Sink, startSink } from '../sink/sink.js'
import { botDatabase, SCHEMA } from './support/bot-database.js'
import { LegacyBot, RescueProcess, type Said, said, session, sessionKey, utcNow } from './support/legacy-bot.js'
import { calltape } from './support/program.js'
import { type Database, freshDatabase, freshRedis, log, type RedisDatabase, until } from './support/stores.js'
import { entriesOf, eventsOf } from './support/streams.js'

const DAY_MS = 24 * 3600 * 1000

let redis: RedisDatabase
let database: Database
let environment: Record<string, string>
let sink: Sink
beforeAll(async () => {
  ;[redis, database] = await Promise.all([freshRedis(), botDatabase()])
  environment = {
    REDIS_URL: redis.url,
    DATABASE_URL: database.url,
    DATABASE_SCHEMA: SCHEMA,
    LEGACY_CALL_SESSIONS: 'public.call_sessions',
    SINK_METRICS_PORT: '0',
  }
  sink = await startSink(readConfig(environment), log)
})
afterAll(async () => {
  await sink.stop()
  await Promise.all([redis.drop(), database.drop()])
})

let names = 0
const newSid = () => `CA-legacy-${names++}`
const rescue = (...args: string[]) => new RescueProcess(args, environment).end()
/** Only sessions of one test. */
const keysOf = (sid: string) => ['--match', `session:${sid}*`]
const put = (sid: string, value: unknown) =>
  redis.client.set(sessionKey(sid), typeof value === 'string' ? value : JSON.stringify(value), 'EX', 3600)

interface StoredTurn {
  call_sid: string
  speaker: string
  text: string
  ms: number
}

const SPEAKER: Record<string, string> = { ai: 'agent', agent: 'agent', user: 'customer', customer: 'customer' }
const asStored = (callSid: string, turns: Said[]): StoredTurn[] =>
  turns.map(({ speaker, text, timestamp }) => ({
    call_sid: callSid,
    speaker: SPEAKER[speaker]!,
    text,
    ms: Date.parse(`${timestamp}Z`),
  }))

/** In the order in which they came into the streams. */
async function storedTurns(like: string): Promise<StoredTurn[]> {
  const { rows } = await database.pool.query<StoredTurn>(
    `SELECT call_sid, speaker, text, (extract(epoch FROM spoken_at) * 1000)::float8 AS ms FROM call_transcript_turns
     WHERE call_sid LIKE $1 ORDER BY call_sid, spoken_at, split_part(stream_id, '-', 1)::numeric, split_part(stream_id, '-', 2)::numeric`,
    [like],
  )
  return rows
}

async function storedCall(sid: string): Promise<Record<string, unknown> | undefined> {
  return (await database.pool.query('SELECT * FROM call_sessions WHERE call_sid = $1', [sid])).rows[0]
}

const byCall = <T extends { call_sid: string }>(rows: T[]) =>
  rows.reduce(
    (calls, row) => calls.set(row.call_sid, [...(calls.get(row.call_sid) ?? []), row]),
    new Map<string, T[]>(),
  )

test('a_session_is_a_call_with_all_that_the_bot_knew_of_it', async () => {
  const sid = newSid()
  const old = Date.now() - DAY_MS
  const turns = [0, 1, 2, 3].map((n) => said(sid, n, old + n))
  const times = { session_start_time: utcNow(old - 1000), last_interaction_time: utcNow(old + 5000) }
  await put(sid, session(sid, turns, { ...times, surprise: { x: 1 } }))
  const { code, report } = await rescue(...keysOf(sid))
  expect(report).toMatchObject({
    clean: true,
    sessions: 1,
    turns: 4,
    new: 4,
    ended: 1,
    not_in_postgresql: 0,
    findings: [],
  })
  expect(code).toBe(0)
  expect(await storedTurns(sid)).toEqual(asStored(sid, turns))
  const call = await until('the call is final', async () => {
    const found = await storedCall(sid)
    return found?.finalized_at instanceof Date ? found : undefined
  })
  expect(call).toMatchObject({
    provider: 'exotel',
    end_reason: 'expired',
    turn_count: 4,
    conversation_stage: 'discovery',
    collected_data: { rooms: 3 },
    objections_encountered: ['price'],
    initiated_at: new Date(old - 1000),
    ended_at: new Date(old + 5000),
  })
  expect(call.meta).toEqual({
    lead_id: 42,
    lead_name: 'Asha',
    lead_phone: '+14155550100',
    property_type: 'flat',
    budget: 7500000,
    source: 'web',
    escalation_requested: false,
    close_attempts: 0,
    surprise: { x: 1 },
  })
  expect((call.full_transcript as { text: string }[]).map(({ text }) => text)).toEqual(turns.map(({ text }) => text))
})

test('run_again_it_appends_nothing_and_later_only_what_is_new', async () => {
  const sid = newSid()
  const bot = new LegacyBot(redis.client)
  const turns = [0, 1, 2].map((n) => said(sid, n))
  await bot.begin(sid, turns.slice(0, 2))
  await rescue(...keysOf(sid))
  const before = await entriesOf(redis, sid)
  const again = await rescue(...keysOf(sid))
  expect(again.report).toMatchObject({ turns: 2, new: 0, already_there: 2, clean: true })
  expect(await entriesOf(redis, sid)).toEqual(before)
  await bot.say(sid, turns[2]!)
  expect((await rescue(...keysOf(sid))).report).toMatchObject({ turns: 3, new: 1, already_there: 2 })
  expect((await eventsOf(redis, sid)).map(({ type }) => type)).toEqual([
    'call.started',
    'turn',
    'turn',
    'call.data',
    'turn',
  ])
  await bot.change(sid, (blob) => (blob.conversation_stage = 'closing'))
  await rescue(...keysOf(sid))
  await bot.change(sid, (blob) => (blob.conversation_stage = 'discovery'))
  await rescue(...keysOf(sid))
  expect(await storedTurns(sid)).toEqual(asStored(sid, turns))
  await until('its stage has come back', async () => (await storedCall(sid))?.conversation_stage === 'discovery')
  expect(await entriesOf(redis, sid)).toHaveLength(7)
})

test('a_dry_run_says_what_would_be_and_writes_nothing', async () => {
  const sid = newSid()
  await put(`${sid}-a`, session(`${sid}-a`, [said(sid, 0)]))
  await put(`${sid}-b`, session(`${sid}-b`, [said(sid, 1), 5], { last_interaction_time: utcNow(Date.now() - DAY_MS) }))
  const source = await keysAndValues(`session:${sid}*`)
  const size = await redis.client.dbsize()
  const { code, report } = await rescue('--dry-run', ...keysOf(sid))
  expect(code).toBe(1)
  expect(report).toMatchObject({ sessions: 2, turns: 2, new: 2, unreadable_turns: 1, not_in_postgresql: null })
  expect(await redis.client.dbsize()).toBe(size)
  expect(
    await redis.client.exists(
      ...['a', 'b'].map((c) => `${redis.partitions.of(`${sid}-${c}`).streamPrefix}${sid}-${c}`),
    ),
  ).toBe(0)
  expect(await keysAndValues(`session:${sid}*`)).toEqual(source)
})

test('what_cannot_be_read_is_named_and_kept_and_its_neighbours_are_saved', async () => {
  const sid = newSid()
  const turns = [0, 1, 2].map((n) => said(sid, n))
  const whole = JSON.stringify(session(`${sid}-cut`, turns))
  await put(`${sid}-cut`, whole.slice(0, whole.indexOf('says 2') + 3))
  await put(`${sid}-items`, session(`${sid}-items`, [turns[0], 'my secret', { speaker: 'ai', text: null }, turns[1]]))
  await put(`${sid}-text`, 'my secret is no JSON')
  await put(`${sid}-no call`, '{"transcript_history":[]}')
  await put(`${sid}-python`, JSON.stringify(session(`${sid}-python`, turns)).replace('7500000', 'NaN'))
  await redis.client.rpush(sessionKey(`${sid}-list`), 'x')
  const { code, report, out } = await calltape(['rescue', '--json', ...keysOf(sid)], environment).then((run) => ({
    ...run,
    report: JSON.parse(run.out),
  }))
  expect(code).toBe(1)
  expect(out).not.toContain('my secret')
  expect(report).toMatchObject({
    sessions: 6,
    truncated: 1,
    unreadable: 3,
    turns: 7,
    unreadable_turns: 2,
    not_in_postgresql: 0,
  })
  expect(
    report.findings
      .map(({ key, reason }: { key: string; reason: string }) => [key.slice(8 + sid.length), reason])
      .toSorted(),
  ).toEqual([
    ['-cut', 'it breaks off: what was complete before is saved'],
    ['-items', '2 of its turns cannot be read: it is no object; text is missing or not what it should be'],
    ['-list', 'WRONGTYPE Operation against a key holding the wrong kind of value'],
    ['-no call', 'neither the key nor the value has a call_sid'],
    ['-text', 'the value is not JSON'],
  ])
  expect(byCall(await storedTurns(`${sid}-%`))).toEqual(
    new Map([
      [`${sid}-cut`, asStored(`${sid}-cut`, turns.slice(0, 2))],
      [`${sid}-items`, asStored(`${sid}-items`, turns.slice(0, 2))],
      [`${sid}-python`, asStored(`${sid}-python`, turns)],
    ]),
  )
  await until('what is unreadable is there', async () => (await storedCall(`${sid}-text`)) !== undefined)
  expect((await storedCall(`${sid}-text`))!.meta).toMatchObject({ unreadable_session: 'my secret is no JSON' })
  expect((await storedCall(`${sid}-items`))!.meta).toMatchObject({
    unreadable_turns: [{ item: '"my secret"' }, { item: '{"speaker":"ai","text":null}' }],
  })
  // A later look may find the whole of it.
  await put(`${sid}-cut`, whole)
  await rescue(...keysOf(`${sid}-cut`))
  expect(await storedTurns(`${sid}-cut`)).toEqual(asStored(`${sid}-cut`, turns))
})

test('a_call_that_goes_on_after_its_presumed_end_is_live_again_until_it_ends_once_more', async () => {
  const sid = newSid()
  const bot = new LegacyBot(redis.client)
  const old = Date.now() - DAY_MS
  await bot.begin(sid, [said(sid, 0, old)], { session_start_time: utcNow(old), last_interaction_time: utcNow(old) })
  expect((await rescue(...keysOf(sid))).report).toMatchObject({ ended: 1 })
  await until('it is over', async () => (await storedCall(sid))?.finalized_at instanceof Date)
  expect((await rescue(...keysOf(sid))).report).toMatchObject({ ended: 0 })
  await bot.say(sid, said(sid, 1, Date.now() - 5000))
  expect((await rescue(...keysOf(sid))).report).toMatchObject({ ended: 0, new: 1 })
  await until('it is live again', async () => (await storedCall(sid))?.finalized_at === null)
  const [, turn] = (JSON.parse((await redis.client.get(sessionKey(sid)))!) as { transcript_history: Said[] })
    .transcript_history
  await bot.begin(sid, [said(sid, 0, old), turn!], { last_interaction_time: utcNow(old) })
  const idle = new RescueProcess(keysOf(sid), { ...environment, IDLE_TIMEOUT: '1' })
  expect((await idle.end()).report).toMatchObject({ ended: 1, new: 0 })
  await until('it is over again', async () => (await storedCall(sid))?.finalized_at instanceof Date)
  expect(await storedCall(sid)).toMatchObject({ end_reason: 'expired', turn_count: 2 })
})

test('what_is_appended_but_not_in_PostgreSQL_is_said_so', async () => {
  const sid = newSid()
  const other = await freshDatabase()
  try {
    await put(sid, session(sid, [said(sid, 0)]))
    // A database for which no sink works.
    const waiting = await new RescueProcess(['--wait', '0.3', ...keysOf(sid)], {
      ...environment,
      DATABASE_URL: other.url,
      DATABASE_SCHEMA: 'public',
    }).end()
    expect(waiting.report).not.toHaveProperty('database_failure')
    expect(waiting).toMatchObject({ code: 1, report: { new: 1, not_in_postgresql: 1, clean: false } })

    const DATABASE_URL = 'postgres://127.0.0.1:1/nobody'
    const { code, out } = await calltape(['rescue', ...keysOf(sid)], { ...environment, DATABASE_URL })
    expect([code, out]).toEqual([1, expect.stringContaining('whether it is in PostgreSQL yet cannot be said')])
  } finally {
    await other.drop()
  }
})

test('what_has_to_be_mended_first_is_said_with_exit_code_2', async () => {
  const closed = 'redis://127.0.0.1:1'
  const runs: [string[], Record<string, string>, string][] = [
    [['--source', closed], {}, '--source: no Redis answers at 127.0.0.1:1'],
    [['--source', 'nonsense'], {}, '--source wants redis://'],
    [['--source', redis.url], { REDIS_URL: closed }, 'REDIS_URL: no Redis answers'],
    [['--dry-run', '--watch'], {}, '--dry-run looks once'],
    [['--wait', 'x'], {}, '--wait wants seconds'],
    [['--every', '0'], {}, '--every wants a number above 0'],
  ]
  for (const [args, more, message] of runs) {
    const { code, err } = await calltape(['rescue', ...args], { ...environment, ...more })
    expect([args, code, err]).toEqual([args, 2, expect.stringContaining(message)])
  }
})

test('told_to_stop_it_finishes_what_it_has_in_hand_and_says_so', async () => {
  const source = await freshRedis()
  try {
    const pipeline = source.client.pipeline()
    const sids = Array.from({ length: 3000 }, (_, i) => `CA-stopped-${i}`)
    for (const sid of sids) pipeline.set(sessionKey(sid), JSON.stringify(session(sid, [said(sid, 0)])))
    await pipeline.exec()
    const run = new RescueProcess(['--source', source.url], environment)
    await until('it is at work', async () => run.hasExited || (await storedTurns('CA-stopped-%')).length > 0)
    const { code, report } = await run.end('SIGTERM')
    expect([code, report!.interrupted, report!.turns < sids.length]).toEqual([1, true, true])
    await until('what it said is there', async () => (await storedTurns('CA-stopped-%')).length === report!.turns)
  } finally {
    await source.drop()
  }
})

test('the_source_may_be_another_redis_of_which_nothing_is_changed', async () => {
  const source = await freshRedis()
  try {
    const sid = newSid()
    await source.client.set(sessionKey(sid), JSON.stringify(session(sid, [said(sid, 0)])), 'PX', 100_000)
    const { code, report } = await rescue('--source', source.url)
    expect([code, report!.new]).toEqual([0, 1])
    expect(await source.client.keys('*')).toEqual([sessionKey(sid)])
    expect(await redis.client.exists(sessionKey(sid))).toBe(0)
  } finally {
    await source.drop()
  }
})

/** Every key with its bytes and the moment at which it expires. */
async function keysAndValues(pattern: string): Promise<Map<string, [string, number]>> {
  const keys = (await redis.client.keys(pattern)).toSorted()
  const replies = await redis.client
    .pipeline(
      keys.flatMap((key) => [
        ['dumpBuffer', key],
        ['pexpiretime', key],
      ]),
    )
    .exec()
  return new Map(
    keys.map((key, i) => [
      key,
      [String((replies![2 * i]![1] as Buffer).toString('base64')), Number(replies![2 * i + 1]![1])],
    ]),
  )
}

describe('five_thousand_sessions', () => {
  /** What is in the blobs that nobody changes, and can be read. */
  const expected = new Map<string, Said[]>()
  /** In blobs that expire soon: all or none of it. */
  const expiring = new Map<string, Said[]>()
  const writers = ['live-0', 'live-1', 'live-2'].map((name) => `CA5k-${name}`)
  /** All that their writers have ever said. */
  const everSaid = new Map<string, Said[]>(writers.map((sid) => [sid, []]))
  const connections: Redis[] = []
  afterAll(() => {
    for (const connection of connections) connection.disconnect()
  })

  async function fill(): Promise<void> {
    const pipeline = redis.client.pipeline()
    const old = Date.now() - DAY_MS
    const over = { last_interaction_time: utcNow(old + 1000) }
    for (let i = 0; i < 5000; i++) {
      const sid = `CA5k-${i}`
      const turns = Array.from({ length: 2 + (i % 5) }, (_, n) => said(sid, n, old + n))
      const more = { ...over, ...(i % 200 === 7 ? { audio_buffer: 'ab'.repeat(100_000) } : {}) }
      const json = JSON.stringify(session(sid, turns, more))
      if (i % 50 === 1) {
        expected.set(sid, turns.slice(0, -1))
        pipeline.set(sessionKey(sid), json.slice(0, json.lastIndexOf('says') + 2), 'EX', 3600)
      } else if (i % 100 === 2) pipeline.hset(sessionKey(sid), 'transcript_history', '[]')
      else if (i % 100 === 3) pipeline.set(sessionKey(sid), '[1, 2', 'EX', 3600)
      else if (i % 100 === 4) {
        expected.set(sid, turns)
        pipeline.set(
          sessionKey(sid),
          JSON.stringify(session(sid, [null, ...turns.slice(0, 1), 7, ...turns.slice(1)], over)),
        )
      } else if (i % 25 === 5) {
        expiring.set(sid, turns)
        pipeline.set(sessionKey(sid), json, 'PX', 2 + ((i * 7919) % 2500))
      } else {
        expected.set(sid, turns)
        pipeline.set(sessionKey(sid), json, 'EX', 3600)
      }
    }
    await pipeline.exec()
    await database.pool.query(
      `INSERT INTO public.call_sessions (call_sid, lead_id, status) SELECT sid, 1, 'initiated' FROM unnest($1::text[]) sid`,
      [[...expected.keys()]],
    )
  }

  /** What the bot's own table has of each ended call. */
  async function legacyTexts(): Promise<Map<string, string[]>> {
    const { rows } = await database.pool.query<{ call_sid: string; full_transcript: string }>(
      'SELECT call_sid, full_transcript FROM public.call_sessions WHERE full_transcript IS NOT NULL',
    )
    const textsIn = (json: string) => (JSON.parse(json) as { text: string }[]).map(({ text }) => text)
    return new Map(rows.map(({ call_sid, full_transcript }) => [call_sid, textsIn(full_transcript)]))
  }

  /** Three workers on each live call, each with a connection of its own, that lose each other's turns. */
  async function write(until: () => boolean): Promise<void> {
    for (const sid of writers) await new LegacyBot(redis.client).begin(sid)
    await Promise.all(
      [0, 1, 2].map(async (worker) => {
        const connection = (await connectRedis(redis.url, log)) as Redis
        connections.push(connection)
        const bot = new LegacyBot(connection)
        for (let n = 0; !until(); n++) {
          for (const sid of writers) {
            const turn = { ...said(sid, n), text: `worker ${worker} says ${n} in ${sid}` }
            everSaid.get(sid)!.push(turn)
            await bot.say(sid, turn)
          }
        }
      }),
    )
  }

  test('and_a_bot_that_goes_on_writing_end_with_every_readable_turn_in_PostgreSQL_once', async () => {
    await fill()
    const unchanging = [...expected.keys()].filter((_, i) => i % 10 === 0).map(sessionKey)
    const before = await dumpsOf(unchanging)
    let isDone = false
    const written = write(() => isDone)
    const first = await rescue('--match', 'session:CA5k-*', '--wait', '30')
    isDone = true
    await written
    expect(first.code).toBe(1) // for what is unreadable
    expect(first.report).toMatchObject({ truncated: 100, unreadable: 100, unreadable_turns: 100, not_in_postgresql: 0 })

    // What the writers have left behind, and nothing of what is there already.
    const second = await rescue('--match', 'session:CA5k-*', '--wait', '30')
    expect(second.report!.not_in_postgresql).toBe(0)
    const third = await rescue('--match', 'session:CA5k-*', '--wait', '30')
    expect(third.report).toMatchObject({ new: 0, not_in_postgresql: 0 })

    const stored = byCall(await storedTurns('CA5k-%'))
    const lost = [...expected].filter(([sid, turns]) => !sameTurns(stored.get(sid) ?? [], asStored(sid, turns)))
    expect(lost.slice(0, 2).map(([sid, turns]) => [stored.get(sid), asStored(sid, turns)])).toEqual([])
    for (const [sid, turns] of expiring) {
      const its = stored.get(sid) ?? []
      expect(its.length === 0 || sameTurns(its, asStored(sid, turns))).toBe(true)
    }
    for (const sid of writers) {
      const left = JSON.parse((await redis.client.get(sessionKey(sid)))!).transcript_history as Said[]
      expect(left.length).toBeLessThan(everSaid.get(sid)!.length) // updates were lost, or this proves little
      const texts = (stored.get(sid) ?? []).map(({ text }) => text)
      expect(new Set(texts).size).toBe(texts.length)
      expect(left.filter(({ text }) => !texts.includes(text))).toEqual([])
      const all = new Set(everSaid.get(sid)!.map(({ text }) => text))
      expect(texts.filter((text) => !all.has(text))).toEqual([])
    }
    const known = new Set([...expected.keys(), ...expiring.keys(), ...writers])
    expect([...stored.keys()].filter((sid) => !known.has(sid))).toEqual([])
    expect(await dumpsOf(unchanging)).toEqual(before)

    await until("the bot's table is filled", async () => (await legacyTexts()).size === expected.size, 20_000)
    const inLegacyTable = await legacyTexts()
    const textsOf = (turns: Said[]) => turns.map(({ text }) => text)
    expect([...expected].filter(([sid, turns]) => textsOf(turns).join() !== inLegacyTable.get(sid)?.join())).toEqual([])
  }, 120_000)

  test('are_each_saved_once_though_rescue_is_killed_again_and_again', async () => {
    const again = await freshRedis()
    const fresh = await freshDatabase()
    const stores = { REDIS_URL: again.url, DATABASE_URL: fresh.url, SINK_METRICS_PORT: '0' }
    const itsSink = await startSink(readConfig(stores), log)
    try {
      const sids = Array.from({ length: 1500 }, (_, i) => `CAkill-${i}`)
      const pipeline = again.client.pipeline()
      for (const sid of sids)
        pipeline.set(
          sessionKey(sid),
          JSON.stringify(
            session(
              sid,
              [0, 1, 2].map((n) => said(sid, n)),
            ),
          ),
        )
      await pipeline.exec()
      let kills = 0
      for (const share of [0.1, 0.4, 0.8]) {
        const run = new RescueProcess([], { ...stores })
        const streams = async () => Number(await again.client.dbsize()) / 2 - sids.length / 2 // a stream and a session each
        await until('it has come so far', async () => run.hasExited || (await streams()) >= share * sids.length, 30_000)
        if (!run.hasExited) kills++
        await run.end('SIGKILL')
      }
      expect(kills).toBeGreaterThan(0)
      const { code, report } = await new RescueProcess(['--wait', '30'], stores).end()
      expect([code, report!.turns, report!.already_there > 0]).toEqual([0, 3 * sids.length, true])
      const { rows } = await fresh.pool.query(
        'SELECT call_sid, count(*)::int AS n, count(DISTINCT text)::int AS texts FROM call_transcript_turns GROUP BY 1',
      )
      expect(rows).toHaveLength(sids.length)
      expect(rows.filter(({ n, texts }) => n !== 3 || texts !== 3)).toEqual([])
    } finally {
      await itsSink.stop()
      await Promise.all([again.drop(), fresh.drop()])
    }
  }, 120_000)

  async function dumpsOf(keys: string[]): Promise<unknown[]> {
    const replies = await redis.client
      .pipeline(
        keys.flatMap((key) => [
          ['get', key],
          ['pexpiretime', key],
        ]),
      )
      .exec()
    return replies!.map(([, reply]) => reply)
  }
})

function sameTurns(stored: StoredTurn[], wanted: StoredTurn[]): boolean {
  return JSON.stringify(stored) === JSON.stringify(wanted)
}
