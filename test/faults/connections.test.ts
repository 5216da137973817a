/** Connections that are cut (also in the middle of a reply), late, held up, or end without a word. */
import { setTimeout as sleep } from 'node:timers/promises'
import { test, vi } from 'vitest'
import { Load } from './load.js'
import { disturb, newChance } from './random.js'
import { expectNoUnexplainedDeaths, type Rig, type RigPlan, settled, startRig, TIMEOUT_MS } from './rig.js'

vi.setConfig({ maxConcurrency: 5 }) // they wait for timeouts most of the time

const WAYS: {
  way: string
  relays: NonNullable<RigPlan['relays']>
  relay: (rig: Rig) => Rig['balancer'] | undefined
}[] = [
  { way: 'from_clients_to_ingest', relays: {}, relay: (rig) => rig.balancer },
  { way: 'from_ingest_to_Redis', relays: { ingestRedis: true }, relay: (rig) => rig.relays.ingestRedis },
  { way: 'from_sink_to_Redis', relays: { sinkRedis: true }, relay: (rig) => rig.relays.sinkRedis },
  { way: 'from_sink_to_PostgreSQL', relays: { sinkPostgres: 'all' }, relay: (rig) => rig.relays.sinkPostgres },
]

const ENVIRONMENT = { LEASE_SECONDS: '2', DATABASE_TIMEOUT: '3' }
const DISTURB_MS = 3000

for (const { way, relays, relay } of WAYS) {
  test.concurrent(`connections_${way}_cut_and_delayed_lose_and_double_nothing`, {
    timeout: TIMEOUT_MS,
  }, async (context) => {
    const rig = await startRig({ context, relays, environment: ENVIRONMENT })
    const load = new Load({ calls: 100, turns: 40, rate: 1500 })
    const chance = newChance(`connections ${way}`)
    await Promise.all([load.play(rig.url), disturb(relay(rig)!, chance, DISTURB_MS)])
    await expectOver(rig, load)
  })
}

for (const { way, relays, relay } of WAYS) {
  const claim = `connections_${way}_gone_without_a_word_lose_and_double_nothing`
  test.concurrent(claim, { timeout: TIMEOUT_MS }, async (context) => {
    const rig = await startRig({ context, relays, environment: ENVIRONMENT })
    const load = new Load({ calls: 100, turns: 20, rate: 1500 })
    const gone = async () => {
      await sleep(500)
      relay(rig)!.forget()
    }
    await Promise.all([load.play(rig.url), gone()])
    await expectOver(rig, load)
  })
}

async function expectOver(rig: Rig, load: Load): Promise<void> {
  await load.expectStored(rig.pool, 40_000)
  await settled(rig)
  expectNoUnexplainedDeaths(rig)
}
