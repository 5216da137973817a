/** What a sink tells of itself over HTTP: /metrics, /healthz, and /readyz with the reason when it cannot do its job. */
import { createServer, type Server } from 'node:http'
import { Registry } from 'prom-client'
import { type Config, OperatorError } from '../shared/config.js'
import type { GroupStatus } from '../shared/group.js'
import { reasonOf } from '../shared/log.js'
import type { Pool } from '../shared/postgres.js'
import type { RedisClient } from '../shared/redis.js'
import type { Backlog } from './backlog.js'
import { askWritable, type Gate } from './gate.js'
import type { Progress } from './progress.js'

const UNREADY_AFTER_MS = 5000

/** @throws OperatorError when the port cannot be listened on */
export function serveHealth(config: Config, status: GroupStatus): Promise<Server> {
  const server = createServer((request, response) => {
    const send = (status: number, body: string, type = 'text/plain; charset=utf-8') =>
      response.writeHead(status, { 'Content-Type': type }).end(body)
    const answer = (text: Promise<string>, type?: string) =>
      text.then(
        (body) => send(200, body, type),
        (error: Error) => send(503, `${reasonOf(error)}\n`),
      )
    if (request.url === '/healthz') send(200, 'ok\n')
    else if (request.url === '/metrics') answer(status.metrics(), Registry.PROMETHEUS_CONTENT_TYPE)
    else if (request.url === '/readyz') answer(status.ready().then(() => 'ready\n'))
    else send(404, 'there is /metrics, /healthz and /readyz\n')
  })
  return new Promise((resolve, reject) => {
    server.once('error', (error) => {
      const where = `${config.SINK_METRICS_HOST}:${config.SINK_METRICS_PORT}`
      reject(new OperatorError(`SINK_METRICS_PORT: cannot listen on ${where}: ${error.message}`))
    })
    server.listen(config.SINK_METRICS_PORT, config.SINK_METRICS_HOST, () => resolve(server))
  })
}

interface Parts {
  redis: RedisClient
  pool: Pool
  backlog: Backlog
  gate: Gate
  progress: Progress
}

/** @throws what keeps the sink from its job */
export async function requireReady(parts: Parts, stopped: AbortSignal): Promise<void> {
  const { redis, pool, backlog, gate, progress } = parts
  if (stopped.aborted) throw new Error('stopping')
  if (redis.status !== 'ready') throw new Error(`Redis: ${redis.status}`)
  if (gate.reason && (await backlog.read()).lagMs === 0) gate.idle()
  if (gate.reason) throw new Error(`PostgreSQL: ${gate.reason}`)
  const stalled = progress.stalled(UNREADY_AFTER_MS)
  if (stalled) throw new Error(stalled)
  // An idle sink learns of a PostgreSQL that is gone only by asking.
  await askWritable(pool).catch((error: Error) => {
    throw new Error(`PostgreSQL: ${reasonOf(error)}`)
  })
}
