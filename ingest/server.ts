/** The network side of ingest, and the only file that knows uWebSockets.js: routes, bodies, tokens, sockets. */

import uWS from 'uWebSockets.js'
import { OperatorError } from '../shared/config.js'
import { Refusal } from '../shared/events.js'
import { bearerToken, secretCheck } from './auth.js'
import { type Answer, overloaded, problem } from './http.js'
import { CLOSE_GOING_AWAY, CLOSE_OVERLOADED, CLOSE_REFUSED, type Socket } from './stream.js'

/** What a WebSocket's events are handed to. */
export interface Connection {
  opened(): void
  /** @param text undefined for a binary message */
  accept(text: string | undefined): void
  closed(code: number): void
}

/** A request without its body. */
export interface RequestHead {
  method: string
  path: string
  queryString: string
  query: URLSearchParams
  isWebSocket: boolean
  /** @param name in lower case @returns the header's value, empty when there is none */
  header(name: string): string
}

export interface Routes {
  /** A new `/v1/stream` connection; a Refusal closes it. */
  stream(socket: Socket, query: URLSearchParams): Connection | Refusal
  /** Anything below `/webhooks/`. */
  webhook(head: RequestHead, body: Buffer): Promise<Answer>
  /** A WebSocket below `/streams/` that wants to be opened; an Answer turns it away. */
  providerStream(head: RequestHead): Connection | Answer
  postEvents(contentType: string, query: URLSearchParams, body: Buffer): Promise<Answer>
  listCalls(query: URLSearchParams): Promise<Answer>
  getCall(callSid: string): Promise<Answer>
  metrics(): Promise<Answer>
  ready(): Answer
}

export interface ServerOptions {
  host: string
  port: number
  tokens: string[]
  tls?: { cert: string; key: string }
  maxMessageBytes: number
  maxBodyBytes: number
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
const JSON_TYPE = 'application/json; charset=utf-8'

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
  const allowed = tokenCheck(options.tokens)

