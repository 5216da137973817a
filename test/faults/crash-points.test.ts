/** A process dies at a named place, as by kill -9, and is started again: nothing is lost, nothing is doubled. */
import { expect, inject, test, vi } from 'vitest'
import { startIngest } from '../../ingest/ingest.js'
import { readConfig } from '../../shared/config.js'
import { CRASH_POINTS } from '../../shared/crash.js'
import { startSink } from '../../sink/sink.js'
import { log, until } from '../support/stores.js'
import { Load } from './load.js'
import { type Rig, settled, startRig, TIMEOUT_MS } from './rig.js'

vi.setConfig({ maxConcurrency: 4 }) // more processes that start at once would keep a small machine from all else

/** Those of the disk spool have a suite of their own. */
const POINTS = CRASH_POINTS.filter((point) => !/spool|replay|archive|purge/.test(point))
const INGEST_POINT = /append$/
/** `decode` is passed with each entry, the others with each batch; of those there are fewer on a Cluster, each slot has its share. */
const laterTime = (point: string) => (point === 'decode' ? 500 : inject('cluster') ? 2 : 5)

const HAZARDS = POINTS.flatMap((point) => {
  const service = INGEST_POINT.test(point) ? 'ingest' : 'sink'
  const crash = `crash_${point.replaceAll('-', '_')}`
  return [
    { claim: `${crash}_loses_and_doubles_nothing`, service, crashAt: point },
    { claim: `${crash}_later_on_loses_and_doubles_nothing`, service, crashAt: `${point}:${laterTime(point)}` },
  ]
})

/** Many small batches, so that there is a later time, and leases that lapse soon. */
const ENVIRONMENT = { LEASE_SECONDS: '1', BATCH_MAX_ROWS: '200' }

for (const { claim, service, crashAt } of HAZARDS) {
  test.concurrent(claim, { timeout: TIMEOUT_MS }, async (context) => {
    const armed = { CRASH_AT: crashAt }
    const counts = service === 'ingest' ? { ingests: 1, sinks: 0 } : { ingests: 0, sinks: 1 }
    const arms = { ingestEnvironments: [armed], sinkEnvironments: [armed] }
    const rig = await startRig({ context, environment: ENVIRONMENT, ...counts, ...arms })
    const load = new Load({ calls: 80, turns: 30, rate: 6000 })
    const url = await startOther(rig, service, context)
    await load.play(url)
    const [victim] = [...rig.ingests, ...rig.sinks]
    await until('it has died', () => victim!.deaths.length > 0)
    await load.expectStored(rig.pool)
    await settled(rig)
    expect(victim!.deaths).toMatchObject([{ signal: 'SIGKILL', wanted: false }])
  })
}

/** The half of calltape that is not to die runs in this process. @returns where events go */
async function startOther(rig: Rig, service: string, context: { onTestFinished(end: () => Promise<void>): void }) {
  const config = { REDIS_URL: rig.redisUrl, DATABASE_URL: rig.databaseUrl, INGEST_PORT: '0', SINK_METRICS_PORT: '0' }
  const start = service === 'ingest' ? startSink : startIngest
  const other = await start(readConfig({ ...ENVIRONMENT, ...config }), log)
  context.onTestFinished(() => other.stop())
  return service === 'ingest' ? rig.url : other.url
}
