/** What a sink tells of itself over HTTP: /metrics, /healthz, /readyz. */
import { createServer, type Server } from 'node:http'
import { type Config, OperatorError } from '../shared/config.js'

/**
 * @param observe the metrics' text @param unready why the sink cannot do its job, undefined when it can
 * @throws OperatorError when the port cannot be listened on
 */
export function serveHealth(
  config: Config,
  contentType: string,
  observe: () => Promise<string>,
  unready: () => Promise<string | undefined>,
): Promise<Server> {
  const server = createServer((request, response) => {
    const send = (status: number, body: string, type = 'text/plain; charset=utf-8') =>
      response.writeHead(status, { 'Content-Type': type }).end(body)
    const fail = (error: Error) => send(503, `${error.message}\n`)
    if (request.url === '/healthz') send(200, 'ok\n')
    else if (request.url === '/readyz') unready().then((why) => send(why ? 503 : 200, `${why ?? 'ready'}\n`), fail)
    else if (request.url === '/metrics') observe().then((text) => send(200, text, contentType), fail)
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
