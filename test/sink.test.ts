/** The sink: what is in the calls' streams gets into PostgreSQL, as it was sent, once, whatever goes wrong on the way. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Redis } from 'ioredis'
import { pino } from 'pino'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { WebSocket } from 'ws'
import type { CallEvent, Turn } from '../shared/events.js'
import { createPool } from '../shared/postgres.js'
import { EncodedTurns } from '../sink/copy.js'
import { decodeCall, emptyBatch } from '../sink/decode.js'
import { Leases } from '../sink/lease.js'
import { startSink } from '../sink/sink.js'
import { writeBatch } from '../sink/write.js'
import { Calls, ended, newSid, type Row, seqs } from './support/calls.js'
import { until } from './support/stores.js'
import { everywhere, groupOf, LIMITS, placesOf, readAll, streamOf, turn } from './support/streams.js'

describe('as_it_was_sent', () => {
  let calls: Calls
  beforeAll(async () => {
    calls = await Calls.start()
  })
  afterAll(() => calls.stack.end())

  test('every_column_of_a_turn_with_everything_and_of_one_with_the_least', async () => {
    const sid = newSid()
    const before = Date.now()
    const full: Turn = {
      type: 'turn',
      call_sid: sid,
      id: 'the-key',
      seq: 2_147_483_647,
      ts: 1_767_268_800_123,
      speaker: 'somebody else',
      text: 'text',
      confidence: 0.75,
      language: 'hi-IN',
      started_at: 1_767_268_800_001,
      ended_at: 1_767_268_802_999,
      interrupted: false,
      meta: { a: [1, { b: null }], 'ключ "\\': '\n' },
    }
    await calls.storeSettled(full, { type: 'turn', call_sid: sid, speaker: 'bot', text: '' } as Turn)
    const [first, second] = await calls.turns(sid)
    const { ingested_at: ingested, persisted_at: persisted, stream_id: id, ...columns } = first!
    expect(columns).toEqual({
      call_sid: sid,
      turn_id: 'the-key',
      seq: 2_147_483_647,
      speaker: 'somebody else',
      text: 'text',
      spoken_at: new Date(1_767_268_800_123),
      started_at: new Date(1_767_268_800_001),
      ended_at: new Date(1_767_268_802_999),
      confidence: 0.75,
      language: 'hi-IN',
      interrupted: false,
      meta: full.meta,
    })
    expect((ingested as Date).getTime()).toBe(Number.parseInt(id as string, 10))
    expect((ingested as Date).getTime()).toBeGreaterThanOrEqual(before - 1)
    expect((persisted as Date).getTime()).toBeGreaterThanOrEqual((ingested as Date).getTime() - 1)
    const { persisted_at: _, ...least } = second!
    const nothing = { seq: null, started_at: null, ended_at: null, confidence: null, language: null, meta: null }
    expect(least).toEqual({
      call_sid: sid,
      turn_id: least.stream_id,
      speaker: 'agent',
      text: '',
      spoken_at: least.ingested_at,
      interrupted: null,
      stream_id: expect.stringMatching(/^\d{13}-\d+$/),
      ingested_at: expect.any(Date),
      ...nothing,
    })
  })

  test('times_to_the_millisecond_from_1970_to_9999', async () => {
    const sid = newSid()
    // Where microseconds since 2000 leave 32 bits and 53 bits, among others.
    const edge = Date.UTC(2000, 0, 1) + Math.floor(Number.MAX_SAFE_INTEGER / 1000)
    expect(new Date(edge).getUTCFullYear()).toBe(2285)
    const times = [
      0,
      1,
      999,
      Date.UTC(1999, 11, 31, 23, 59, 59, 999),
      Date.UTC(2000, 0, 1),
      946_684_804_294,
      946_684_804_295,
    ]
      .concat([1_767_268_800_123, edge - 1, edge, edge + 1, edge + 2, Date.UTC(2286, 10, 20, 17, 46, 40, 1)])
      .concat([Date.UTC(9999, 11, 31, 23, 59, 59, 999)])
    const events = times.map((ts, seq): Turn => ({ ...turn(sid, seq), ts, started_at: ts, ended_at: ts }))
    await calls.storeSettled(...events)
    const ms = (column: string) => `(extract(epoch FROM ${column}) * 1000000)::numeric(20, 0)::text AS ${column}`
    const rows = await calls.query(
      `SELECT ${['spoken_at', 'started_at', 'ended_at'].map(ms).join()} FROM call_transcript_turns WHERE call_sid = $1 ORDER BY seq`,
      sid,
    )
    const micros = times.map((time) => String(BigInt(time) * 1000n))
    expect(rows).toEqual(micros.map((time) => ({ spoken_at: time, started_at: time, ended_at: time })))
    // And of other events, which go another way.
    const statuses = times.map((ts, i): CallEvent => ({ type: 'call.status', call_sid: sid, id: `${1000 + i}`, ts }))
    await calls.storeSettled(...statuses)
    const occurred = await calls.query(
      `SELECT ${ms('occurred_at')} FROM call_events WHERE call_sid = $1 ORDER BY event_id`,
      sid,
    )
    expect(occurred.map((row) => row.occurred_at)).toEqual(micros)
    expect(await calls.session(sid)).toMatchObject({
      initiated_at: new Date(0),
      last_event_at: new Date(times.at(-1)!),
    })
  })

  test('confidence_as_float4', async () => {
    const sid = newSid()
    const values = [0, 1, 0.5, 0.1, 1 / 3, 0.999999999, 1e-45, 1e-300, 1.17549435e-38]
    await calls.storeSettled(...values.map((confidence, seq): Turn => ({ ...turn(sid, seq), confidence })))
    const rows = await calls.query(
      'SELECT confidence::float8 AS c FROM call_transcript_turns WHERE call_sid = $1 ORDER BY seq',
      sid,
    )
    expect(rows.map((row) => row.c)).toEqual(values.map(Math.fround))
  })

  test('meta_as_jsonb', async () => {
    const sid = newSid()
    const metas = [
      '{}',
      '{"__proto__":{"a":1},"constructor":null,"":""}',
      '{"n":[0,-1.5,1e21,1e-7,9007199254740991],"t":true,"deep":[[[{"a":[]}]]]}',
      `{"text":${JSON.stringify('\u0001\t"\\/\u2028 \\u0000 नमस्ते 👩‍👩‍👧 \u{10FFFF}')}}`,
      `{"long":"${'न'.repeat(100_000)}"}`,
    ]
    const events = metas.map((meta, seq): Turn => ({ ...turn(sid, seq), meta: JSON.parse(meta) as Row }))
    await calls.storeSettled(...events)
    const stored = (await calls.turns(sid)).map((row) => JSON.stringify(row.meta))
    const sorted = async (json: string) => JSON.stringify((await calls.query('SELECT $1::jsonb AS j', json))[0]!.j)
    expect(stored).toEqual(await Promise.all(metas.map(sorted)))
  })

  test('every_text_byte_for_byte', async () => {
    const sid = newSid()
    const around = (n: number) =>
      [n - 1, n, n + 1].flatMap((k) => ['x'.repeat(k), `${'x'.repeat(k - 1)}न`, `न${'x'.repeat(k)}`])
    const texts = [
      '',
      ' ',
      '\t\n\r\v\f\b',
      '\\N',
      '\\.',
      '\\',
      'a\\tb\\\\',
      `'"''""`,
      '\u0001\u001f\u007f\u0080\u009f',
      '\ufeffbom\uffff\ufffe\ufffd',
      '👋🏽 👩‍👩‍👧‍👦 🇮🇳',
      'नमस्ते, क्या हाल है? ज़रूर',
      'مرحبا \u202bשלום\u202c',
      'e\u0301 é Z\u0335\u0321\u0353',
      '\u{10FFFF}\u{1F600}',
      ...around(40), // to there a loop encodes, beyond it Buffer.write
      ...around(255),
      'x'.repeat(64 * 1024),
      'é'.repeat(32 * 1024),
      '👋'.repeat(16 * 1024),
      ...Array(30).fill(`${'न'.repeat(21_845)}`), // more than any buffer and any chunk
    ]
    const events = texts.map((text, seq): Turn => ({ ...turn(sid, seq), text, id: `${'ключ'.repeat(30)}${seq}` }))
    const others = texts.filter((text) => text !== '' && text.length <= 60)
    for (const [i, text] of others.entries()) {
      events.push({ ...turn(sid, 1000 + i), speaker: text, language: text, id: text })
    }
    await calls.stop()
    await calls.producer.store(...events)
    await calls.start() // all in one batch
    await calls.settled(sid)
    const rows = await calls.query(
      `SELECT convert_to(text, 'UTF8') AS text, convert_to(speaker, 'UTF8') AS speaker,
         convert_to(language, 'UTF8') AS language, convert_to(turn_id, 'UTF8') AS turn_id
       FROM call_transcript_turns WHERE call_sid = $1 ORDER BY seq`,
      sid,
    )
    expect(rows.length).toBe(events.length)
    for (const [i, { text, speaker, language, id }] of events.entries()) {
      const row = rows[i] as Record<string, Buffer | null>
      expect(row.text!.equals(Buffer.from(text)), `text ${i}`).toBe(true)
      expect(row.speaker!.toString(), `speaker ${i}`).toBe(speaker)
      expect(row.language?.toString(), `language ${i}`).toBe(language)
      expect(row.turn_id!.toString(), `turn_id ${i}`).toBe(id)
    }
    expect(await calls.quarantined(sid)).toEqual([])
  })

  test('what_PostgreSQL_cannot_hold_is_replaced_and_flagged_and_the_original_kept', async () => {
    const sid = newSid()
    const meta = { 'k\0': ['\ud800', { inner: 'a\0b' }], fine: '\ufffd' }
    const bad: Turn[] = [
      { ...turn(sid, 1), text: 'a\0b\ud800c\udc00' },
      { ...turn(sid, 2), speaker: '\0who' },
      { ...turn(sid, 3), language: 'x\udfff' },
      { ...turn(sid, 4), meta },
    ]
    const ending = {
      type: 'call.ended',
      call_sid: sid,
      reason: 'gone\0',
      turn_count: 6,
      meta: { '\udc00': '\0' },
    } as const
    const data = {
      type: 'call.data' as const,
      call_sid: sid,
      data: { 'k\0': 'v\ud800' },
      stage: '\0',
      objections: ['\0'],
    } satisfies CallEvent
    await calls.storeSettled(turn(sid, 0), ...bad, turn(sid, 5), data, ending)
    const rows = await calls.turns(sid)
    expect(rows.map((row) => row.text)).toEqual([
      'turn 0',
      'a\ufffdb\ufffdc\ufffd',
      'turn 2',
      'turn 3',
      'turn 4',
      'turn 5',
    ])
    expect(rows[2]!.speaker).toBe('\ufffdwho')
    expect(rows[3]!.language).toBe('x\ufffd')
    const replaced = { 'k\ufffd': ['\ufffd', { inner: 'a\ufffdb' }], fine: '\ufffd' }
    expect(rows[4]!.meta).toMatchObject({ ...replaced, calltape_replaced: true })
    for (const [i, { text, speaker, language, meta }] of bad.entries()) {
      const kept = rows[i + 1]!.meta as Row
      expect(kept.calltape_replaced).toBe(true)
      expect(JSON.parse(kept.calltape_original as string)).toEqual(
        JSON.parse(JSON.stringify({ text, speaker, language, meta })),
      )
    }
    for (const neighbour of [rows[0]!, rows[5]!]) expect(neighbour.meta).toBe(null)
    const events = await calls.query('SELECT event FROM call_events WHERE call_sid = $1 ORDER BY type', sid)
    for (const [i, original] of [data, ending].entries()) {
      const { meta } = events[i]!.event as { meta: Row }
      expect(meta.calltape_replaced).toBe(true)
      expect(JSON.parse(meta.calltape_original as string)).toEqual(original)
    }
    expect(await calls.session(sid)).toMatchObject({
      collected_data: { 'k\ufffd': 'v\ufffd' },
      conversation_stage: '\ufffd',
      objections_encountered: ['\ufffd'],
      end_reason: 'gone\ufffd',
      complete: true,
      meta: { '\ufffd': '\ufffd', calltape_replaced: true },
    })
    expect(await calls.quarantined(sid)).toEqual([])
  })
})

describe('once', () => {
  let calls: Calls
  beforeAll(async () => {
    calls = await Calls.start()
  })
  afterAll(() => calls.stack.end())

  test('of_a_duplicate_in_a_later_batch_the_first_one_wins_and_the_batch_goes_through_staging', async () => {
    const sid = newSid()
    const other = newSid()
    await calls.storeSettled(turn(sid, 0, 'first'), { ...turn(sid, 7, 'seventh'), id: 'x' })
    const before = [await calls.metric('staged_batches_total'), await calls.metric('duplicate_turns_total')]
    expect(before).toEqual([0, 0])
    await calls.storeSettled(
      turn(sid, 0, 'again'),
      turn(sid, 1, 'new'),
      { ...turn(sid, 8, 'another seq, the same id'), id: 'x' },
      turn(other, 0),
    )
    expect((await calls.turns(sid)).map((row) => row.text)).toEqual(['first', 'new', 'seventh'])
    expect((await calls.turns(other)).length).toBe(1)
    expect(await calls.metric('staged_batches_total')).toBe(1)
    expect(await calls.metric('duplicate_turns_total')).toBe(2)
    await calls.storeSettled(turn(sid, 2))
    expect(await calls.metric('staged_batches_total')).toBe(1)
  })

  test('of_duplicates_in_one_batch_the_first_one_wins', async () => {
    const sid = newSid()
    const status = (ts: number): CallEvent => ({ type: 'call.status', call_sid: sid, id: 's', ts, status: 'ringing' })
    await calls.storeSettled(turn(sid, 0, 'first'), turn(sid, 0, 'second'), turn(sid, 1), status(1000), status(2000))
    expect((await calls.turns(sid)).map((row) => row.text)).toEqual(['first', 'turn 1'])
    const events = await calls.query('SELECT occurred_at FROM call_events WHERE call_sid = $1', sid)
    expect(events).toEqual([{ occurred_at: new Date(1000) }])
  })

  test('the_same_key_in_another_call_is_another_turn_and_without_a_key_every_entry_is', async () => {
    const [a, b] = [newSid(), newSid()]
    const { seq: _, ...keyless } = turn(a, 0)
    await calls.storeSettled(turn(a, 0), turn(b, 0), keyless, keyless)
    expect([(await calls.turns(a)).length, (await calls.turns(b)).length]).toEqual([3, 1])
  })

  test('what_a_sink_committed_and_did_not_settle_is_read_again_and_nothing_is_doubled', async () => {
    await calls.stop()
    const sid = newSid()
    await calls.producer.store({ type: 'call.started', call_sid: sid, from: '+1' }, turn(sid, 0))
    await calls.producer.store(...seqs(50, 1).map((seq) => turn(sid, seq)), { ...turn(sid, 51), id: 'k' })
    await calls.foreign(sid, [['nothing', 'of ours']])
    await calls.producer.store(ended(sid, 52))
    const { redis, database } = calls.stack
    const leases = new Leases(redis.client, redis.partitions, 100)
    const limits = { ...LIMITS, leaseMs: 100 }
    const { leases: taken } = await leases.lease(everywhere(redis.partitions), limits)
    const batch = emptyBatch(new EncodedTurns())
    for (const { lease, entries } of await readAll(redis.client, taken, LIMITS)) decodeCall(lease, entries, batch)
    await writeBatch(database.pool, batch, 60_000)
    const snapshot = async () => [
      await calls.turns(sid),
      await calls.session(sid),
      await calls.quarantined(sid),
      await calls.query('SELECT * FROM call_events WHERE call_sid = $1 ORDER BY event_id', sid),
    ]
    const committed = await snapshot()
    expect(committed[1]).toMatchObject({ turn_count: 52, complete: true })
    expect(await groupOf(redis, sid)).toMatchObject({ 'last-delivered-id': '0-0' }) // it died here
    await sleep(110)
    await calls.start()
    await calls.settled(sid)
    expect(await snapshot()).toEqual(committed)
    expect(await calls.metric('reclaimed_total')).toBe(1)
    expect(await calls.metric('duplicate_turns_total')).toBe(52)
    expect(await calls.metric('staged_batches_total')).toBe(1)
    expect(await placesOf(redis, sid)).toEqual({ ended: expect.any(Number) })
  })
})

describe('what_cannot_be_stored', () => {
  let calls: Calls
  beforeAll(async () => {
    calls = await Calls.start()
  })
  afterAll(() => calls.stack.end())

  const entry = (sid: string, fields: Row) => ['e', JSON.stringify({ call_sid: sid, ...fields })]

  test('is_quarantined_with_its_reason_and_its_neighbours_and_its_call_go_on', async () => {
    const sid = newSid()
    const foreign: [reason: RegExp, fields: string[]][] = [
      [/^missing_field: .*no field e$/, ['message', 'hello', 'é', '\\N\t\n']],
      [/^invalid_json: /, ['e', '{"type":"turn",']],
      [/^invalid_json: /, ['e', 'a\0b']],
      [/^invalid_json: /, ['e', '']],
      [/^not_an_object: .*null/, ['e', 'null']],
      [/^not_an_object: .*an array/, ['e', '[]']],
      [/^unknown_type: /, entry(sid, { type: 'call.exploded' })],
      [/^call_sid_mismatch: .*somebody-else/, entry('somebody-else', { type: 'turn', speaker: 'agent', text: '' })],
      [/^missing_field: text /, entry(sid, { type: 'turn', speaker: 'agent' })],
      [/^invalid_field: text .*got 5/, entry(sid, { type: 'turn', speaker: 'agent', text: 5 })],
      [/^invalid_field: text .*65536 bytes/, entry(sid, { type: 'turn', speaker: 'agent', text: 'न'.repeat(21_846) })],
      [/^invalid_field: seq /, entry(sid, { type: 'turn', speaker: 'agent', text: '', seq: 2 ** 31 })],
      [/^invalid_field: ts /, entry(sid, { type: 'turn', speaker: 'agent', text: '', ts: -1 })],
      [/^invalid_field: id /, entry(sid, { type: 'turn', speaker: 'agent', text: '', id: 'a\0' })],
      [/^invalid_field: meta /, entry(sid, { type: 'call.data', meta: [] })],
      [/^invalid_field: turn_count /, entry(sid, { type: 'call.ended', turn_count: '2' })],
    ]
    await calls.storeSettled(turn(sid, 0))
    const entries = foreign.map(([, fields]) => fields)
    const ids = await calls.foreign(sid, entries)
    await calls.storeSettled(turn(sid, 1), ended(sid, 2))
    const rows = await calls.quarantined(sid)
    expect(rows.length).toBe(foreign.length)
    for (const [i, [reason, fields]] of foreign.entries()) {
      expect(rows[i]!.entry_id).toBe(ids[i])
      expect(rows[i]!.reason).toMatch(reason)
      expect(JSON.parse((rows[i]!.raw as Buffer).toString())).toEqual(fields)
      expect(Math.abs((rows[i]!.quarantined_at as Date).getTime() - Date.now())).toBeLessThan(20_000)
    }
    expect(await calls.session(sid)).toMatchObject({ turn_count: 2, complete: true })
    expect(await calls.metric('quarantined_total')).toBe(foreign.length)
    expect((await calls.query('SELECT FROM call_sessions WHERE call_sid = $1', 'somebody-else')).length).toBe(0)
  })

  test('alone_in_a_call_does_not_keep_its_first_turn_from_making_the_row', async () => {
    const sid = newSid()
    await calls.foreign(sid, [['no', 'event']])
    await calls.settled(sid)
    expect(await calls.turns(sid)).toEqual([])
    expect((await calls.quarantined(sid)).length).toBe(1)
    await calls.storeSettled(turn(sid, 0))
    expect(await calls.session(sid)).toMatchObject({ status: 'in-progress', finalized_at: null })
    await calls.foreign(sid, [['no', 'event either']])
    await calls.storeSettled(ended(sid, 1))
    expect(await calls.session(sid)).toMatchObject({ complete: true, turn_count: 1 })
  })

  test('by_a_rule_of_the_database_is_quarantined_alone', async () => {
    await calls.query(`ALTER TABLE call_transcript_turns ADD CONSTRAINT taste CHECK (text <> 'rude') NOT VALID`)
    await calls.query(`ALTER TABLE call_events ADD CONSTRAINT taste CHECK (event->>'stage' <> 'rude') NOT VALID`)
    const [bad, good] = [newSid(), newSid()]
    await calls.stop() // all in one batch, then
    const rude: CallEvent = { type: 'call.data', call_sid: bad, stage: 'rude' }
    const events = seqs(20).flatMap((seq) => [turn(bad, seq, seq === 13 ? 'rude' : 'polite'), turn(good, seq)])
    await calls.producer.store(...events, rude, ended(bad, 19), ended(good, 20))
    await calls.start()
    await calls.settled(bad)
    await calls.settled(good)
    expect(await calls.session(bad)).toMatchObject({ complete: false, turn_count: 19, expected_turns: 19 })
    expect(await calls.session(good)).toMatchObject({ complete: true })
    const rows = await calls.quarantined(bad)
    expect(rows.map((row) => row.reason)).toEqual([expect.stringMatching(/taste/), expect.stringMatching(/taste/)])
    expect(rows.map((row) => JSON.parse(JSON.parse((row.raw as Buffer).toString())[1]))).toMatchObject([
      { text: 'rude', seq: 13 },
      { stage: 'rude' },
    ])
    expect(await calls.quarantined(good)).toEqual([])
    expect(await groupOf(calls.stack.redis, bad)).toMatchObject({ lag: 0, 'entries-read': 22 })
    expect(await placesOf(calls.stack.redis, bad)).toEqual({ ended: expect.any(Number) })
    await calls.query('ALTER TABLE call_transcript_turns DROP CONSTRAINT taste')
    await calls.query('ALTER TABLE call_events DROP CONSTRAINT taste')
  })

  test('entries_with_ids_beyond_all_calendars_are_stored', async () => {
    const sid = newSid()
    const { client, partitions } = calls.stack.redis
    const far = `${2n ** 64n - 2n}`
    for (const id of [`1767268800000-${2n ** 64n - 1n}`, `${far}-0`]) {
      await client.xadd(
        streamOf(calls.stack.redis, sid),
        id,
        ...entry(sid, { type: 'turn', speaker: 'agent', text: id }),
      )
    }
    await client.xadd(
      streamOf(calls.stack.redis, sid),
      `${far}-1`,
      ...entry(sid, { type: 'call.ended', turn_count: 2 }),
    )
    await client.zadd(partitions.of(sid).ready, Date.now(), sid)
    await calls.wake(sid)
    await calls.settled(sid)
    expect(await calls.session(sid)).toMatchObject({ complete: true, turn_count: 2 })
    expect(await calls.quarantined(sid)).toEqual([])
  })
})

describe('at_once', () => {
  let calls: Calls
  beforeAll(async () => {
    calls = await Calls.start()
  })
  afterAll(() => calls.stack.end())

  /**
   * Milliseconds from sending each of `count` events, one after the other, to hearing that they are committed; and what Redis and
   * PostgreSQL alone take for that in between: on a busy machine it may be much.
   */
  async function latencies(count: number): Promise<{ took: number[]; storesAlone: number[] }> {
    const pool = createPool(calls.stack.config, 'test-listen', 1)
    const client = await pool.connect()
    let heard = () => {}
    client.on('notification', () => heard())
    await client.query(`
      LISTEN committed;
      CREATE TABLE IF NOT EXISTS beside (n int);
      CREATE OR REPLACE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_notify('committed', ''); RETURN NULL; END $$;
      CREATE OR REPLACE TRIGGER tell AFTER INSERT ON call_transcript_turns EXECUTE FUNCTION tell();
      CREATE OR REPLACE TRIGGER tell AFTER INSERT ON beside EXECUTE FUNCTION tell();`)
    const socket = new WebSocket(`${calls.stack.wsUrl}/v1/stream`)
    await new Promise((resolve) => socket.addEventListener('message', resolve, { once: true }))
    const untilHeard = async (send: () => unknown) => {
      const committed = new Promise<void>((resolve) => {
        heard = resolve
      })
      const sent = performance.now()
      await send()
      await committed
      return performance.now() - sent
    }
    const [took, storesAlone]: [number[], number[]] = [[], []]
    for (let i = 0; i < count; i++) {
      const sid = newSid()
      took.push(await untilHeard(() => socket.send(JSON.stringify(turn(sid, 0)))))
      await calls.settled(sid)
      const store = async () => {
        await calls.stack.redis.client.xadd('beside', '*', 'e', JSON.stringify(turn(sid, 0)))
        await calls.query('INSERT INTO beside VALUES (1)')
      }
      storesAlone.push(await untilHeard(store))
      await sleep(10)
    }
    socket.close()
    client.release()
    await pool.end()
    const sorted = (ms: number[]) => ms.sort((a, b) => a - b)
    return { took: sorted(took), storesAlone: sorted(storesAlone) }
  }
  const median = (sorted: number[]) => sorted[sorted.length >> 1]!

  /** Not when the sink would look anyway, which is half a second later on average. */
  function expectAtOnce({ took, storesAlone }: Awaited<ReturnType<typeof latencies>>): void {
    expect(median(took)).toBeLessThan(Math.min(300, Math.max(50, 10 * median(storesAlone))))
  }

  test('an_event_on_an_idle_system_is_committed_in_milliseconds', async () => {
    const found = await latencies(25)
    const figures = [found.took[0]!, median(found.took), found.took.at(-1)!].map((ms) => ms.toFixed(1))
    process.stdout.write(`sent to committed, idle: best ${figures[0]}, median ${figures[1]}, worst ${figures[2]} ms\n`)
    expectAtOnce(found)
  })

  test('news_that_got_lost_costs_about_a_second', async () => {
    const sid = newSid()
    const { client, partitions } = calls.stack.redis
    const before = Date.now()
    await client.xadd(streamOf(calls.stack.redis, sid), '*', 'e', JSON.stringify(turn(sid, 0)))
    await client.zadd(partitions.of(sid).ready, before, sid)
    await calls.settled(sid)
    expect(Date.now() - before).toBeLessThan(4000)
  })

  test('a_subscriber_that_was_cut_off_is_back_and_nothing_is_forgotten_meanwhile', async () => {
    const { client, url } = calls.stack.redis
    const subscriptions = async () => {
      const list = (await (client as Redis).client('LIST', 'TYPE', 'PUBSUB')) as string
      return [...list.matchAll(/^id=(\d+) .*\bdb=(\d+)\b/gm)].flatMap(([, id, db]) =>
        url.endsWith(`/${db}`) ? [id!] : [],
      )
    }
    const [id, ...others] = await subscriptions()
    expect(others).toEqual([])
    await (client as Redis).client('KILL', 'ID', id!)
    const sid = newSid()
    await calls.producer.store(turn(sid, 0))
    await calls.settled(sid, 2000)
    const [next] = await until('it has subscribed again', async () => {
      const found = await subscriptions()
      return found.length > 0 && found
    })
    expect(next).not.toBe(id)
    expectAtOnce(await latencies(9))
  })
})

