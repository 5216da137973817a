/** reap: calls that nobody ends are ended, once, and for the reason that their last word gives. */
import { setTimeout as sleep } from 'node:timers/promises'
import { beforeEach, expect, test } from 'vitest'
import type { CallEvent } from '../shared/events.js'
import type { Leases } from '../sink/lease.js'
import type { Overdue } from '../sink/overdue.js'
import { type RedisDatabase, until } from './support/stores.js'
import {
  callsIn,
  committed,
  entriesOf,
  eventsOf,
  freshLeases,
  leaseAll,
  Producer,
  placesOf,
  sessionOf,
  streamOf,
  take,
  turn,
} from './support/streams.js'

let redis: RedisDatabase
let leases: Leases
let overdue: Overdue
beforeEach(async () => {
  ;({ redis, leases, overdue } = await freshLeases())
})

const sid = 'CA1'
const reapWhenDue = (call = sid) => until('it is due', async () => (await overdue.reap(10)).includes(call))
const ends = async (call = sid) => (await eventsOf(redis, call)).filter((event) => event.type === 'call.ended')

test('a_silent_call_gets_call_ended_with_reason_abandoned_exactly_once', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 30 })
  await producer.store({ type: 'call.started', call_sid: sid }, turn(sid, 0))
  await reapWhenDue()
  expect(await overdue.reap(10)).toEqual([])
  expect(await eventsOf(redis, sid)).toMatchObject([
    { type: 'call.started' },
    { type: 'turn' },
    { type: 'call.ended', call_sid: sid, source: 'calltape', reason: 'abandoned' },
  ])
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['ready'])
})

test.each<[string, CallEvent[]]>([
  ['abandoned', [turn(sid, 0)]],
  ['abandoned', [{ type: 'call.connected', call_sid: sid }]],
  ['abandoned', [{ type: 'call.status', call_sid: sid, status: 'in-progress' }]],
  ['disconnected', [{ type: 'call.disconnected', call_sid: sid }]],
  [
    'abandoned',
    [
      { type: 'call.disconnected', call_sid: sid },
      { type: 'call.connected', call_sid: sid },
    ],
  ],
  ['completed', [{ type: 'call.status', call_sid: sid, status: 'completed' }]],
  ['no-answer', [{ type: 'call.status', call_sid: sid, status: 'no-answer' }]],
  [
    'busy',
    [
      { type: 'call.status', call_sid: sid, status: 'busy' },
      { type: 'call.disconnected', call_sid: sid },
    ],
  ],
])('the_reason_is_what_the_call_looked_like_last: %s', async (reason, events) => {
  const producer = new Producer(redis, { idleTimeoutMs: 10, disconnectGraceMs: 10 })
  for (const event of events) await producer.store(event)
  await reapWhenDue()
  expect(await ends()).toMatchObject([{ source: 'calltape', reason }])
})

test('a_call_is_not_reaped_while_it_is_not_due', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 60_000, disconnectGraceMs: 1 })
  const [talking, gone] = callsIn(redis.partitions, 3, 2) as [string, string]
  await producer.store(turn(talking, 0), { type: 'call.disconnected', call_sid: gone })
  await reapWhenDue(gone)
  expect(await overdue.reap(10)).toEqual([])
  expect(await ends(talking)).toEqual([])
  expect(Object.keys(await placesOf(redis, talking))).toEqual(['ready', 'open'])
})

