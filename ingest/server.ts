/** The network side of ingest: routes, tokens, sockets. Only this file and exchange.ts know uWebSockets.js. */
import uWS from 'uWebSockets.js'
import { OperatorError } from '../shared/config.js'
import { Refusal } from '../shared/events.js'
import { tokenCheck } from './auth.js'
import { type BodyLimits, decodePart, Exchange, type RequestHead, readHead } from './exchange.js'
import { type Answer, FROM_A_PAGE, problem } from './http.js'
import { CLOSE_GOING_AWAY, CLOSE_OVERLOADED, CLOSE_REFUSED, type Socket } from './stream.js'

/** What a WebSocket's events are handed to. */
export interface Connection {
  opened(): void
  /** @param text undefined for a binary message */
  accept(text: string | undefined): void
  closed(code: number): void
}

export interface Routes {
  /** A new `/v1/stream` connection; a Refusal closes it. */
  stream(socket: Socket, query: URLSearchParams): Connection | Refusal
  /** Turns away a POST below `/webhooks/` of which its head says enough: nobody may make us hold bodies that nobody wants. */
  denyWebhook(head: RequestHead): Answer | undefined
  /** Anything below `/webhooks/`. */
  webhook(head: RequestHead, body: Buffer): Promise<Answer>
  /** A WebSocket below `/streams/` that wants to be opened; an Answer turns it away. */
  providerStream(head: RequestHead): Connection | Answer
  postEvents(contentType: string, query: URLSearchParams, body: Buffer): Promise<Answer>
  /** Told of every answer to a POST of events, whoever gave it. */
  postAnswered(answer: Answer): void
  /** Told of every WebSocket that closes, also of one that nobody took. */
  webSocketClosed(code: number): void
  listCalls(query: URLSearchParams): Promise<Answer>
  getCall(callSid: string): Promise<Answer>
  metrics(): Promise<Answer>
  ready(): Promise<Answer>
}

export interface ServerOptions {
  host: string
  port: number
  tokens: string[]
  tls?: { cert: string; key: string }
  maxMessageBytes: number
  bodies: BodyLimits
}

export interface Server {
  port: number
  /** Takes no new connection or request from now on. */
  stopListening(): void
  /** Closes what is still open: WebSockets with 1001, and after LINGER_MS whatever has not gone by itself. */
  closeConnections(): void
}

/** What a slow reader may leave unread before its connection is cut: acks are small, a client that reads none is broken. */
const MAX_UNREAD_BYTES = 1024 * 1024
const IDLE_SECONDS = 60
/** For closing handshakes and the last answers, before connections are cut. */
const LINGER_MS = 1000
/** uSockets' LIBUS_LISTEN_EXCLUSIVE_PORT. Without it a second ingest would silently share the port with the first. */
const EXCLUSIVE_PORT = 1
const NO_BODY = Buffer.alloc(0)

interface SocketData {
  /** Whoever takes its messages; a Refusal closes it. */
  connect(socket: Socket): Connection | Refusal
  connection?: Connection
}

type UwsSocket = uWS.WebSocket<SocketData>

/** @throws OperatorError when the port cannot be listened on, or the certificate cannot be used */
export function listen(options: ServerOptions, routes: Routes): Promise<Server> {
  const app = createApp(options)
  const open = new Set<UwsSocket>()
  addRoutes(app, options, routes, open)
  return new Promise((resolve, reject) => {
    ;(app as unknown as ListenWithOptions).listen(options.host, options.port, EXCLUSIVE_PORT, (socket) => {
      if (!socket) {
        const message = `cannot listen on ${options.host}:${options.port}: it is in use, or not an address of this machine`
        reject(new OperatorError(`INGEST_PORT, INGEST_HOST: ${message}`))
        return
      }
      let listening: uWS.us_listen_socket | undefined = socket
      resolve({
        port: uWS.us_socket_local_port(socket),
        stopListening: () => {
          if (listening) uWS.us_listen_socket_close(listening) // closed twice, it would take the process with it
          listening = undefined
        },
        closeConnections: () => {
          for (const ws of [...open])
            ws.end(CLOSE_GOING_AWAY, 'calltape is going away: reconnect and resend what was not acked')
          setTimeout(() => app.close(), LINGER_MS).unref()
        },
      })
    })
  })
}

