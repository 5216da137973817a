/** settle: the cursor moves with what is committed, the lease ends, and nothing that arrived meanwhile is forgotten. */
import { setTimeout as sleep } from 'node:timers/promises'
import { beforeEach, expect, onTestFinished, test, vi } from 'vitest'
import { Hold } from '../sink/hold.js'
import type { Leases } from '../sink/lease.js'
import type { Overdue } from '../sink/overdue.js'
import { givenBack } from '../sink/settle.js'
import { log, type RedisDatabase, until } from './support/stores.js'
import {
  callsIn,
  committed,
  entriesOf,
  freshLeases,
  groupOf,
  LIMITS,
  leaseAll,
  Producer,
  placesOf,
  readAll,
  sessionOf,
  streamOf,
  take,
  turn,
} from './support/streams.js'

let redis: RedisDatabase
let leases: Leases
let overdue: Overdue
let producer: Producer
beforeEach(async () => {
  ;({ redis, leases, overdue, producer } = await freshLeases())
})

const sid = 'CA1'
const msOf = (id: string) => Number.parseInt(id, 10)
const idsOf = async (callSid: string) => (await entriesOf(redis, callSid)).map(([id]) => id)

test('settle_moves_the_cursor_and_XINFO_reports_lag_0_and_nothing_pending', async () => {
  await producer.store(...[0, 1, 2, 3, 4].map((seq) => turn(sid, seq)))
  const ids = await idsOf(sid)
  const partly = await take(leases, redis)
  await leases.settle([committed(partly, 2)])
  expect(await groupOf(redis, sid)).toMatchObject({
    'last-delivered-id': ids[1],
    'entries-read': 2,
    lag: 3,
    pending: 0,
    consumers: 0,
  })
  expect(await leases.settle([committed(await take(leases, redis))])).toEqual({ lapsed: 0, again: [], lost: [] })
  expect(await groupOf(redis, sid)).toMatchObject({
    'last-delivered-id': ids[4],
    'entries-read': 5,
    lag: 0,
    pending: 0,
    consumers: 0,
  })
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['open'])
})

test('a_partly_committed_call_is_ready_again_since_its_oldest_waiting_entry', async () => {
  for (let seq = 0; seq < 3; seq++) {
    await producer.store(turn(sid, seq))
    await sleep(3)
  }
  const ids = await idsOf(sid)
  const { again } = await leases.settle([committed(await take(leases, redis), 1)])
  expect(again).toEqual([redis.partitions.of(sid).partition])
  const places = await placesOf(redis, sid)
  expect(places.ready).toBe(msOf(ids[1]!))
  expect(places.leased).toBeUndefined()
})

test('news_during_a_lease_is_not_lost', async () => {
  await producer.store(turn(sid, 0))
  const taken = await take(leases, redis)
  await sleep(3)
  await producer.store(turn(sid, 1))
  await sleep(3)
  await producer.store(turn(sid, 2))
  expect((await placesOf(redis, sid)).ready).toBeUndefined()
  await sleep(3)
  const { again } = await leases.settle([committed(taken)])
  expect(again).toEqual([redis.partitions.of(sid).partition])
  const ids = await idsOf(sid)
  expect((await placesOf(redis, sid)).ready).toBe(msOf(ids[1]!))
  const next = await take(leases, redis)
  expect(next.entries.map(([id]) => id)).toEqual(ids.slice(1))
})

test('no_event_is_lost_or_read_twice_while_appends_and_sinks_race', async () => {
  const calls = callsIn(redis.partitions, 3, 10)
  const read = new Map<string, string[]>(calls.map((each) => [each, []]))
  let appending = true
  const sink = async () => {
    for (;;) {
      const done = !appending
      const taken = await readAll(redis.client, await leaseAll(leases, redis, { calls: 3 }), LIMITS)
      for (const { lease, entries } of taken) for (const [id] of entries) read.get(lease.callSid)!.push(id)
      const { lapsed } = await leases.settle(taken.map((each) => committed(each)))
      expect(lapsed).toBe(0)
      if (done && taken.length === 0) return
    }
  }
  const sinks = [sink(), sink(), sink()]
  for (let seq = 0; seq < 300; seq++) await producer.store(turn(calls[(seq * 7) % calls.length]!, seq))
  appending = false
  await Promise.all(sinks)
  for (const each of calls) expect(read.get(each)).toEqual(await idsOf(each))
})

