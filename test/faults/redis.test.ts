/** A Redis that is restarted, flushed, or loses its groups, under load. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Redis } from 'ioredis'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { verifyCalls } from '../../cli/compare.js'
import { expectedCalls } from '../../cli/load.js'
import { GROUP } from '../../shared/keys.js'
import { KillableStore, outlivesItsRedis } from '../support/killable-stores.js'
import { until } from '../support/stores.js'
import { Load } from './load.js'
import { expectNoUnexplainedDeaths, figureOf, type Rig, settled, startRig, TIMEOUT_MS } from './rig.js'

const ENVIRONMENT = { LEASE_SECONDS: '2', DURABILITY: outlivesItsRedis() }

let redis: KillableStore
beforeAll(async () => {
  redis = await KillableStore.redis()
})
afterAll(async () => await redis.end())

test('a_Redis_restarted_from_its_append_only_file_under_load_loses_and_doubles_nothing', {
  timeout: TIMEOUT_MS,
}, async (context) => {
  const rig = await startRig({ context, redis, environment: ENVIRONMENT })
  const load = new Load({ calls: 100, turns: 60, rate: 2000 })
  const restart = async () => {
    for (const signal of ['SIGKILL', 'SIGTERM', 'SIGKILL'] as const) {
      await sleep(700)
      await redis.restart(signal)
    }
  }
  await Promise.all([load.play(rig.url), restart()])
  await load.expectStored(rig.pool)
  await settled(rig)
  expectNoUnexplainedDeaths(rig)
})

test('a_Redis_flushed_under_load_takes_nothing_committed_and_doubles_nothing_and_goes_on', {
  timeout: TIMEOUT_MS,
}, async (context) => {
  const rig = await startRig({ context, redis, environment: ENVIRONMENT })
  const load = new Load({ calls: 100, turns: 60, rate: 3000 })
  const played = load.play(rig.url)
  for (const table of ['first', 'second']) {
    await sleep(600)
    await rig.pool.query(
      `CREATE TABLE ${table} AS SELECT call_sid, turn_id, text, spoken_at FROM call_transcript_turns`,
    )
    await rig.redis.flushall()
  }
  await played
  await settled(rig)
  for (const table of ['first', 'second']) expect(await lostSince(rig, table)).toBe(0)
  for (const run of [load.numbered, load.http]) {
    const { counts, differences } = await verifyCalls(rig.pool, run.prefix, expectedCalls(run))
    const report = JSON.stringify(differences.filter(({ kind }) => kind !== 'missing' && kind !== 'call row'))
    expect(counts, report).toMatchObject({ doubled: 0, changed: 0, 'out of order': 0, unexpected: 0 })
  }
  const keyless = `SELECT count(*)::int - count(DISTINCT (call_sid, text))::int AS doubled FROM call_transcript_turns
    WHERE call_sid LIKE $1 || '%'`
  expect((await rig.pool.query(keyless, [load.keyless.prefix])).rows).toEqual([{ doubled: 0 }])
  const afterwards = new Load({ calls: 30, turns: 30 })
  await afterwards.play(rig.url)
  await afterwards.expectStored(rig.pool)
  expect([...rig.ingests, ...rig.sinks].flatMap((each) => each.deaths)).toEqual([])
})

const subscriptionClaim = 'a_sink_that_is_cut_off_while_it_subscribes_again_lives_and_is_woken_afterwards'
test(subscriptionClaim, { timeout: TIMEOUT_MS }, async (context) => {
  const rig = await startRig({ context, redis, ingests: 1, sinks: 1, relays: { sinkRedis: true } })
  const relay = rig.relays.sinkRedis!
  const { wake } = rig.partitions.at(0)
  const areSubscribed = async (count: number) => {
    const [, subscribers] = (await (rig.redis as Redis).call('PUBSUB', 'SHARDNUMSUB', wake)) as [string, number]
    return subscribers === count
  }
  await until('it is subscribed', () => areSubscribed(1))
  relay.onChunk = (data) => {
    if (!data.includes('ssubscribe')) return 'pass'
    relay.onChunk = undefined
    return 'drop'
  }
  relay.cut()
  await until('it has tried to subscribe', () => relay.onChunk === undefined)
  await until('it is subscribed again', () => areSubscribed(1))
  const load = new Load({ calls: 10, turns: 10 })
  await load.play(rig.url)
  await load.expectStored(rig.pool)
  expect(rig.sinks[0]!.deaths).toEqual([])
})

test('groups_destroyed_under_load_are_made_again_and_their_calls_read_from_the_start', {
  timeout: TIMEOUT_MS,
}, async (context) => {
  const rig = await startRig({ context, ingests: 1, environment: { LEASE_SECONDS: '2' } })
  const load = new Load({ calls: 60, turns: 60, rate: 2000 })
  const played = load.play(rig.url)
  await sleep(800)
  for (let call = 0; call < 20; call++) {
    const sid = `${load.numbered.prefix}${call}`
    await rig.redis.xgroup('DESTROY', rig.partitions.of(sid).streamPrefix + sid, GROUP)
    await sleep(10)
  }
  await played
  await load.expectStored(rig.pool)
  await settled(rig)
  expectNoUnexplainedDeaths(rig)
  const duplicates = await Promise.all(rig.sinks.map((sink) => figureOf(sink, 'duplicate_turns_total')))
  expect(duplicates.reduce((a, b) => a + b, 0)).toBeGreaterThan(0)
})

async function lostSince(rig: Rig, snapshot: string): Promise<number> {
  const sql = `SELECT count(*)::int AS n FROM
    (TABLE ${snapshot} EXCEPT SELECT call_sid, turn_id, text, spoken_at FROM call_transcript_turns) lost`
  return (await rig.pool.query<{ n: number }>(sql)).rows[0]!.n
}