  app.post('/v1/events', (res, req) => {
    const contentType = req.getHeader('content-type')
    const query = new URLSearchParams(req.getQuery())
    const answer = respond(res, req)
    if (!allowed(req)) return answer(UNAUTHORIZED, true)
    withBody(res, req, options, answer, (body) => routes.postEvents(contentType, query, body))
  })
  app.post('/webhooks/*', (res, req) => {
    const head = readHead(req)
    const answer = respond(res, req)
    withBody(res, req, options, answer, (body) => routes.webhook(head, body))
  })
  app.get('/webhooks/*', (res, req) => answerWith(respond(res, req), routes.webhook(readHead(req), NO_BODY)))
  anythingElse(app, '/webhooks/*', 'GET, POST')
  anythingElse(app, '/v1/events', 'POST')
  const get = (path: string, handle: (req: uWS.HttpRequest) => Promise<Answer> | Answer, needsToken: boolean) => {
    const handler = (res: uWS.HttpResponse, req: uWS.HttpRequest) => {
      const answer = respond(res, req)
      if (needsToken && !allowed(req)) return answer(UNAUTHORIZED)
      answerWith(answer, handle(req))
    }
    app.get(path, handler).head(path, handler)
    anythingElse(app, path, 'GET, HEAD')
  }
  const upgrade = webSocketsOn(app, options, open)
  upgrade('/v1/stream', (req) => {
    if (!allowed(req)) return UNAUTHORIZED
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
  get('/v1/calls/:call_sid', (req) => routes.getCall(decode(req.getParameter(0))), true)
  get('/metrics', () => routes.metrics(), false)
  get('/healthz', () => ({ status: '200 OK', body: { status: 'ok' } }), false)
  get('/readyz', () => routes.ready(), false)
  app.any('/*', (res, req) => {
    const message = `there is no ${req.getMethod().toUpperCase()} ${req.getUrl()}`
    respond(res, req)(problem('404 Not Found', 'not_found', message))
  })

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
  app.any(path, (res, req) => respond(res, req)(answer, true))
}

type Upgrade = (req: uWS.HttpRequest) => SocketData['connect'] | Answer

/** @returns adds a path whose WebSockets are handed to whom `decide` names; its Answer turns them away */
function webSocketsOn(app: uWS.TemplatedApp, options: ServerOptions, open: Set<UwsSocket>) {
  return (path: string, decide: Upgrade) => app.ws<SocketData>(path, webSockets(options, open, decide))
}

function webSockets(options: ServerOptions, open: Set<UwsSocket>, decide: Upgrade): uWS.WebSocketBehavior<SocketData> {
  return {
    maxPayloadLength: options.maxMessageBytes,
    maxBackpressure: MAX_UNREAD_BYTES,
    idleTimeout: IDLE_SECONDS,
    sendPingsAutomatically: true,
    upgrade(res, req, context) {
      const connect = decide(req)
      if (typeof connect !== 'function') return respond(res, req)(connect)
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

export const FROM_A_PAGE = problem(
  '403 Forbidden',
  'forbidden',
  'web pages may connect only where INGEST_TOKENS is set',
)
const UNAUTHORIZED = problem(
  '401 Unauthorized',
  'unauthorized',
  'send Authorization: Bearer with one of INGEST_TOKENS',
  {
    'WWW-Authenticate': 'Bearer',
  },
)

function tooLarge(options: ServerOptions): Answer {
  return problem('413 Payload Too Large', 'too_large', `a body has at most ${options.maxBodyBytes} bytes`)
}

function tokenCheck(tokens: string[]): (req: uWS.HttpRequest) => boolean {
  if (tokens.length === 0) return () => true
  const isToken = secretCheck(tokens)
  return (req) => {
    const token = bearerToken(req.getHeader('authorization'))
    return token !== undefined && isToken(token)
  }
}

/** What is needed of a request later: uWebSockets.js takes it back after its handler. */
function readHead(req: uWS.HttpRequest): RequestHead {
  const headers = new Map<string, string>()
  req.forEach((name, value) => {
    headers.set(name, value)
  })
  return {
    method: req.getMethod().toUpperCase(),
    path: req.getUrl(),
    queryString: req.getQuery() ?? '',
    query: new URLSearchParams(req.getQuery()),
    isWebSocket: false,
    header: (name) => headers.get(name) ?? '',
  }
}

type AnswerFunction = (answer: Answer, closeConnection?: boolean) => void

/** A response may be written only while its client is there. */
function respond(res: uWS.HttpResponse, req: uWS.HttpRequest): AnswerFunction {
  const isHead = req.getMethod() === 'head'
  let gone = false
  res.onAborted(() => {
    gone = true
  })
  return ({ status, headers, body }, closeConnection = false) => {
    if (gone) return
    const text = typeof body === 'string' ? body : JSON.stringify(body)
    gone = true
    res.cork(() => {
      res.writeStatus(status)
      if (typeof body !== 'string') res.writeHeader('Content-Type', JSON_TYPE)
      for (const [name, value] of Object.entries(headers ?? {})) res.writeHeader(name, value)
      if (isHead) {
        // Given any argument, endWithoutBody would wait for a body of that length and block the connection.
        res.writeHeader('Content-Length', String(Buffer.byteLength(text))).endWithoutBody()
      } else {
        res.end(text, closeConnection)
      }
    })
  }
}

function answerWith(answer: AnswerFunction, result: Promise<Answer> | Answer): void {
  Promise.resolve(result)
    .then((value) => answer(value))
    .catch((error: Error) => answer(overloaded(error.message)))
}

/** Answers 413 instead of calling `handle` when the body is too large. */
function withBody(
  res: uWS.HttpResponse,
  req: uWS.HttpRequest,
  options: ServerOptions,
  answer: AnswerFunction,
  handle: (body: Buffer) => Promise<Answer>,
): void {
  if (Number(req.getHeader('content-length') || 0) > options.maxBodyBytes) {
    answer(tooLarge(options), true)
    return
  }
  readBody(res, options.maxBodyBytes, (body) => {
    if (body === undefined) answer(tooLarge(options), true)
    else answerWith(answer, handle(body))
  })
}

/** @param done gets undefined when the body is larger than `maxBytes` */
function readBody(res: uWS.HttpResponse, maxBytes: number, done: (body: Buffer | undefined) => void): void {
  const chunks: Buffer[] = []
  let bytes = 0
  res.onData((chunk, isLast) => {
    if (bytes > maxBytes) return
    bytes += chunk.byteLength
    if (bytes > maxBytes) {
      chunks.length = 0
      done(undefined)
      return
    }
    chunks.push(Buffer.from(chunk.slice(0))) // uWebSockets.js takes its memory back after this call
    if (isLast) done(Buffer.concat(chunks))
  })
}

function decode(component: string): string {
  try {
    return decodeURIComponent(component)
  } catch {
    return component // not percent-encoded: then it is looked for as it stands, and not found
  }
}