test('an_expired_holder_moves_and_releases_nothing', async () => {
  await producer.store(turn(sid, 0), turn(sid, 1), { type: 'call.ended', call_sid: sid })
  const slow = await take(leases, redis, { leaseMs: 20 })
  await until('its lease lapses', async () => (await overdue.reclaim(10)).length > 0)
  expect(await leases.settle([committed(slow, 3, true)]), 'nobody has it yet').toEqual({
    lapsed: 1,
    again: [],
    lost: [],
  })
  const ready = await placesOf(redis, sid)
  expect(Object.keys(ready)).toEqual(['ready'])
  const other = await take(leases, redis)
  const before = [await groupOf(redis, sid), await placesOf(redis, sid)]
  expect(before[1]).toEqual({ leased: other.lease.deadline })

  expect(await leases.settle([committed(slow, 3, true)])).toEqual({ lapsed: 1, again: [], lost: [] })
  expect(await leases.settle([givenBack(slow.lease)])).toEqual({ lapsed: 1, again: [], lost: [] })
  expect([await groupOf(redis, sid), await placesOf(redis, sid)]).toEqual(before)
  expect(before[0]).toMatchObject({ 'last-delivered-id': '0-0', lag: 3 })
  expect(await redis.client.hget(sessionOf(redis, sid), 'lapses')).toBe('1')

  expect(await leases.settle([committed(other)])).toEqual({ lapsed: 0, again: [], lost: [] })
  expect(await groupOf(redis, sid)).toMatchObject({ lag: 0 })
})

test('a_lease_that_lapsed_but_was_not_taken_away_still_settles', async () => {
  await producer.store(turn(sid, 0))
  const slow = await take(leases, redis, { leaseMs: 1 })
  await sleep(10)
  expect(await leases.settle([committed(slow)])).toEqual({ lapsed: 0, again: [], lost: [] })
  expect(await groupOf(redis, sid)).toMatchObject({ lag: 0 })
  expect(await overdue.reclaim(10)).toEqual([])
})

test('giving_back_makes_ready_again_without_progress', async () => {
  await producer.store(turn(sid, 0))
  await leases.settle([committed(await take(leases, redis))])
  await sleep(5)
  await producer.store(turn(sid, 1), turn(sid, 2))
  const ids = await idsOf(sid)
  const group = await groupOf(redis, sid)
  const { lease, entries } = await take(leases, redis)
  const { again } = await leases.settle([givenBack(lease)])
  expect(again).toEqual([lease.partition.partition])
  expect(await groupOf(redis, sid)).toEqual(group)
  const places = await placesOf(redis, sid)
  expect(places.leased).toBeUndefined()
  expect(places.ready, 'since its oldest entry that is not committed').toBe(msOf(ids[1]!))
  expect(await take(leases, redis)).toMatchObject({
    lease: { cursor: ids[0], waiting: 2, read: 1, lapses: 0 },
    entries,
  })
})

test('a_call_that_turned_out_to_have_nothing_new_is_left_alone_when_given_back', async () => {
  await producer.store(turn(sid, 0), turn(sid, 1))
  await leases.settle([committed(await take(leases, redis), 1)])
  await redis.client.xdel(streamOf(redis, sid), (await idsOf(sid))[1]!)
  const { lease, entries } = await take(leases, redis)
  expect(entries).toEqual([])
  // It had not been committed: somebody has deleted it.
  expect(await leases.settle([givenBack(lease)])).toEqual({
    lapsed: 0,
    again: [],
    lost: [{ callSid: sid, entries: 1 }],
  })
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['open'])
})

test('a_finalized_call_moves_from_open_to_ended', async () => {
  const other = 'CA2'
  await producer.store({ type: 'call.ended', call_sid: sid }, turn(other, 0))
  const taken = await readAll(redis.client, await leaseAll(leases, redis), LIMITS)
  const started = Date.now()
  await leases.settle(taken.map((each) => committed(each, 1, each.lease.callSid === sid)))
  const places = await placesOf(redis, sid)
  expect(Object.keys(places)).toEqual(['ended'])
  expect(Math.abs(places.ended! - started)).toBeLessThan(10_000)
  expect(Object.keys(await placesOf(redis, other))).toEqual(['open'])
})

