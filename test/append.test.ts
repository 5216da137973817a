/** append.lua: what one append does, and what it does not do twice. */
import { afterEach, beforeEach, expect, test } from 'vitest'
import type { CallStatus } from '../shared/event-rules.js'
import type { CallEvent } from '../shared/events.js'
import { freshRedis, type RedisDatabase } from './support/stores.js'
import {
  appendBatch,
  callsIn,
  entriesOf,
  groupOf,
  Producer,
  placesOf,
  seqsOf,
  sessionOf,
  streamOf,
  turn,
} from './support/streams.js'

let redis: RedisDatabase
beforeEach(async () => {
  redis = await freshRedis()
})
afterEach(() => redis.drop())

const sid = 'CA1'

test('the_group_exists_from_the_first_entry', async () => {
  const producer = new Producer(redis)
  await producer.store(turn(sid, 0), turn(sid, 1))
  expect(await groupOf(redis, sid)).toMatchObject({ 'last-delivered-id': '0-0', lag: 2, pending: 0 })
  await producer.store(turn(sid, 2))
  expect(await groupOf(redis, sid)).toMatchObject({ 'last-delivered-id': '0-0', lag: 3 })
})

test('a_call_with_entries_is_ready_since_the_first_of_them_and_open', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 60_000 })
  await producer.store(turn(sid, 0))
  const first = await placesOf(redis, sid)
  expect(Object.keys(first)).toEqual(['ready', 'open'])
  // The script asks for the time before XADD does.
  const [id] = (await entriesOf(redis, sid))[0]!
  expect(Math.abs(first.ready! - Number.parseInt(id, 10))).toBeLessThan(1000)
  expect(first.open! - first.ready!).toBe(60_000 + 60_000 / 16)
  await producer.store(turn(sid, 1))
  expect((await placesOf(redis, sid)).ready).toBe(first.ready)
})

test('each_turn_of_an_open_call_keeps_it_open_for_the_whole_time_and_hardly_longer', async () => {
  const IDLE_MS = 1600
  const producer = new Producer(redis, { idleTimeoutMs: IDLE_MS, disconnectGraceMs: 100 })
  const dues = new Set<number>()
  for (let seq = 0; seq < 40; seq++) {
    await producer.store(turn(sid, seq))
    const [id] = (await entriesOf(redis, sid)).at(-1)!
    const { open } = await placesOf(redis, sid)
    const leftMs = open! - Number.parseInt(id, 10)
    expect(leftMs).toBeGreaterThanOrEqual(IDLE_MS - 1) // the script asks for the time before XADD does
    expect(leftMs).toBeLessThanOrEqual(IDLE_MS + IDLE_MS / 16)
    dues.add(open!)
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  expect(dues.size, 'moved now and then, not with each turn').toBeLessThan(20)
  expect(dues.size).toBeGreaterThan(1)
})

test('a_turn_takes_a_deadline_back_that_a_longer_idle_timeout_has_set', async () => {
  await new Producer(redis, { idleTimeoutMs: 86_400_000 }).store(turn(sid, 0))
  await new Producer(redis, { idleTimeoutMs: 60_000 }).store(turn(sid, 1))
  expect((await placesOf(redis, sid)).open! - Date.now()).toBeLessThan(100_000)
})

test('a_turn_of_a_call_that_seems_over_keeps_it_open_for_the_grace_alone', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 1000, disconnectGraceMs: 60_000 })
  await producer.store(turn(sid, 0), { type: 'call.status', call_sid: sid, status: 'completed' })
  await redis.client.zadd(redis.partitions.of(sid).open, 'XX', Date.now() + 1000, sid)
  await producer.store(turn(sid, 1))
  expect((await placesOf(redis, sid)).open! - Date.now(), 'a grace longer than the idle time').toBeGreaterThan(50_000)
})

test('a_batch_sent_again_is_applied_once', async () => {
  const batch = [{ sid, events: ['{"n":1}', '{"n":2}'], session: ['stage', 'first'] }]
  expect(await appendBatch(redis, 'a', 1, 0, batch)).toEqual([])
  await redis.client.hset(sessionOf(redis, sid), 'stage', 'later')
  expect(await appendBatch(redis, 'a', 1, 0, batch)).toEqual([])
  expect(await redis.client.xlen(streamOf(redis, sid))).toBe(2)
  expect(await redis.client.hgetall(sessionOf(redis, sid))).toEqual({ bytes: '14', stage: 'later' })
  await appendBatch(redis, 'a', 2, 1, [{ sid, events: ['{"n":3}'] }])
  expect(await appendBatch(redis, 'a', 1, 0, batch)).toEqual([])
  expect(await redis.client.xlen(streamOf(redis, sid))).toBe(3)
})

