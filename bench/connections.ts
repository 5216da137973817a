/** A WebSocket a call, as bots have it: what an idle one takes in ingest and, with its call just begun, in Redis. */
import { type Client, connect } from '../client/client.js'
import type { Bench } from './context.js'
import { residentMiB } from './machine.js'
import { usedBytes } from './open-calls.js'
import { startPipeline } from './processes.js'
import { figure } from './report.js'
import { untilCount } from './verify.js'

const MOST_CONNECTIONS = 10_000
/** So many are opened at once. */
const HANDSHAKES = 200

export async function connections(bench: Bench): Promise<void> {
  const count = bench.options.quick ? HANDSHAKES : MOST_CONNECTIONS
  await bench.reset()
  const pipeline = await startPipeline(bench)
  const clients: Client[] = []
  try {
    const ingest = pipeline.pids.ingest!
    const before = { ingestMiB: residentMiB(ingest), redis: await usedBytes(bench) }
    const prefix = `bound-${Date.now()}-`
    bench.progress.step('connecting', count)
    while (clients.length < count) {
      const handshakes = Array.from({ length: Math.min(HANDSHAKES, count - clients.length) }, (_, i) =>
        connect(pipeline.urls[0]!, { callSid: `${prefix}${clients.length + i}` }),
      )
      clients.push(...(await Promise.all(handshakes)))
      bench.progress.at(clients.length)
    }
    const connected = async () => (await connectedCalls(bench, prefix)).length
    await untilCount(bench, count, connected)
    const bytesEach = ((residentMiB(ingest) - before.ingestMiB) * 2 ** 20) / count
    const redisEach = ((await usedBytes(bench)) - before.redis) / count
    const found = await connectedCalls(bench, prefix)
    if (new Set(found).size !== count) throw new Error(`${found.length} calls of ${count} connections`)
    bench.progress.say(`${count} connections: ${Math.round(bytesEach)} bytes each in ingest`)
    bench.rows.push({
      scenario: `${count.toLocaleString('en-US')} WebSockets, a call each`,
      verifiedRows: found.length,
      figures: [figure('an idle one in ingest (resident)', bytesEach, 'bytes'), figure('in Redis', redisEach, 'bytes')],
    })
  } finally {
    for (const client of clients) client.terminate()
    await pipeline.stop()
  }
}

/** Whose connection is on record. */
async function connectedCalls({ stores: { pool } }: Bench, prefix: string): Promise<string[]> {
  const sql = `SELECT call_sid FROM call_events WHERE type = 'call.connected' AND call_sid >= $1 AND call_sid < $2`
  const { rows } = await pool.query<{ call_sid: string }>(sql, [prefix, `${prefix}~`])
  return rows.map((row) => row.call_sid)
}