test('tables_that_have_grown_since_the_plans_were_made_are_not_scanned', async () => {
  const calls = await Calls.start({ SINK_WORKERS: '1' })
  const round = async () => {
    const sids = seqs(30).map(newSid)
    await calls.producer.store(...sids.flatMap((sid) => [turn(sid, 0), ended(sid, 1)]))
    await calls.idle()
  }
  await round()
  await calls.query('ANALYZE call_transcript_turns, call_events, call_sessions') // so small that a scan is cheapest
  for (let i = 0; i < 10; i++) await round()
  await calls.query(`
    INSERT INTO call_transcript_turns (call_sid, turn_id, speaker, text, spoken_at, stream_id, ingested_at)
      SELECT 'many-' || n / 50, n, 'agent', 'text', now(), '1-' || n, now() FROM generate_series(1, 100000) n;
    INSERT INTO call_events (call_sid, event_id, type, occurred_at, event, stream_id, ingested_at)
      SELECT 'many-' || n / 5, n, 'call.data', now(), '{}', '1-' || n, now() FROM generate_series(1, 10000) n`)
  for (let i = 0; i < 5; i++) await round()
  await calls.stop() // at the end of a connection PostgreSQL adds up what was done on it
  const scanned = await until('PostgreSQL has counted', async () => {
    const [row] = await calls.query(`
      SELECT sum(seq_tup_read)::int AS scanned, sum(idx_scan)::int AS looked_up FROM pg_stat_user_tables
      WHERE relname IN ('call_transcript_turns', 'call_events', 'call_sessions')`)
    return Number(row!.looked_up) >= 16 * 30 && Number(row!.scanned) + 1
  })
  expect(scanned).toBeLessThan(10_000)
  await calls.stack.end()
})

