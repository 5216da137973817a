/** What Redis loses under calltape's feet (trimmed, deleted, flushed, demoted): noticed, counted, and survived. */
import type { Redis } from 'ioredis'
import { pino } from 'pino'
import { describe, expect, type TestContext, test } from 'vitest'
import { Partitions } from '../shared/keys.js'
import { createSinkMetrics } from '../shared/metrics.js'
import { connectRedis, warnOfLoss } from '../shared/redis.js'
import { Overdue } from '../sink/overdue.js'
import { endStrays } from '../sink/strays.js'
import { Calls, ended, newSid, seqs } from './support/calls.js'
import { Relay } from './support/relay.js'
import { log, until } from './support/stores.js'
import { groupOf, ownRedis, Producer, seqsOf, streamOf, turn } from './support/streams.js'

async function startCalls({ onTestFinished }: Pick<TestContext, 'onTestFinished'>, sinks: number): Promise<Calls> {
  const calls = await Calls.start({}, sinks)
  onTestFinished(() => calls.stack.end())
  return calls
}
const stored = async (calls: Calls, sid: string) => (await calls.turns(sid)).map((row) => row.seq)

describe.concurrent('entries', () => {
  test('trimmed_away_before_they_were_committed_are_counted_as_lost_once', async (context) => {
    const calls = await startCalls(context, 1)
    const { redis } = calls.stack
    const sid = newSid()
    await calls.storeSettled(turn(sid, 0), turn(sid, 1))
    await calls.stop()
    await calls.producer.store(...seqs(10, 2).map((seq) => turn(sid, seq)))
    await redis.client.xtrim(streamOf(redis, sid), 'MAXLEN', 4)
    await calls.start()
    await calls.settled(sid)
    expect(await calls.metric('lost_entries_total')).toBe(6)
    await calls.storeSettled(turn(sid, 12), ended(sid, 13))
    expect(await calls.metric('lost_entries_total')).toBe(6)
    expect(await stored(calls, sid)).toEqual([0, 1, 8, 9, 10, 11, 12])
    expect(await calls.session(sid)).toMatchObject({ complete: false })
    expect(await groupOf(redis, sid)).toMatchObject({ lag: 0 })
  })

  test('deleted_from_the_middle_are_counted_as_lost', async (context) => {
    const calls = await startCalls(context, 0)
    const { redis } = calls.stack
    const sid = newSid()
    await calls.producer.store(...seqs(5).map((seq) => turn(sid, seq)))
    const ids = (await redis.client.xrange(streamOf(redis, sid), '-', '+')).map(([id]) => id)
    await redis.client.xdel(streamOf(redis, sid), ids[1]!, ids[3]!)
    await calls.start()
    await until('all that is left is stored', async () => (await stored(calls, sid)).length === 3)
    await calls.idle()
    expect(await calls.metric('lost_entries_total')).toBe(2)
  })

  test('trimmed_away_after_they_were_committed_are_no_loss', async (context) => {
    const calls = await startCalls(context, 1)
    const { redis } = calls.stack
    const sid = newSid()
    for (let round = 0; round < 3; round++) {
      await calls.storeSettled(...seqs(4, round * 4).map((seq) => turn(sid, seq)))
      await redis.client.xtrim(streamOf(redis, sid), 'MAXLEN', round)
    }
    expect(await stored(calls, sid)).toEqual(seqs(12))
    expect(await calls.metric('lost_entries_total')).toBe(0)
  })

  test('whose_whole_stream_was_deleted_are_counted_and_the_call_goes_on_in_a_new_one', async (context) => {
    const calls = await startCalls(context, 0)
    const { redis } = calls.stack
    const [sid, other] = [newSid(), newSid()]
    await calls.producer.store(turn(sid, 0), turn(other, 0))
    await redis.client.del(streamOf(redis, sid))
    await calls.start()
    await calls.settled(other)
    await until('it is counted', async () => (await calls.metric('lost_streams_total')) === 1)
    await calls.producer.store(turn(sid, 1))
    await calls.settled(sid)
    expect(await stored(calls, sid)).toEqual([1])
  })

  test('of_a_group_that_was_destroyed_are_read_again_from_the_start_and_doubled_nowhere', async (context) => {
    const calls = await startCalls(context, 1)
    const { redis } = calls.stack
    const sid = newSid()
    await calls.storeSettled(...seqs(5).map((seq) => turn(sid, seq)))
    await redis.client.xgroup('DESTROY', streamOf(redis, sid), 'sink')
    await calls.storeSettled(turn(sid, 5), ended(sid, 6))
    expect(await stored(calls, sid)).toEqual(seqs(6))
    expect(await calls.session(sid)).toMatchObject({ complete: true })
    expect(await calls.metric('duplicate_turns_total')).toBe(5)
    expect(await calls.metric('lost_entries_total')).toBe(0)
  })

  test('that_are_not_UTF_8_are_quarantined_byte_for_byte', async (context) => {
    const calls = await startCalls(context, 1)
    const { redis } = calls.stack
    const sid = newSid()
    const bytes = Buffer.from([0x7b, 0xff, 0xfe, 0x00, 0x7d])
    await redis.client.xadd(streamOf(redis, sid), '*', 'e', bytes, 'naïve', 'plain')
    await redis.client.zadd(redis.partitions.of(sid).ready, Date.now(), sid)
    await calls.settled(sid)
    const [row] = await calls.quarantined(sid)
    expect(JSON.parse(String(row!.raw))).toEqual(['e', { base64: bytes.toString('base64') }, 'naïve', 'plain'])
  })
})

