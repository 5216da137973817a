/** Redis users on a Cluster who may do what the README says, and no more: through moves of slots and failovers nothing is refused. */
import { Command } from 'ioredis'
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest'
import { startIngest } from '../../ingest/ingest.js'
import { readConfig } from '../../shared/config.js'
import { Partitions } from '../../shared/keys.js'
import { aclRules, CLUSTER_RULES, type RedisRole } from '../../shared/redis-access.js'
import { startSink } from '../../sink/sink.js'
import { ended, newSid, seqs } from '../support/calls.js'
import { figure } from '../support/metrics.js'
import { calltape } from '../support/program.js'
import { type Database, freshDatabase, log, until } from '../support/stores.js'
import { callsIn, turn } from '../support/streams.js'
import { TestCluster } from '../support/test-cluster.js'

const ROLES: RedisRole[] = ['ingest', 'sink', 'commands']
const PASSWORD = 'secret'

let cluster: TestCluster
let database: Database
beforeAll(async () => {
  cluster = await TestCluster.start()
  database = await freshDatabase()
  for (const { peer } of cluster.servers) {
    for (const role of ROLES) {
      const rules = ['reset', 'on', `>${PASSWORD}`, ...aclRules(role), ...CLUSTER_RULES]
      await cluster.client(peer.port).acl('SETUSER', `calltape-${role}`, ...rules)
    }
  }
})
afterAll(async () => {
  await cluster?.stop()
  await database?.drop()
})

const environmentOf = (role: RedisRole) => ({
  REDIS_URL: cluster.url.replaceAll('redis://', `redis://calltape-${role}:${PASSWORD}@`),
  ...{ DATABASE_URL: database.url, INGEST_PORT: '0', SINK_METRICS_PORT: '0', LEASE_SECONDS: '2' },
  ...{ STREAM_RETENTION: '10', SWEEP_INTERVAL: '1', DISCONNECT_GRACE: '0' },
})

/** What users were refused, whichever server they asked. */
async function refusals(): Promise<string[]> {
  const found: string[] = []
  for (const { peer } of cluster.servers) {
    const entries = (await cluster.client(peer.port).acl('LOG')) as unknown as unknown[][]
    const field = (entry: unknown[], name: string) => String(entry[entry.indexOf(name) + 1])
    found.push(...entries.map((entry) => ['username', 'reason', 'object'].map((name) => field(entry, name)).join(' ')))
  }
  return found
}

test('the_users_of_the_README_may_do_on_a_Cluster_all_that_is_needed_and_nothing_is_refused_to_them', async () => {
  const ingest = await startIngest(readConfig({ ...environmentOf('ingest'), DURABILITY: 'redis' }), log)
  onTestFinished(() => ingest.stop())
  const sink = await startSink(readConfig(environmentOf('sink')), log)
  onTestFinished(() => sink.stop())
  const post = async (events: object[]) => {
    const options = { method: 'POST', body: JSON.stringify(events), headers: { 'Content-Type': 'application/json' } }
    return (await fetch(`${ingest.url}/v1/events`, options)).status
  }
  const stored = (sid: string) =>
    until(`${sid} is final`, async () => {
      const sql = 'SELECT complete FROM call_sessions WHERE call_sid = $1 AND finalized_at IS NOT NULL'
      return (await database.pool.query<{ complete: boolean }>(sql, [sid])).rows[0]?.complete
    })
  const runs = async (...args: string[]) => {
    const { code, err } = await calltape(args, environmentOf('commands'))
    expect({ args, code, err }).toEqual({ args, code: 0, err: expect.any(String) })
  }
  const [whole, erased] = [newSid(), newSid()]
  for (const sid of [whole, erased])
    expect(await post([...seqs(3).map((seq) => turn(sid, seq)), ended(sid, 3)])).toBe(200)
  for (const sid of [whole, erased]) await stored(sid)
  expect((await fetch(`${ingest.url}/v1/calls`)).status).toBe(200)
  await Promise.all([
    runs('show', whole),
    runs('verify'),
    runs('replay', '--all', '--dry-run'),
    runs('export', whole, '--format', 'json'),
    runs('rescue', '--match', 'nobodys*'),
    runs('orphans'),
  ])
  await runs('erase', erased, '--rewrite-aof')

  const partitions = new Partitions(64)
  const moved = callsIn(partitions, 7, 2)
  const slot = new Command('exists', [partitions.at(7).ready]).getSlot()
  const home = await cluster.masterOf(slot)
  const to = (await cluster.masters()).find((port) => port !== home)!
  expect(await post([turn(moved[0]!, 0)])).toBe(200)
  let meanwhile: Promise<number> | undefined
  await cluster.moveSlot(slot, to, {
    async onHalf() {
      meanwhile = post([turn(moved[0]!, 1), ended(moved[0]!, 2)])
      await fetch(`${ingest.url}/v1/calls/${moved[0]}`)
    },
  })
  expect(await meanwhile).toBe(200)
  await stored(moved[0]!)
  await cluster.failOver(to)
  await cluster.untilWhole()
  await until('it goes on', async () => (await post([turn(moved[1]!, 0), ended(moved[1]!, 1)])) === 200)
  await stored(moved[1]!)
  await until(
    'retention has removed what is old',
    async () => (await figure(sink.url, 'calltape_sink_purged_calls_total')) >= 1,
    20_000,
  )
  expect(await refusals()).toEqual([])
}, 90_000)