describe.concurrent('sinks', () => {
  test('stop_in_the_middle_of_a_load_finishes_the_batch_and_the_next_start_redelivers_nothing', async () => {
    const calls = await Calls.start({ BATCH_MAX_ROWS: '200' })
    const sids = seqs(200).map(newSid)
    const loading = calls.producer.store(...seqs(100).flatMap((seq) => sids.map((sid) => turn(sid, seq))))
    const count = async () => Number((await calls.query('SELECT count(*) FROM call_transcript_turns'))[0]!.count)
    await until('some turns are there', async () => (await count()) > 0)
    await calls.stop()
    await loading
    const stored = await count()
    expect(stored).toBeGreaterThan(0)
    expect(stored).toBeLessThan(20_000)
    const { redis } = calls.stack
    let read = 0
    for (const sid of sids) read += Number((await groupOf(redis, sid))!['entries-read'] ?? 0)
    expect(read).toBe(stored)
    expect(await redis.client.exists(...redis.partitions.all.map((p) => p.leased))).toBe(0)
    await calls.start()
    await calls.idle()
    expect(await count()).toBe(20_000)
    expect(await calls.metric('turns_total')).toBe(20_000 - stored)
    expect(await calls.metric('staged_batches_total')).toBe(0)
    expect(await calls.metric('duplicate_turns_total')).toBe(0)
    await calls.stack.end()
  })

  test.each([2, 3])('%i_at_once_share_the_work_and_store_every_turn_once', async (sinks) => {
    const calls = await Calls.start({ BATCH_MAX_ROWS: '100' }, sinks)
    const sids = seqs(400).map(newSid)
    await calls.producer.store(...seqs(15).flatMap((seq) => sids.map((sid) => turn(sid, seq))))
    await calls.producer.store(...sids.map((sid) => ended(sid, 15)))
    await calls.idle()
    const [{ complete }] = (await calls.query(
      'SELECT count(*)::int AS complete FROM call_sessions WHERE complete',
    )) as [Row]
    expect(complete).toBe(400)
    const shares = await Promise.all(calls.stack.sinks.map((sink) => calls.metric('turns_total', sink)))
    expect(shares.reduce((a, b) => a + b)).toBe(400 * 15)
    for (const share of shares) expect(share).toBeGreaterThan(400)
    for (const sink of calls.stack.sinks) expect(await calls.metric('duplicate_turns_total', sink)).toBe(0)
    await calls.stack.end()
  })

  test('take_over_from_one_that_died', async () => {
    const calls = await Calls.start({}, 0)
    const { redis } = calls.stack
    const sids = seqs(20).map(newSid)
    await calls.producer.store(...sids.flatMap((sid) => [turn(sid, 0), turn(sid, 1)]))
    const leases = new Leases(redis.client, redis.partitions, 700)
    const dead = await leases.lease(everywhere(redis.partitions), { ...LIMITS, leaseMs: 700 })
    expect(dead.leases.length).toBe(20)
    await calls.producer.store(...sids.map((sid) => turn(sid, 2)))
    await calls.start()
    await calls.idle()
    const rows = await calls.query('SELECT persisted_at FROM call_transcript_turns')
    expect(rows.length).toBe(60)
    const first = Math.min(...rows.map(({ persisted_at }) => (persisted_at as Date).getTime()))
    expect(first, 'while its lease lasts it may be alive').toBeGreaterThanOrEqual(dead.leases[0]!.deadline)
    expect(await calls.metric('reclaimed_total')).toBe(20)
    // It was not dead, only slow: too late.
    const settlements = dead.leases.map((lease) => ({ lease, last: '0-1', count: 1, finalized: false }))
    expect((await leases.settle(settlements)).lapsed).toBe(20)
    expect((await groupOf(redis, sids[0]!))!.lag).toBe(0)
    await calls.stack.end()
  })

  test('which_cannot_listen_leave_nothing_running', async () => {
    const calls = await Calls.start()
    const port = new URL(calls.stack.sinks[0]!.url).port
    const lines: string[] = []
    const spoken = pino({ level: 'info' }, { write: (line) => lines.push(line) })
    const starting = startSink({ ...calls.stack.config, SINK_METRICS_PORT: Number(port) }, spoken)
    await expect(starting).rejects.toThrow(new RegExp(`^SINK_METRICS_PORT: cannot listen on 127.0.0.1:${port}`))
    await sleep(400)
    expect(lines).toEqual([])
    await calls.storeSettled(turn(newSid(), 0))
    await calls.stack.end()
  })

  test('answer_for_their_health', async () => {
    const calls = await Calls.start()
    const { url } = calls.stack.sinks[0]!
    const ask = async (path: string) => {
      const answer = await fetch(`${url}/${path}`)
      return [answer.status, (await answer.text()).trim()]
    }
    expect(await ask('healthz')).toEqual([200, 'ok'])
    expect(await ask('readyz')).toEqual([200, 'ready'])
    expect((await ask('metricz'))[0]).toBe(404)
    await calls.storeSettled(turn('open', 0), turn('over', 0), ended('over'))
    expect(await calls.metric('lag_seconds')).toBe(0)
    expect(await calls.metric('open_calls')).toBe(1)
    expect(await calls.metric('turns_total')).toBe(2)
    expect(await calls.metric('events_total')).toBe(1)
    expect(await calls.metric('calls_finalized_total')).toBe(1)
    await calls.query('ALTER TABLE call_transcript_turns RENAME TO elsewhere')
    await calls.producer.store(turn('open', 1))
    await until('it lags', async () => (await calls.metric('lag_seconds')) > 0.3)
    await calls.query('ALTER TABLE elsewhere RENAME TO call_transcript_turns')
    await calls.settled('open')
    await until('it says so, too', async () => (await calls.metric('lag_seconds')) === 0) // an answer serves for a while
    await calls.stack.end()
  })
})