test('late_events_of_a_finalized_call_are_leased_as_such_and_do_not_open_it_again', async () => {
  await producer.store(turn(sid, 0), { type: 'call.ended', call_sid: sid })
  await leases.settle([committed(await take(leases, redis), 2, true)])
  await producer.store(turn(sid, 1))
  const late = await take(leases, redis)
  expect(late.lease).toMatchObject({ finalized: true, waiting: 1, read: 2 })
  await leases.settle([committed(late, 1, true)])
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['ended'])
})

test('late_events_of_a_call_whose_end_a_foreign_writer_appended_are_leased_as_such', async () => {
  await redis.client.xadd(streamOf(redis, sid), '*', 'e', JSON.stringify({ type: 'call.ended', call_sid: sid }))
  await redis.client.zadd(redis.partitions.of(sid).ready, Date.now(), sid)
  await leases.settle([committed(await take(leases, redis), 1, true)])
  await producer.store(turn(sid, 1))
  expect((await take(leases, redis)).lease).toMatchObject({ finalized: true, waiting: 1, read: 1 })
})

test('a_presumed_end_whose_session_somebody_removed_stays_a_presumption', async () => {
  const impatient = new Producer(redis, { idleTimeoutMs: 1 })
  await impatient.store(turn(sid, 0))
  await until('it is reaped', async () => (await overdue.reap(10)).length > 0)
  const taken = await take(leases, redis)
  await redis.client.del(sessionOf(redis, sid))
  await leases.settle([{ ...committed(taken, 2, true), presumed: true }])
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['ended'])
  await producer.store(turn(sid, 1))
  expect(Object.keys(await placesOf(redis, sid)), 'it goes on').toEqual(['ready', 'open'])
})

test('a_call_that_came_back_while_its_presumed_end_was_being_committed_stays_open', async () => {
  const impatient = new Producer(redis, { idleTimeoutMs: 1 })
  await impatient.store(turn(sid, 0))
  await until('it is presumed over', async () => (await overdue.reap(1)).length > 0)
  const end = await take(leases, redis)
  await producer.store(turn(sid, 1))
  await leases.settle([committed(end, 2, true)])
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['ready', 'open'])
  const { lease } = await take(leases, redis)
  expect(lease).toMatchObject({ finalized: false, waiting: 1 })
})

test('a_call_that_comes_back_after_its_presumed_end_was_committed_is_open_again', async () => {
  const impatient = new Producer(redis, { idleTimeoutMs: 1 })
  await impatient.store(turn(sid, 0))
  await until('it is presumed over', async () => (await overdue.reap(1)).length > 0)
  await leases.settle([committed(await take(leases, redis), 2, true)])
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['ended'])
  await producer.store({ type: 'call.status', call_sid: sid, recording_url: 'https://r' })
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['ready', 'ended'])
  await producer.store(turn(sid, 1))
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['ready', 'open'])
})

test('keys_that_are_gone_or_of_another_type_keep_no_other_call_from_being_settled', async () => {
  const calls = callsIn(redis.partitions, 3, 4) as [string, string, string, string]
  const [gone, foreignStream, foreignSession, sound] = calls
  await producer.store(...calls.map((each) => turn(each, 0)))
  const taken = await readAll(redis.client, await leaseAll(leases, redis), LIMITS)
  expect(taken).toHaveLength(4)
  await redis.client.del(streamOf(redis, gone))
  await redis.client.set(streamOf(redis, foreignStream), 'of somebody else')
  await redis.client.set(sessionOf(redis, foreignSession), 'of somebody else')
  expect(await leases.settle(taken.map((each) => committed(each)))).toEqual({ lapsed: 0, again: [], lost: [] })
  for (const each of calls) expect(Object.keys(await placesOf(redis, each))).toEqual(['open'])
  for (const each of [foreignSession, sound]) expect(await groupOf(redis, each)).toMatchObject({ lag: 0 })
})

test('leases_of_several_batches_and_partitions_are_settled_together', async () => {
  const calls = Array.from({ length: 60 }, (_, c) => `CA${c}`)
  await producer.store(...calls.map((each) => turn(each, 0)))
  const taken = []
  for (let batch = 0; batch < 3; batch++) {
    taken.push(...(await leaseAll(leases, redis, { calls: 20, leaseMs: 60_000 + batch * 1000 })))
  }
  expect(new Set(taken.map((lease) => lease.deadline)).size).toBe(3)
  const read = await readAll(redis.client, taken, LIMITS)
  expect(await leases.settle(read.map((each) => committed(each)))).toEqual({ lapsed: 0, again: [], lost: [] })
  for (const each of calls) {
    expect(Object.keys(await placesOf(redis, each))).toEqual(['open'])
    expect(await groupOf(redis, each)).toMatchObject({ lag: 0 })
  }
})

