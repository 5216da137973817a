/**
 * A random one of ingest, sink, Redis and PostgreSQL is killed again and again while calls are played. The short form is part of
 * `npm test`; `npm run test:faults` goes on until there were enough kills and enough turns.
 */
import { afterAll, beforeAll, expect, inject, test } from 'vitest'
import { KillableStore, outlivesItsRedis } from '../support/killable-stores.js'
import { Load } from './load.js'
import { Killer, newChance, VICTIMS } from './random.js'
import { expectNoUnexplainedDeaths, type Rig, settled, startRig } from './rig.js'

const ENVIRONMENT = { LEASE_SECONDS: '2', DURABILITY: outlivesItsRedis() }
/** A round is played, comes to its end, and is compared; the next one begins on the same stores. */
const SHORT_ROUND = { calls: 200, turns: 100, rate: 2400 }
const LONG_ROUND = { calls: 500, turns: 175 }
const PROGRESS_MS = 10_000

const long = inject('longFaults')

let redis: KillableStore
let postgres: KillableStore
beforeAll(async () => {
  ;[redis, postgres] = await Promise.all([KillableStore.redis(), KillableStore.postgres()])
})
afterAll(async () => await Promise.all([redis.end(), postgres.end()]))

const TEST_TIMEOUT_MS = long ? 3 * 3600_000 : 120_000

test('random_kills_of_every_process_under_load_lose_and_double_nothing', {
  timeout: TEST_TIMEOUT_MS,
}, async (context) => {
  const rig = await startRig({ context, redis, postgres, environment: ENVIRONMENT })
  const chance = newChance('random kills')
  const loads: Load[] = []
  const killers: Killer[] = []
  const from = performance.now()
  const kills = () => killers.reduce((sum, killer) => sum + killer.total, 0)
  const say = (end = '') => process.stderr.write(`${describeRun(loads, killers, performance.now() - from)}${end}\n`)
  const progress = long && setInterval(() => say(' so far'), PROGRESS_MS)
  try {
    do {
      const killer = new Killer(rig, redis, postgres, chance)
      killers.push(killer)
      const load = new Load(long ? LONG_ROUND : SHORT_ROUND)
      loads.push(load)
      await playRound(rig, killer, load)
    } while (long && (sumOf(loads, 'sent') < long.turns || kills() < long.kills))
  } finally {
    clearInterval(progress)
  }
  expect(kills()).toBeGreaterThan(0)
  say(': missing 0, doubled 0, changed 0, out of order 0, in quarantine 0')
})

async function playRound(rig: Rig, killer: Killer, load: Load): Promise<void> {
  const killed = killer.run()
  try {
    await Promise.all([load.play(rig.url).finally(() => killer.stop()), killed])
  } finally {
    killer.stop()
    await killed.catch(() => undefined) // no store may be on its way up when they are stopped
  }
  await Promise.all([...rig.ingests, ...rig.sinks].map((each) => each.serves()))
  await settled(rig, 120_000)
  await load.expectStored(rig.pool)
  expectNoUnexplainedDeaths(rig)
}

const sumOf = (loads: Load[], figure: 'sent' | 'calls' | 'resent' | 'reconnects' | 'retried') =>
  loads.reduce((sum, load) => sum + load[figure], 0)

/** A client's figures count when it is done. */
function describeRun(loads: Load[], killers: Killer[], ms: number): string {
  const kills = VICTIMS.map((victim) => [victim, killers.reduce((sum, { kills }) => sum + kills[victim], 0)] as const)
  const all = kills.reduce((sum, [, n]) => sum + n, 0)
  const n = (figure: Parameters<typeof sumOf>[1]) => sumOf(loads, figure).toLocaleString('en')
  return (
    `${n('sent')} turns of ${n('calls')} calls, ` +
    `${all} kills (${kills.map(([victim, count]) => `${victim} ${count}`).join(', ')}), ${Math.round(ms / 1000)} s; ` +
    `clients reconnected ${n('reconnects')} times, sent ${n('resent')} events and ${n('retried')} requests again`
  )
}