test('the_batches_of_two_producers_are_counted_apart', async () => {
  for (const producer of ['a', 'b']) await appendBatch(redis, producer, 1, 0, [{ sid, events: [`"${producer}"`] }])
  expect((await entriesOf(redis, sid)).map(([, fields]) => fields)).toEqual([
    ['e', '"a"'],
    ['e', '"b"'],
  ])
})

test('a_batch_out_of_order_is_refused_with_GAP', async () => {
  const batch = (n: number) => [{ sid, events: [`${n}`] }]
  await expect(appendBatch(redis, 'a', 2, 0, batch(2)), 'before the first one').rejects.toThrow(/^GAP\b.*batch 1\b/)
  await appendBatch(redis, 'a', 1, 0, batch(1))
  await expect(appendBatch(redis, 'a', 3, 0, batch(3))).rejects.toThrow(/^GAP\b.*batch 2\b/)
  await appendBatch(redis, 'a', 2, 0, batch(2))
  await appendBatch(redis, 'a', 3, 0, batch(3))
  expect((await entriesOf(redis, sid)).map(([, fields]) => fields[1])).toEqual(['1', '2', '3'])
})

test('what_the_producer_knows_to_be_applied_is_no_gap_when_Redis_forgot_it', async () => {
  const batch = (n: number) => [{ sid, events: [`${n}`] }]
  await appendBatch(redis, 'a', 1, 0, batch(1))
  await redis.client.flushdb() // all of it forgotten …
  await expect(appendBatch(redis, 'a', 9, 7, batch(9))).rejects.toThrow(/^GAP\b.*batch 8\b/)
  expect(await appendBatch(redis, 'a', 8, 7, batch(8))).toEqual([])
  expect(await appendBatch(redis, 'a', 15, 14, batch(15)), '… or only the last writes').toEqual([])
  expect((await entriesOf(redis, sid)).map(([, fields]) => fields[1])).toEqual(['8', '15'])
})

test('an_end_status_in_the_session_never_goes_back', async () => {
  const producer = new Producer(redis)
  const seen: (string | null)[] = []
  for (const status of ['ringing', 'in-progress', 'queued', 'completed', 'in-progress', 'failed', 'ringing'] as const) {
    await producer.store({ type: 'call.status', call_sid: sid, status })
    seen.push(await redis.client.hget(sessionOf(redis, sid), 'status'))
  }
  expect(seen).toEqual(['ringing', 'in-progress', 'queued', 'completed', 'completed', 'failed', 'failed'])
  // Within one batch, too.
  const together = (status: CallStatus): CallEvent => ({ type: 'call.status', call_sid: 'CA2', status })
  await producer.store(together('busy'), together('ringing'))
  expect(await redis.client.hget(sessionOf(redis, 'CA2'), 'status')).toBe('busy')
})

test('the_session_holds_what_producers_said_last', async () => {
  const producer = new Producer(redis)
  await producer.store(
    { type: 'call.started', call_sid: sid, ts: 5, direction: 'inbound', from: '+1', to: '+2', provider: 'twilio' },
    { type: 'call.data', call_sid: sid, stage: 'greeting' },
    { type: 'call.data', call_sid: sid, stage: 'offer', data: { a: 1 } },
    { type: 'call.connected', call_sid: sid, connection: 'c1' },
    { type: 'call.ended', call_sid: sid, reason: 'hangup', outcome: 'sold', turn_count: 0 },
  )
  const { bytes, ...session } = await redis.client.hgetall(sessionOf(redis, sid))
  const sizes = (await entriesOf(redis, sid)).map(([, fields]) => fields[1]!.length)
  expect(Number(bytes)).toBe(sizes.reduce((a, b) => a + b))
  expect(session).toEqual({
    started_at: '5',
    direction: 'inbound',
    from: '+1',
    to: '+2',
    provider: 'twilio',
    stage: 'offer',
    connection: 'connected',
    connection_id: 'c1',
    reason: 'hangup',
    outcome: 'sold',
    turn_count: '0',
    ended: '1',
  })
})