function addRoutes(app: uWS.TemplatedApp, options: ServerOptions, routes: Routes, open: Set<UwsSocket>): void {
  const allowed = tokenCheck(options.tokens)

  app.post('/v1/events', (res, req) => {
    const contentType = req.getHeader('content-type')
    const query = new URLSearchParams(req.getQuery())
    const exchange = new Exchange(res, req, (answer) => routes.postAnswered(answer))
    if (!allowed(req.getHeader('authorization'))) return exchange.answer(UNAUTHORIZED, true)
    exchange.readBody(options.bodies, (body) => routes.postEvents(contentType, query, body))
  })
  app.post('/webhooks/*', (res, req) => {
    const head = readHead(req)
    const exchange = new Exchange(res, req)
    const denied = routes.denyWebhook(head)
    if (denied) return exchange.answer(denied, true)
    exchange.readBody(options.bodies, (body) => routes.webhook(head, body))
  })
  app.get('/webhooks/*', (res, req) => new Exchange(res, req).answerWith(routes.webhook(readHead(req), NO_BODY)))
  anythingElse(app, '/webhooks/*', 'GET, POST')
  anythingElse(app, '/v1/events', 'POST')
  const get = (path: string, handle: (req: uWS.HttpRequest) => Promise<Answer> | Answer, needsToken: boolean) => {
    const handler = (res: uWS.HttpResponse, req: uWS.HttpRequest) => {
      const exchange = new Exchange(res, req)
      if (needsToken && !allowed(req.getHeader('authorization'))) return exchange.answer(UNAUTHORIZED)
      exchange.answerWith(handle(req))
    }
    app.get(path, handler).head(path, handler)
    anythingElse(app, path, 'GET, HEAD')
  }
  const upgrade = webSocketsOn(app, options, open, (code) => routes.webSocketClosed(code))
  upgrade('/v1/stream', (req) => {
    if (!allowed(req.getHeader('authorization'))) return UNAUTHORIZED
    // Without tokens, any page in a browser on this machine could write calls. Browsers say where a page is from.
    if (options.tokens.length === 0 && req.getHeader('origin') !== '') return FROM_A_PAGE
    const query = new URLSearchParams(req.getQuery())
    return (socket) => routes.stream(socket, query)
  })
  get('/v1/stream', () => upgradeRequired('/v1/stream'), true)
  upgrade('/streams/*', (req) => {
    const connection = routes.providerStream({ ...readHead(req), isWebSocket: true })
    return 'status' in connection ? connection : () => connection
  })
  get('/streams/:provider', (req) => upgradeRequired(req.getUrl()), false)
  get('/streams/:provider/:secret', () => upgradeRequired('/streams/PROVIDER'), false)
  get('/v1/calls', (req) => routes.listCalls(new URLSearchParams(req.getQuery())), true)
  get('/v1/calls/:call_sid', (req) => routes.getCall(decodePart(req.getParameter(0))), true)
  get('/metrics', () => routes.metrics(), false)
  get('/healthz', () => ({ status: '200 OK', body: { status: 'ok' } }), false)
  get('/readyz', () => routes.ready(), false)
  app.any('/*', (res, req) => {
    const message = `there is no ${req.getMethod().toUpperCase()} ${req.getUrl()}`
    new Exchange(res, req).answer(problem('404 Not Found', 'not_found', message))
  })
}

/** What the library can do, but its types do not know. */
interface ListenWithOptions {
  listen(host: string, port: number, options: number, done: (socket: uWS.us_listen_socket | false) => void): void
}