/** What came while the call was leased is for settle to find, whatever Redis' counters say by then. */
test.each<[string, (waiting: string) => Promise<unknown>]>([
  ['whose_group_is_gone', () => redis.client.xgroup('DESTROY', streamOf(redis, sid), 'sink')],
  [
    'whose_group_counts_too_much',
    // After a failover: k entries that a sink has in hand are lost, and k others have come.
    () => redis.client.call('XGROUP', 'SETID', streamOf(redis, sid), 'sink', '0', 'ENTRIESREAD', '2'),
  ],
])('news_of_a_call_%s_is_not_forgotten', async (_state, spoil) => {
  await producer.store(turn(sid, 0), turn(sid, 1))
  const taken = await take(leases, redis)
  taken.lease.read += 1
  await producer.store(turn(sid, 2))
  const [, , waiting] = await idsOf(sid)
  await spoil(waiting!)
  const { again, lost } = await leases.settle([committed(taken)])
  expect({ again, lost }).toEqual({ again: [redis.partitions.of(sid).partition], lost: [] })
  expect((await placesOf(redis, sid)).ready).toBe(msOf(waiting!))
})

test('what_waits_passes_for_all_that_was_added_only_while_something_that_was_read_is_still_there', async () => {
  const countedNow = async () => {
    const { lease } = await take(leases, redis)
    await leases.settle([givenBack(lease)])
    return lease.counted
  }
  await producer.store(turn(sid, 0), turn(sid, 1), turn(sid, 2))
  expect(await countedNow()).toBeUndefined()
  await leases.settle([committed(await take(leases, redis), 1)])
  expect(await countedNow()).toBe(2)
  await redis.client.xtrim(streamOf(redis, sid), 'MAXLEN', 2)
  expect(await countedNow(), 'more may have been trimmed away: newer servers would say the same').toBeUndefined()
})

test('entries_that_are_trimmed_away_while_they_are_leased_are_lost_even_if_as_many_come_instead', async () => {
  await producer.store(turn(sid, 0), turn(sid, 1))
  const lease = (await leaseAll(leases, redis))[0]!
  await redis.client.xtrim(streamOf(redis, sid), 'MAXLEN', 1)
  await producer.store(turn(sid, 2))
  const [read] = await readAll(redis.client, [{ ...lease, waiting: 10 }], LIMITS)
  expect(read!.entries).toHaveLength(2)
  const { lost } = await leases.settle([committed({ ...read!, lease })])
  expect(lost).toEqual([{ callSid: sid, entries: 1 }])
})

test('leases_of_which_some_cannot_be_prolonged_are_settled_by_their_new_deadlines', async () => {
  await producer.store(turn(sid, 0))
  const first = await take(leases, redis)
  await sleep(5)
  await producer.store(turn('CA2', 0))
  const second = await take(leases, redis)
  await leases.prolong([first.lease]) // Redis knows the script from now on
  await sleep(5)
  const { client } = redis
  const evalsha = client.evalsha.bind(client) as (...args: unknown[]) => Promise<unknown>
  const spy = vi.spyOn(client, 'evalsha')
  onTestFinished(() => spy.mockRestore())
  spy.mockImplementationOnce(() => Promise.reject(new Error('the connection is cut')))
  spy.mockImplementationOnce(async (...args: unknown[]) => {
    const reply = await evalsha(...args)
    await sleep(50)
    return reply
  })
  await expect(leases.prolong([first.lease, second.lease])).rejects.toThrow('the connection is cut')
  expect((await leases.settle([committed(second)])).lapsed).toBe(0)
})

test('the_entry_that_a_call_was_suspected_for_is_forgotten_only_by_a_sink_that_has_tried_it', async () => {
  await producer.store(turn(sid, 0))
  await redis.client.hset(sessionOf(redis, sid), { lapses: 1, alone: '1-1' })
  const aloneAfter = async (isTried: boolean) => {
    const { lease } = await take(leases, redis)
    const hold = new Hold(leases, [lease], LIMITS.leaseMs, log)
    if (isTried) hold.tries([lease])
    await hold.end()
    return redis.client.hmget(sessionOf(redis, sid), 'alone', 'lapses')
  }
  expect(await aloneAfter(false)).toEqual(['1-1', '1'])
  expect(await aloneAfter(true)).toEqual([null, '1'])
})
