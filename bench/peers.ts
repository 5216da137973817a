/** What others would build, under the same load, with the same acks, and with every row compared: what a turn costs there. */
import { compareCall, type ExpectedCall, type TurnRow } from '../cli/compare.js'
import { createPool, type Pool } from '../shared/postgres.js'
import type { Bench } from './context.js'
import { fullSpeed, median, type Round, WARM_UP_SHARE } from './end-to-end.js'
import { type Load, makeLoad } from './load.js'
import { measure, pipelineMicros } from './machine.js'
import { startProgram, storePids } from './processes.js'
import { figure } from './report.js'
import type { PeerName } from './targets.js'
import { untilFinalized, verify } from './verify.js'

export interface Peer {
  /** In bench/peers/. */
  name: PeerName
  /** In the table. */
  title: string
  about: string
  /** Of the calls that calltape gets: the slow ones would take minutes, and CPU a turn is the same. */
  share: number
  hasWorker: boolean
}

export const PEERS: Peer[] = [
  {
    name: 'legacy',
    title: 'legacy way',
    about: 'GET, change, SET of a JSON blob a turn, one row at the end',
    share: 0.1,
    hasWorker: false,
  },
  {
    name: 'insert',
    title: 'INSERT a turn',
    about: 'an INSERT a turn from the WebSocket server',
    share: 0.1,
    hasWorker: false,
  },
  {
    name: 'batched-insert',
    title: 'batched INSERT',
    about: 'INSERTs of what arrived meanwhile from the WebSocket server',
    share: 0.5,
    hasWorker: false,
  },
  {
    name: 'plain-loop',
    title: 'plain loop',
    about: 'a plain ioredis loop: XADD, XREADGROUP, INSERT of many rows, XACK',
    share: 0.5,
    hasWorker: true,
  },
  {
    name: 'bullmq',
    title: 'BullMQ',
    about: 'BullMQ and a worker that writes what it holds together',
    share: 0.1,
    hasWorker: true,
  },
]

const SCHEMA = 'peer'
const PROGRAM = 'dist/bench/peers/peer.js'
const FEWEST_CALLS = 10

export async function runPeer(bench: Bench, peer: Peer): Promise<void> {
  const { rounds, turns } = bench.options
  const own = pipelineMicros((await fullSpeed(bench)).usage!)
  const calls = Math.max(FEWEST_CALLS, Math.round(bench.options.calls * peer.share))
  await bench.reset()
  const pool = await createTables(bench)
  const started = await startPeer(bench, peer)
  const play = (count: number) => playRound(bench, pool, peer, started, count)
  const played: Round[] = []
  try {
    await play(Math.max(FEWEST_CALLS, Math.round(calls * WARM_UP_SHARE)))
    for (let round = 1; round <= rounds; round++) played.push(await play(calls))
  } finally {
    await started.stop()
    await pool.end()
    await bench.stores.pool.query(`DROP SCHEMA IF EXISTS ${SCHEMA} CASCADE`)
  }
  const { turnsPerSecond, usage, verifiedRows } = median(played, (round) => pipelineMicros(round.usage))
  const micros = pipelineMicros(usage)
  bench.measured.peerMicros[peer.name] = micros
  bench.progress.say(`${peer.title}: ${micros.toFixed(1)} µs a turn, ${(micros / own).toFixed(1)} times calltape's`)
  bench.rows.push({
    scenario: `peer: ${peer.title}, ${calls} × ${turns}`,
    turnsPerSecond,
    usage,
    verifiedRows,
    figures: [figure("CPU a turn ÷ calltape's", micros / own, '×')],
  })
}

/** calltape's own tables, in another schema, without what only calltape fills. */
async function createTables({ stores: { pool, database } }: Bench): Promise<Pool> {
  await pool.query(`DROP SCHEMA IF EXISTS ${SCHEMA} CASCADE; CREATE SCHEMA ${SCHEMA}`)
  for (const table of ['call_transcript_turns', 'call_sessions']) {
    await pool.query(`CREATE TABLE ${SCHEMA}.${table} (LIKE public.${table} INCLUDING ALL)`)
  }
  await pool.query(`ALTER TABLE ${SCHEMA}.call_transcript_turns
    ALTER stream_id SET DEFAULT '', ALTER ingested_at SET DEFAULT now()`)
  return createPool({ ...database, DATABASE_SCHEMA: SCHEMA }, 'bench', 2)
}

type StartedPeer = Awaited<ReturnType<typeof startPeer>>

async function startPeer(bench: Bench, { name, hasWorker }: Peer) {
  const { redis, database } = bench.stores
  const environment = { REDIS_URL: redis.url, ...database, DATABASE_SCHEMA: SCHEMA }
  const worker = hasWorker ? [await startProgram(bench, PROGRAM, [name, 'worker'], environment)] : []
  const server = await startProgram(bench, PROGRAM, [name, 'server'], environment)
  const workers = hasWorker ? { sink: worker.map(({ pid }) => pid) } : {}
  return {
    urls: [server.url],
    /** Under the names of calltape's parts: they do the same. */
    pids: { ...storePids(bench), ingest: [server.pid], ...workers },
    stop: () => Promise.all([server, ...worker].map((each) => each.stop())),
  }
}

async function playRound(bench: Bench, pool: Pool, peer: Peer, started: StartedPeer, calls: number): Promise<Round> {
  const load = makeLoad(calls, bench.options.turns)
  bench.progress.step('sending', load.turns)
  const speed = await measure(started.pids, load.turns, async () => {
    await load.send(started.urls, (events) => bench.progress.at(events))
    bench.progress.step('waiting until all is stored', calls)
    await untilFinalized(bench, load, pool)
  })
  const verifiedRows = peer.name === 'legacy' ? await verifyTranscripts(pool, load) : await verify(bench, load, pool)
  return { ...speed, verifiedRows }
}

/** The legacy way has no row for a turn: its transcripts are compared, turn by turn. @returns how many turns were compared */
async function verifyTranscripts(pool: Pool, load: Load): Promise<number> {
  let turns = 0
  for (const expected of load.expected()) {
    const found = await transcriptOf(pool, expected)
    const wrong = compareCall(expected, found, undefined).filter(({ kind }) => kind !== 'call row')
    if (wrong.length > 0) throw new Error(`transcripts are wrong: ${JSON.stringify(wrong[0])}`)
    turns += found.length
  }
  return turns
}

async function transcriptOf(pool: Pool, { callSid, turns }: ExpectedCall): Promise<TurnRow[]> {
  const { rows } = await pool.query<{ full_transcript: { speaker: string; text: string; timestamp: string }[] }>(
    'SELECT full_transcript FROM call_sessions WHERE call_sid = $1',
    [callSid],
  )
  return (rows[0]?.full_transcript ?? []).map(({ speaker, text, timestamp }, seq) => ({
    // What the blob does not keep is taken for right; its order is the sequence.
    ...(turns.get(seq) ?? { turn_id: '', language: null, confidence: null, interrupted: null }),
    seq,
    text,
    spoken_at: Date.parse(`${timestamp}Z`),
    speaker: speaker === 'user' ? 'customer' : 'agent',
  }))
}
