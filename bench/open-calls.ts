/** Many calls open at once, a turn each every few seconds: latency, memory and Redis' slow log must not feel their number. */
import type { Redis } from 'ioredis'
import { createLog } from '../shared/log.js'
import { connectRedis } from '../shared/redis.js'
import { readLatencies, sendAtRate } from './end-to-end.js'
import { residentMiB } from './machine.js'
import { type Bench, connectAll, openPool, type Result, row, start } from './scenario.js'

const COUNTS = [1000, 10_000]
const TURNS_PER_SECOND = 2500
const SLOW_MICROS = 10_000

export async function openCalls(bench: Bench): Promise<Result[]> {
  const ingest = await start(bench, 'ingest')
  const sink = await start(bench, 'sink')
  const pool = openPool(bench)
  const redis = (await connectRedis(bench.redis.url, createLog('bench', 'warn'))) as Redis
  const results: Result[] = []
  try {
    await redis.config('SET', 'slowlog-log-slower-than', SLOW_MICROS)
    for (const calls of COUNTS) {
      const prefix = `open-${calls}-${Date.now()}-`
      const clients = await connectAll(ingest.url)
      // The first part opens all calls with a turn each; the second finds them open.
      const opened = await sendAtRate(clients, prefix, calls, TURNS_PER_SECOND, calls / TURNS_PER_SECOND)
      await readLatencies(pool, prefix, opened)
      await redis.call('SLOWLOG', 'RESET')
      const before = { ingest: residentMiB(ingest.pid()), sink: residentMiB(sink.pid()) }
      const sinceMs = Date.now()
      const sent = await sendAtRate(clients, prefix, calls, TURNS_PER_SECOND, bench.seconds, 1)
      await Promise.all(clients.map((client) => client.flush()))
      const { p50, p99 } = await readLatencies(pool, prefix, sent, sinceMs)
      const slow = Number(await redis.call('SLOWLOG', 'LEN'))
      const grown = residentMiB(ingest.pid()) - before.ingest + residentMiB(sink.pid()) - before.sink
      await Promise.all(clients.map((client) => client.close()))
      bench.say(`${calls} open calls: p50 ${p50.toFixed(1)} ms, p99 ${p99.toFixed(1)} ms, ${slow} slow commands`)
      const scenario = `${calls} open calls, ${TURNS_PER_SECOND}/s`
      results.push(
        row(scenario, 'sent to committed, p50', p50, 'ms'),
        row(scenario, 'sent to committed, p99', p99, 'ms'),
        row(scenario, `Redis commands over ${SLOW_MICROS / 1000} ms`, slow, ''),
        row(scenario, 'memory grown, ingest and sink', Math.max(0, grown), 'MiB'),
      )
    }
    return results
  } finally {
    redis.disconnect()
    await ingest.stop()
    await sink.stop()
    await pool.end()
  }
}