test('every_event_puts_the_end_off_and_of_a_call_that_seems_over_by_the_grace', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 60_000, disconnectGraceMs: 7000 })
  const events: [CallEvent, number][] = [
    [{ type: 'call.started', call_sid: sid }, 60_000],
    [turn(sid, 0), 60_000],
    [{ type: 'call.disconnected', call_sid: sid }, 7000],
    [turn(sid, 1), 7000],
    [{ type: 'call.connected', call_sid: sid }, 60_000],
    [{ type: 'call.data', call_sid: sid, stage: 'offer' }, 60_000],
    [{ type: 'call.status', call_sid: sid, status: 'completed' }, 7000],
    [{ type: 'call.status', call_sid: sid, recording_url: 'https://example.com/r.mp3' }, 7000],
    [turn(sid, 2), 7000],
  ]
  for (const [event, timeMs] of events) {
    await sleep(2)
    await producer.store(event)
    const [id] = (await entriesOf(redis, sid)).at(-1)!
    const { open } = await placesOf(redis, sid)
    const leftMs = open! - Number.parseInt(id, 10)
    expect(leftMs, `after ${event.type}`).toBeGreaterThan(timeMs - 1000)
    expect(leftMs, `after ${event.type}`).toBeLessThan(timeMs * (17 / 16) + 1000)
  }
})

test('a_call_that_comes_back_after_a_disconnect_has_its_full_time_again', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 60_000, disconnectGraceMs: 20 })
  await producer.store({ type: 'call.disconnected', call_sid: sid })
  await producer.store({ type: 'call.connected', call_sid: sid })
  await sleep(50)
  expect(await overdue.reap(10)).toEqual([])
})

test('no_grace_at_all_ends_a_disconnected_call_at_once', async () => {
  const producer = new Producer(redis, { disconnectGraceMs: 0 })
  await producer.store({ type: 'call.disconnected', call_sid: sid })
  await until('it is reaped', async () => (await overdue.reap(10)).length > 0, 1000)
  expect(await ends()).toMatchObject([{ reason: 'disconnected' }])
})

test('a_call_that_ended_is_not_reaped', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 10, disconnectGraceMs: 10 })
  await producer.store(turn(sid, 0), { type: 'call.ended', call_sid: sid, reason: 'hangup' })
  expect((await placesOf(redis, sid)).open).toBeUndefined()
  await sleep(30)
  expect(await overdue.reap(10)).toEqual([])
  expect(await ends()).toMatchObject([{ reason: 'hangup' }])
})

test.each<[string, CallEvent]>([
  ['a turn', turn(sid, 1)],
  ['the provider saying that it is completed', { type: 'call.status', call_sid: sid, status: 'completed' }],
  ['its connection closing', { type: 'call.disconnected', call_sid: sid }],
])('what_comes_after_the_end_does_not_open_the_call_again: %s', async (_what, late) => {
  const producer = new Producer(redis, { idleTimeoutMs: 10, disconnectGraceMs: 10 })
  await producer.store(turn(sid, 0), { type: 'call.ended', call_sid: sid, reason: 'hangup' })
  await producer.store(late) // no sink has seen the end yet
  expect((await placesOf(redis, sid)).open).toBeUndefined()
  await sleep(30)
  expect(await overdue.reap(10)).toEqual([])
  expect(await ends()).toHaveLength(1)
})

test('within_one_batch_neither', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 10, disconnectGraceMs: 10 })
  await producer.store({ type: 'call.ended', call_sid: sid }, { type: 'call.disconnected', call_sid: sid })
  await sleep(30)
  expect(await overdue.reap(10)).toEqual([])
})

test('a_reaped_call_is_not_reaped_again_for_what_only_adds_to_it', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 10 })
  await producer.store(turn(sid, 0))
  await reapWhenDue()
  await producer.store({ type: 'call.status', call_sid: sid, recording_url: 'https://example.com/r.mp3' })
  await sleep(30)
  expect(await overdue.reap(10)).toEqual([])
  expect(await ends()).toHaveLength(1)
  expect(await eventsOf(redis, sid)).toHaveLength(3)
})

test.each<[string, CallEvent]>([
  ['a turn', turn(sid, 1)],
  ['a new connection', { type: 'call.connected', call_sid: sid, connection: 'c' }],
])('a_reaped_call_that_goes_on_is_open_again_and_reaped_again: %s', async (_what, next) => {
  const producer = new Producer(redis, { idleTimeoutMs: 10 })
  await producer.store(turn(sid, 0))
  await reapWhenDue()
  await producer.store(next)
  expect(await redis.client.hmget(sessionOf(redis, sid), 'ended', 'reason')).toEqual([null, null])
  await reapWhenDue()
  expect(await ends()).toHaveLength(2)
})

