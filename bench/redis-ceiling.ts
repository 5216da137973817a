/** What Redis takes at most: `redis-benchmark` with XADD of the same payload, on the same server, with the same append-only file. */
import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { generateTurn, newRun } from '../cli/load.js'
import { findRedis } from '../cli/local-redis.js'
import { childEnvironment } from '../shared/config.js'
import type { Bench } from './context.js'
import { Meter } from './machine.js'
import { storePids } from './processes.js'

const PIPELINE = 64
const CONNECTIONS = 8
const STREAMS = 1000
const KEYS = 'bench:xadd:*'

export async function redisCeiling(bench: Bench): Promise<void> {
  const { command } = await findRedis()
  const program = join(dirname(command), basename(command).replace('server', 'benchmark'))
  if (!existsSync(program)) throw new Error(`there is no ${program}`)
  await bench.reset()
  const { client, redis } = bench.stores
  // It sends whole pipelines.
  const commands = Math.ceil((bench.options.calls * bench.options.turns * 2) / PIPELINE) * PIPELINE
  bench.progress.step(`redis-benchmark, ${commands} XADD in pipelines of ${PIPELINE}`)
  const args = [
    '-p',
    new URL(redis.url).port,
    '-P',
    PIPELINE,
    '-c',
    CONNECTIONS,
    '-n',
    commands,
    '-r',
    STREAMS,
    '--csv',
  ]
  const xadd = ['XADD', 'bench:xadd:__rand_int__', '*', 'e', averagePayload()]
  const { client: _client, postgres: _postgres, ...pids } = storePids(bench)
  const meter = new Meter(pids)
  const { stdout } = await promisify(execFile)(program, [...args, ...xadd].map(String), { env: childEnvironment() })
  const usage = meter.stop(commands)
  // "test","rps",… and, of the XADD, its figures; its payload, with quotes of its own, stands before them.
  const rate = /","([\d.]+)","/.exec(stdout.trim().split('\n').at(-1) ?? '')?.[1]
  if (rate === undefined) throw new Error(`redis-benchmark said: ${stdout}`)
  const verifiedRows = await countEntries(bench)
  if (verifiedRows !== commands) throw new Error(`${verifiedRows} entries of ${commands}`)
  bench.progress.say(`redis-benchmark: ${Math.round(Number(rate))} XADD/s`)
  bench.rows.push({ scenario: 'ceiling: redis-benchmark XADD', turnsPerSecond: Number(rate), usage, verifiedRows })
  await client.flushall('SYNC')
}

/** A turn as ingest writes it, of average length. */
function averagePayload(): string {
  const run = newRun(1, 1000)
  const payloads = Array.from({ length: run.turns }, (_, seq) => JSON.stringify(generateTurn(run, 0, seq)))
  const average = payloads.reduce((sum, payload) => sum + payload.length, 0) / payloads.length
  const distance = (payload: string) => Math.abs(payload.length - average)
  return payloads.reduce((best, payload) => (distance(payload) < distance(best) ? payload : best))
}

async function countEntries({ stores: { client } }: Bench): Promise<number> {
  let entries = 0
  for await (const keys of client.scanStream({ match: KEYS, count: STREAMS }) as AsyncIterable<string[]>) {
    for (const key of new Set(keys)) entries += await client.xlen(key)
  }
  return entries
}