function createApp({ tls }: ServerOptions): uWS.TemplatedApp {
  if (!tls) return uWS.App()
  try {
    return uWS.SSLApp({ cert_file_name: tls.cert, key_file_name: tls.key })
  } catch {
    throw new OperatorError(`TLS_CERT_FILE, TLS_KEY_FILE: no certificate with its key in ${tls.cert} and ${tls.key}`)
  }
}

/** Answers the methods that `path` does not have. */
function anythingElse(app: uWS.TemplatedApp, path: string, methods: string): void {
  const answer = problem('405 Method Not Allowed', 'method_not_allowed', `${path} wants ${methods}`, { Allow: methods })
  app.any(path, (res, req) => new Exchange(res, req).answer(answer, true))
}

type Upgrade = (req: uWS.HttpRequest) => SocketData['connect'] | Answer

/** @returns adds a path whose WebSockets are handed to whom `decide` names; its Answer turns them away */
function webSocketsOn(
  app: uWS.TemplatedApp,
  options: ServerOptions,
  open: Set<UwsSocket>,
  closed: (code: number) => void,
) {
  return (path: string, decide: Upgrade) => app.ws<SocketData>(path, webSockets(options, open, decide, closed))
}

function webSockets(
  options: ServerOptions,
  open: Set<UwsSocket>,
  decide: Upgrade,
  closed: (code: number) => void,
): uWS.WebSocketBehavior<SocketData> {
  return {
    maxPayloadLength: options.maxMessageBytes,
    maxBackpressure: MAX_UNREAD_BYTES,
    idleTimeout: IDLE_SECONDS,
    sendPingsAutomatically: true,
    upgrade(res, req, context) {
      const connect = decide(req)
      if (typeof connect !== 'function') return new Exchange(res, req).answer(connect)
      res.upgrade<SocketData>(
        { connect },
        req.getHeader('sec-websocket-key'),
        req.getHeader('sec-websocket-protocol'),
        req.getHeader('sec-websocket-extensions'),
        context,
      )
    },
    open(ws) {
      const data = ws.getUserData()
      open.add(ws)
      const socket: Socket = {
        // 2: dropped, because the client has not read MAX_UNREAD_BYTES. Acks would be missing: it has to reconnect.
        send: (message) => {
          if (open.has(ws) && ws.send(message) === 2) ws.close()
        },
        close: (code, reason) => {
          if (open.has(ws)) ws.end(code, reason)
        },
      }
      const connection = data.connect(socket)
      if (connection instanceof Refusal) {
        ws.end(CLOSE_CODES[connection.code] ?? CLOSE_REFUSED, closeReason(connection.message))
        return
      }
      data.connection = connection
      connection.opened()
    },
    message(ws, message, isBinary) {
      ws.getUserData().connection?.accept(isBinary ? undefined : Buffer.from(message).toString('utf8'))
    },
    close(ws, code) {
      open.delete(ws)
      closed(code)
      ws.getUserData().connection?.closed(code)
    },
  }
}

/** Of a Refusal whose client should come again; any other will be refused again. */
const CLOSE_CODES: Record<string, number> = { stopping: CLOSE_GOING_AWAY, overloaded: CLOSE_OVERLOADED }

/** As much as a close frame takes, without half a character at its end. */
function closeReason(text: string): string {
  return new TextDecoder().decode(Buffer.from(text).subarray(0, 123), { stream: true })
}

const upgradeRequired = (path: string) =>
  problem('426 Upgrade Required', 'upgrade_required', `${path} is a WebSocket`, { Upgrade: 'websocket' })

const UNAUTHORIZED = problem(
  '401 Unauthorized',
  'unauthorized',
  'send Authorization: Bearer with one of INGEST_TOKENS',
  {
    'WWW-Authenticate': 'Bearer',
  },
)