test('the_end_of_an_older_connection_that_is_noticed_late_does_not_disconnect_the_call', async () => {
  const producer = new Producer(redis)
  const link = (type: 'call.connected' | 'call.disconnected', connection: string) =>
    producer.store({ type, call_sid: sid, connection })
  const state = () => redis.client.hget(sessionOf(redis, sid), 'connection')
  await link('call.connected', 'half-open')
  await link('call.connected', 'back')
  await link('call.disconnected', 'half-open')
  expect(await state()).toBe('connected')
  await link('call.disconnected', 'back')
  expect(await state()).toBe('disconnected')
})

/** Why calltape presumes a call over is told by whoever looks at what its bot keeps of it. */
const expired: CallEvent = { type: 'call.ended', call_sid: sid, source: 'calltape', reason: 'expired' }
const connected: CallEvent = { type: 'call.connected', call_sid: sid, connection: 'c' }
const hangup: CallEvent = { type: 'call.ended', call_sid: sid, reason: 'hangup' }
const endOf = (call: string) => redis.client.hmget(sessionOf(redis, call), 'ended', 'presumed', 'reason')

test('a_call_that_is_presumed_over_by_its_producer_is_so_in_the_session_until_it_goes_on', async () => {
  const producer = new Producer(redis)
  await producer.store(turn(sid, 0))
  await producer.store(expired)
  expect(await endOf(sid)).toEqual(['presumed', '1', 'expired']) // as reap.lua has it
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['ready'])
  await producer.store({ type: 'call.data', call_sid: sid, stage: 'late' })
  expect(await endOf(sid)).toEqual(['presumed', '1', 'expired'])
  await producer.store(turn(sid, 1))
  expect(await endOf(sid)).toEqual([null, '1', null])
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['ready', 'open'])
})

test.each<[string, 'over' | 'live', CallEvent[]]>([
  ['a turn, the end', 'over', [turn(sid, 0), expired]],
  ['the end, a turn', 'live', [expired, turn(sid, 0)]],
  ['a connection, the end', 'over', [connected, expired]],
  ['the end, a connection', 'live', [expired, connected]],
  ['a turn, the end, a turn', 'live', [turn(sid, 0), expired, turn(sid, 1)]],
  ['the end, a turn, the end', 'over', [expired, turn(sid, 0), expired]],
])('within_one_batch_what_came_last_says_whether_a_call_is_presumed_over: %s', async (_what, state, events) => {
  for (const before of [[], [turn(sid, 7)], [turn(sid, 7), expired]]) {
    await redis.client.flushdb()
    const producer = new Producer(redis)
    for (const event of before) await producer.store(event)
    await producer.store(...events)
    const [ended] = await endOf(sid)
    const places = Object.keys(await placesOf(redis, sid))
    const expected =
      state === 'over' ? { ended: 'presumed', places: ['ready'] } : { ended: null, places: ['ready', 'open'] }
    expect({ ended, places }, `behind ${before.length} events`).toEqual(expected)
  }
})

test.each([false, true])(
  'an_end_that_somebody_said_is_not_presumed_afterwards (in one batch: %s)',
  async (together) => {
    for (const events of [
      [hangup, expired, turn(sid, 0)],
      [expired, hangup, turn(sid, 0)],
    ]) {
      await redis.client.flushdb()
      const producer = new Producer(redis)
      if (together) await producer.store(...events)
      else for (const event of events) await producer.store(event)
      const [ended, , reason] = await endOf(sid)
      expect({ ended, reason }).toEqual({ ended: '1', reason: 'hangup' })
      expect(Object.keys(await placesOf(redis, sid))).toEqual(['ready'])
    }
  },
)

