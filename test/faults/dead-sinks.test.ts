/** Sinks that die, or sleep, with calls in hand. */
import { setTimeout as sleep } from 'node:timers/promises'
import { expect, test } from 'vitest'
import type { Service } from '../support/processes.js'
import { until } from '../support/stores.js'
import { groupOf, streamOf } from '../support/streams.js'
import { Load } from './load.js'
import { backlogOf, figureOf, type Rig, settled, startRig, TIMEOUT_MS } from './rig.js'

const LEASE_MS = 2000
/** Of a sink, by default. */
const WORKERS = 2
const ENVIRONMENT = { LEASE_SECONDS: String(LEASE_MS / 1000), DATABASE_TIMEOUT: '3', BATCH_MAX_ROWS: '500' }

test.concurrent('a_sink_killed_with_leases_in_hand_is_replaced_by_the_other', {
  timeout: TIMEOUT_MS,
}, async (context) => {
  const arms = [{ CRASH_AT: 'before-commit:5' }]
  const plan = { environment: ENVIRONMENT, sinkEnvironments: arms, unsupervised: true }
  const rig = await startRig({ context, ingests: 1, ...plan })
  const [dead, other] = rig.sinks
  const load = new Load({ calls: 80, turns: 40, rate: 2000 })
  const played = load.play(rig.url)
  await until('it is dead', () => dead!.deaths.length > 0)
  expect((await backlogOf(rig)).leased).toBeGreaterThan(0)
  await played
  await load.expectStored(rig.pool)
  await settled(rig)
  expect(dead!.deaths).toMatchObject([{ signal: 'SIGKILL', wanted: false }])
  expect(await figureOf(other!, 'reclaimed_total')).toBeGreaterThan(0)
})

const lateClaim = 'a_sink_that_wakes_up_after_its_leases_doubles_nothing_and_moves_no_cursor_back'
test.concurrent(lateClaim, { timeout: TIMEOUT_MS }, async (context) => {
  // One batch, and time to write it even then.
  const sinkEnvironments = [{ SINK_WORKERS: '1', DATABASE_TIMEOUT: '600' }]
  const relays = { sinkPostgres: 'first' as const }
  const rig = await startRig({ context, ingests: 1, environment: ENVIRONMENT, sinkEnvironments, relays })
  const [sleeper, other] = rig.sinks
  const relay = rig.relays.sinkPostgres!
  const batchesOf = (sink: Service) => figureOf(sink, 'batch_rows_count')
  const warmUp = new Load({ calls: 80, turns: 2 })
  await warmUp.play(rig.url)
  await warmUp.expectStored(rig.pool)
  await settled(rig)
  const before = await batchesOf(sleeper!)
  const load = new Load({ calls: 80, turns: 40, rate: 2000 })
  relay.holdRequests = true
  const played = load.play(rig.url)
  await until('it has a batch in hand', () => relay.holdsRequests)
  sleeper!.signal('SIGSTOP')
  await played
  await load.expectStored(rig.pool)
  await settled(rig)
  const batches = await batchesOf(other!)
  relay.release()
  sleeper!.signal('SIGCONT')
  await until('it has written its batch', async () => (await batchesOf(sleeper!)) > before)
  await sleep(500)
  await settled(rig)
  await load.expectStored(rig.pool)
  await expectCursorsAtTheEnd(rig, load)
  // A cursor moved back would have made ready again what is stored, for either of them.
  expect([await batchesOf(sleeper!), await batchesOf(other!)]).toEqual([before + 1, batches])
})

const openClaim = 'a_sink_stopped_with_an_open_transaction_does_not_keep_the_other_from_its_calls'
test.concurrent(openClaim, { timeout: TIMEOUT_MS }, async (context) => {
  const rig = await startRig({ context, ingests: 1, environment: { ...ENVIRONMENT, DATABASE_TIMEOUT: '600' } })
  const [sleeper] = rig.sinks
  const load = new Load({ calls: 80, turns: 40, rate: 2000 })
  const locker = await rig.pool.connect()
  await locker.query('BEGIN; LOCK TABLE call_sessions IN EXCLUSIVE MODE')
  const played = load.play(rig.url)
  const waiting = `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`
  const areWaiting = async () => (await rig.pool.query(waiting)).rowCount === 2 * WORKERS
  await until('all workers have written turns, and wait to write their calls', areWaiting)
  sleeper!.signal('SIGSTOP')
  await locker.query('COMMIT')
  locker.release()
  await played
  await load.expectStored(rig.pool)
  sleeper!.signal('SIGCONT')
  await settled(rig)
  await load.expectStored(rig.pool)
  await expectCursorsAtTheEnd(rig, load)
})

async function expectCursorsAtTheEnd(rig: Rig, load: Load): Promise<void> {
  const store = { client: rig.redis, partitions: rig.partitions }
  for (const run of load.runs) {
    for (let call = 0; call < run.calls; call++) {
      const sid = `${run.prefix}${call}`
      const [last] = await rig.redis.xrevrange(streamOf(store, sid), '+', '-', 'COUNT', 1)
      expect([sid, (await groupOf(store, sid))?.['last-delivered-id']]).toEqual([sid, last?.[0]])
    }
  }
}
