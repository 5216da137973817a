/** The scenarios, in the order in which they run. */
import { connections } from './connections.js'
import type { Bench } from './context.js'
import { drain, farSinks, sinks } from './drain.js'
import { endToEnd, texts } from './end-to-end.js'
import { ingests } from './ingests.js'
import { latency } from './latency.js'
import { openCalls } from './open-calls.js'
import { PEERS, runPeer } from './peers.js'
import { redisCeiling } from './redis-ceiling.js'
import { replay } from './replay.js'
import { skew } from './skew.js'

export interface Scenario {
  name: string
  about: string
  /** Needs neither Redis nor PostgreSQL. */
  isAlone?: true
  run(bench: Bench): Promise<void>
}

export const SCENARIOS: Scenario[] = [
  { name: 'end-to-end', about: 'from the WebSocket to finalized calls, at full speed', run: endToEnd },
  { name: 'latency', about: 'sent to committed at 1,000/s, 5,000/s and half of full speed', run: latency },
  { name: 'texts', about: 'end to end with short and with long texts', run: texts },
  { name: 'redis', about: 'ceiling: redis-benchmark XADD with the same payload', run: redisCeiling },
  { name: 'drain', about: 'a backlog, against plain COPY of the same rows', run: drain },
  { name: 'sinks', about: 'a backlog with 1, 2 and 4 sinks', run: sinks },
  { name: 'far-sinks', about: 'a backlog with 1 and 2 sinks that wait for a PostgreSQL far away', run: farSinks },
  { name: 'ingests', about: 'acked by 1, 2 and 4 ingests', run: ingests },
  { name: 'replay', about: 'truncated tables from the streams, while calls go on', run: replay },
  { name: 'open-calls', about: 'the same rate over 1,000, 10,000 and 100,000 open calls', run: openCalls },
  { name: 'connections', about: 'a WebSocket a call: what an idle one takes', run: connections },
  ...PEERS.map((peer) => ({
    name: `peer-${peer.name}`,
    about: `the same load with ${peer.about}`,
    run: (bench: Bench) => runPeer(bench, peer),
  })),
  { name: 'skew', about: 'how evenly calls spread over partitions and nodes (a simulation)', isAlone: true, run: skew },
]
