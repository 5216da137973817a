/** late: what comes late for a call that has left Redis does not end it once more. */
import { setTimeout as sleep } from 'node:timers/promises'
import { beforeEach, expect, test } from 'vitest'
import type { Pool } from '../shared/postgres.js'
import { closeFinal } from '../sink/late.js'
import type { Leases } from '../sink/lease.js'
import type { Overdue } from '../sink/overdue.js'
import type { RedisDatabase } from './support/stores.js'
import { committed, entriesOf, freshLeases, Producer, placesOf, streamOf, take, turn } from './support/streams.js'

let redis: RedisDatabase
let leases: Leases
let overdue: Overdue
let producer: Producer
beforeEach(async () => {
  ;({ redis, leases, overdue } = await freshLeases())
  producer = new Producer(redis, { idleTimeoutMs: 1 })
})

const sid = 'CA1'
const closed = async (final: string[]) => {
  const query = async () => ({ rows: final.map((call_sid) => ({ call_sid })) })
  const { calls } = await closeFinal(redis.client, { query } as unknown as Pool, redis.partitions, 500)
  return calls.map(({ callSid }) => callSid).toSorted()
}
const commit = async () => leases.settle([committed(await take(leases, redis))])

test('a_call_that_postgresql_was_not_asked_about_is_not_presumed_over', async () => {
  await producer.store(turn('CA1', 0), turn('CA2', 0), turn('CA3', 0))
  await sleep(5)
  const asked = { callSid: 'CA2', partition: redis.partitions.of('CA2') }
  expect(await overdue.reap(10, [asked])).toEqual(['CA2'])
  expect(await overdue.reap(10, [])).toEqual([])
  expect((await overdue.reap(10)).toSorted()).toEqual(['CA1', 'CA3'])
})

test('of_the_calls_that_are_due_those_that_are_final_are_closed_and_all_others_may_be_presumed_over', async () => {
  await producer.store(turn(sid, 0))
  await commit()
  await producer.store(turn('CA2', 0))
  await new Producer(redis).store(turn('CA3', 0)) // not due
  await sleep(5)
  expect(await closed([sid])).toEqual(['CA2'])
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['ended'])
  expect(await entriesOf(redis, sid)).toHaveLength(1)
})

test('a_final_call_of_which_something_is_not_committed_is_put_off_until_it_is', async () => {
  await producer.store(turn(sid, 0)) // PostgreSQL was away for longer than the call was silent
  await sleep(5)
  expect(await closed([sid])).toEqual([])
  const { open } = await placesOf(redis, sid)
  expect(open).toBeGreaterThan(Date.now())
  await commit()
  await redis.client.zadd(redis.partitions.of(sid).open, 1, sid)
  expect(await closed([sid])).toEqual([])
  expect(Object.keys(await placesOf(redis, sid))).toEqual(['ended'])
})

test('a_call_whose_stream_is_gone_is_not_put_off_for_ever', async () => {
  await producer.store(turn(sid, 0))
  await commit()
  await redis.client.del(streamOf(redis, sid))
  await sleep(5)
  expect(await closed([sid])).toEqual([sid])
})