describe.concurrent('a Redis', () => {
  test('that_was_flushed_is_used_again_and_the_live_calls_it_has_forgotten_are_ended', async (context) => {
    const calls = await startCalls(context, 1)
    const { redis, database } = calls.stack
    const [old, fresh, over] = [newSid(), newSid(), newSid()]
    const hourAgo = Date.now() - 3_600_000
    await calls.storeSettled(
      { type: 'call.started', call_sid: old, ts: hourAgo },
      { ...turn(old, 0), ts: hourAgo },
      turn(fresh, 0),
      turn(over, 0),
      ended(over, 1),
    )
    await redis.client.flushdb()
    await until('the number of partitions is known again', () => redis.client.exists('ct:partitions').then(Boolean))
    const overdue = new Overdue(redis.client, redis.partitions)
    const metrics = createSinkMetrics()
    for (let round = 0; round < 2; round++) await endStrays({ pool: database.pool, overdue, metrics, log }, 60_000)
    const row = await until('it is finalized', async () => {
      const session = await calls.session(old)
      return session?.finalized_at ? session : undefined
    })
    expect(row).toMatchObject({ end_reason: 'abandoned', turn_count: 1, ended_at: new Date(hourAgo) })
    expect((await metrics.strays.get()).values[0]?.value).toBe(1)
    expect(await calls.session(fresh)).toMatchObject({ finalized_at: null }) // silent for too short a time
    // A call that was going on all the while goes on, in a stream made anew.
    await calls.storeSettled(turn(fresh, 1), ended(fresh, 2))
    expect(await calls.session(fresh)).toMatchObject({ complete: true, turn_count: 2 })
  })

  test('that_was_demoted_and_lives_on_is_left_for_the_new_primary', async ({ onTestFinished }) => {
    const [old, next] = await Promise.all([ownRedis(), ownRedis()])
    const relay = await Relay.start(old.url, next.url) // the next connection leads to the next one
    const partitions = new Partitions(64)
    const [client, admin] = [await connectRedis(relay.url, log), await connectRedis(old.url, log)]
    const direct = { client: (await connectRedis(next.url, log)) as Redis, partitions }
    onTestFinished(async () => {
      for (const each of [client, admin, direct.client]) each.disconnect()
      await Promise.all([relay.stop(), old.stop(), next.stop()])
    })
    const producer = new Producer({ client, partitions })
    await producer.store(turn('CA1', 0))
    await (admin as Redis).replicaof(next.peer.host, next.peer.port)
    await producer.store(turn('CA1', 1))
    expect(await seqsOf(direct, 'CA1')).toEqual([1])
  })

  test('that_may_evict_or_keeps_nothing_on_disk_is_warned_of', async ({ onTestFinished }) => {
    const server = await ownRedis()
    const client = (await connectRedis(server.url, log)) as Redis
    onTestFinished(async () => {
      client.disconnect()
      await server.stop()
    })
    const warnings = async () => {
      const lines: string[] = []
      await warnOfLoss(client, pino({ base: null }, { write: (line) => lines.push(JSON.parse(line).msg) }))
      return lines
    }
    await client.config('SET', 'appendonly', 'yes')
    await client.config('SET', 'maxmemory-policy', 'noeviction')
    expect(await warnings()).toEqual([])
    await client.config('SET', 'maxmemory-policy', 'allkeys-lru')
    await client.config('SET', 'appendonly', 'no')
    expect(await warnings()).toEqual([
      expect.stringMatching(/may evict .* set maxmemory-policy noeviction$/),
      expect.stringMatching(/no append-only file, .* set appendonly yes$/),
    ])
  })

  test('that_is_full_acks_nothing_and_goes_on_when_there_is_room', async ({ onTestFinished }) => {
    const server = await ownRedis()
    const client = (await connectRedis(server.url, log)) as Redis
    const store = { client, partitions: new Partitions(64) }
    onTestFinished(async () => {
      client.disconnect()
      await server.stop()
    })
    const producer = new Producer(store)
    await producer.store(turn('CA1', 0))
    await client.config('SET', 'maxmemory', '1mb')
    const waiting = producer.store(turn('CA1', 1))
    await until('it is refused', async () => (await producer.failures()) > 1)
    expect(producer.appender.failure).toMatch(/OOM/)
    expect(await seqsOf(store, 'CA1')).toEqual([0])
    await client.config('SET', 'maxmemory', '0')
    await waiting
    expect(await seqsOf(store, 'CA1')).toEqual([0, 1])
  })
})