test.each(['stream', 'session'] as const)('a_key_of_another_type_refuses_only_its_own_call: the %s', async (which) => {
  const sids = callsIn(redis.partitions, 7, 3)
  const [before, foreign, behind] = sids as [string, string, string]
  await redis.client.set((which === 'stream' ? streamOf : sessionOf)(redis, foreign), 'of somebody else')
  const producer = new Producer(redis)
  await producer.store(turn('CA1', 0)) // Redis knows the script
  const failures = await producer.failures()
  const answers = await Promise.all(
    [0, 1].flatMap((seq) => sids.map(async (sid) => [sid, seq, (await producer.put(turn(sid, seq)))?.code])),
  )
  expect(answers).toEqual([0, 1].flatMap((seq) => sids.map((s) => [s, seq, s === foreign ? 'not_stored' : undefined])))
  for (const sid of [before, behind]) {
    expect(await seqsOf(redis, sid)).toEqual([0, 1])
    expect(Object.keys(await placesOf(redis, sid))).toEqual(['ready', 'open'])
  }
  expect(await placesOf(redis, foreign)).toEqual({})
  expect(await redis.client.exists(streamOf(redis, foreign))).toBe(which === 'stream' ? 1 : 0)
  // Nothing is left to be tried again, and those who come next are not held up.
  await producer.appender.drain()
  await producer.store(turn(behind, 2))
  expect(await seqsOf(redis, behind)).toEqual([0, 1, 2])
  expect(await producer.failures()).toBe(failures)
  const refused = (await producer.metrics.refused.get()).values.filter(({ value }) => value > 0)
  expect(refused).toMatchObject([{ labels: { code: 'not_stored' }, value: 2 }])
})

test('a_refusal_whose_reply_was_lost_is_said_again', async () => {
  await redis.client.set(streamOf(redis, sid), 'of somebody else')
  const batch = (number: number) =>
    appendBatch(redis, 'p', number, 0, [
      { sid: 'CA2', events: ['{}'] },
      { sid, events: ['{}'] },
    ])
  const said = await batch(1)
  expect(said).toEqual([[2, expect.stringContaining('WRONGTYPE')]])
  expect(await appendBatch(redis, 'p', 2, 0, [{ sid: 'CA3', events: ['{}'] }])).toEqual([])
  expect(await batch(1)).toEqual(said)
  expect(await entriesOf(redis, 'CA2')).toHaveLength(1)
})

test('what_is_kept_of_refusals_does_not_grow_with_the_batches', async () => {
  await redis.client.set(streamOf(redis, sid), 'of somebody else')
  const kept = async () => (await redis.client.hkeys(`${redis.partitions.at(0).producerPrefix}p:refused`)).sort()
  const batch = (number: number, known: number) => appendBatch(redis, 'p', number, known, [{ sid, events: ['{}'] }])
  for (let number = 1; number <= 20; number++) await batch(number, Math.max(0, number - 3))
  expect(await kept()).toEqual(['18', '19', '20'])
  // Those whose reply may have been lost are said again.
  for (const number of [18, 19, 20])
    expect(await batch(number, 17)).toEqual([[1, expect.stringContaining('WRONGTYPE')]])
})

test('a_refusal_names_what_Redis_said', async () => {
  await redis.client.set(streamOf(redis, sid), 'of somebody else')
  const refusal = await new Producer(redis).put(turn(sid, 0))
  expect(refusal).toMatchObject({ code: 'not_stored', message: expect.stringContaining('WRONGTYPE') })
})

test('what_was_stored_of_a_call_before_it_was_refused_is_ready_for_the_sinks', async () => {
  // Redis takes one more entry behind this one.
  await redis.client.xadd(streamOf(redis, sid), '18446744073709551615-18446744073709551614', 'e', '{"n":0}')
  const whole = { sid: 'CA2', events: ['{"n":1}'] }
  const half = { sid, events: ['{"n":1}', '{"n":2}'], session: ['ended', '1'] }
  expect(await appendBatch(redis, 'a', 1, 0, [half, whole])).toEqual([[1, expect.stringContaining('last possible ID')]])
  expect((await entriesOf(redis, sid)).map(([, fields]) => fields[1])).toEqual(['{"n":0}', '{"n":1}'])
  expect(await groupOf(redis, sid)).toMatchObject({ lag: 2 })
  for (const call of [sid, whole.sid]) expect(Object.keys(await placesOf(redis, call))).toEqual(['ready', 'open'])
  expect(await redis.client.hget(sessionOf(redis, sid), 'ended'), 'its end is not stored').toBeNull()
  // With nothing stored there is nothing to tell.
  await redis.client.zrem(redis.partitions.of(sid).ready, sid)
  expect(await appendBatch(redis, 'a', 2, 1, [half])).toHaveLength(1)
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['open'])
})