test('the_live_session_of_a_reaped_call_says_that_it_ended_and_why', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 10 })
  await producer.store(turn(sid, 0))
  await reapWhenDue()
  expect(await redis.client.hgetall(sessionOf(redis, sid))).toMatchObject({ ended: 'presumed', reason: 'abandoned' })
})

test('many_sinks_that_look_for_silent_calls_end_each_once', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 1 })
  const calls = Array.from({ length: 200 }, (_, c) => `CA${c}`)
  await producer.store(...calls.map((call) => turn(call, 0)))
  await sleep(20)
  const reaped = (await Promise.all(Array.from({ length: 20 }, () => overdue.reap(30)))).flat()
  expect(reaped.toSorted()).toEqual(calls.toSorted())
  for (const call of calls) expect(await ends(call)).toHaveLength(1)
})

test('no_more_calls_are_reaped_at_once_than_asked_for', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 1 })
  await producer.store(...Array.from({ length: 25 }, (_, c) => turn(`CA${c}`, 0)))
  await sleep(20)
  const rounds = [await overdue.reap(10), await overdue.reap(10), await overdue.reap(10), await overdue.reap(10)]
  expect(rounds.map((round) => round.length)).toEqual([10, 10, 5, 0])
})

test('the_end_of_a_leased_call_is_found_when_it_is_settled', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 10 })
  await producer.store(turn(sid, 0))
  const taken = await take(leases, redis)
  await reapWhenDue()
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['leased'])
  await leases.settle([committed(taken)])
  const { lease, entries } = await take(leases, redis)
  expect(lease).toMatchObject({ waiting: 1, read: 1 })
  expect(entries).toEqual((await entriesOf(redis, sid)).slice(1))
})

test('the_end_of_an_idle_call_makes_it_ready', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 100 })
  await producer.store(turn(sid, 0))
  await leases.settle([committed(await take(leases, redis))])
  await reapWhenDue()
  expect((await take(leases, redis)).entries).toEqual((await entriesOf(redis, sid)).slice(1))
})

test('keys_that_are_gone_or_of_another_type_keep_no_other_call_from_its_end', async () => {
  const producer = new Producer(redis, { idleTimeoutMs: 1 })
  const [gone, foreignStream, foreignSession, silent] = callsIn(redis.partitions, 3, 4) as [
    string,
    string,
    string,
    string,
  ]
  for (const call of [gone, foreignStream, foreignSession, silent]) {
    await producer.store(turn(call, 0))
    await sleep(2)
  }
  await redis.client.del(streamOf(redis, gone))
  await redis.client.set(streamOf(redis, foreignStream), 'of somebody else')
  await redis.client.set(sessionOf(redis, foreignSession), 'of somebody else')
  await sleep(10)
  expect(await overdue.reap(10)).toEqual([foreignSession, silent])
  expect(await overdue.reap(10)).toEqual([])
  expect(await ends(foreignSession)).toMatchObject([{ reason: 'abandoned' }])
  expect(await ends(silent)).toHaveLength(1)
  expect((await leaseAll(leases, redis)).map((lease) => lease.callSid).toSorted()).toEqual(
    [foreignSession, silent].toSorted(),
  )
})

test('a_call_that_redis_has_forgotten_but_for_its_stream_waits_since_its_oldest_entry_that_is_not_committed', async () => {
  const producer = new Producer(redis)
  await producer.store(turn(sid, 0))
  await leases.settle([committed(await take(leases, redis))])
  await producer.store(turn(sid, 1))
  const { client, partitions } = redis
  for (const list of ['ready', 'open'] as const) await client.zrem(partitions.of(sid)[list], sid)
  await sleep(5)
  expect(await overdue.end(sid)).toBe(true)
  const ids = (await entriesOf(redis, sid)).map(([id]) => id)
  expect(ids).toHaveLength(3)
  expect(await placesOf(redis, sid)).toEqual({ ready: Number.parseInt(ids[1]!, 10) })
})
