/** The network side of ingest, and the only file that knows uWebSockets.js: routes, bodies, tokens, sockets. */

import uWS from 'uWebSockets.js'
import { createHash, timingSafeEqual } from 'node:crypto'
import { OperatorError } from '../shared/config.js'
import type { Answer } from './http.js'
import { problem } from './http.js'
import { CLOSE_GOING_AWAY, type Socket } from './stream.js'

/** What a WebSocket's events are handed to. */
export interface Connection {
  opened(): void
  /** @param text undefined for a binary message */
  accept(text: string | undefined): void
  closed(code: number): void
}

export interface Routes {
  /** A new `/v1/stream` connection; an Answer refuses it. */
  stream(socket: Socket, query: URLSearchParams): Connection | Answer
  postEvents(contentType: string, body: Buffer): Promise<Answer>
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
  /** Closes what is still open, with 1001. */
  closeConnections(): void
}

/** What a slow reader may leave unread before its connection is cut: acks are small, a client that reads none is broken. */
const MAX_UNREAD_BYTES = 1024 * 1024
const IDLE_SECONDS = 60
const JSON_TYPE = 'application/json; charset=utf-8'

interface SocketData {
  query: string
  connection?: Connection
}

type UwsSocket = uWS.WebSocket<SocketData>

/** @throws OperatorError when the port cannot be listened on */
export function listen(options: ServerOptions, routes: Routes): Promise<Server> {
  const { tls } = options
  const app = tls ? uWS.SSLApp({ cert_file_name: tls.cert, key_file_name: tls.key }) : uWS.App()
  const open = new Set<UwsSocket>()
  const allowed = tokenCheck(options.tokens)

  addStream(app, options, routes, allowed, open)
  app.post('/v1/events', (res, req) => {
    const contentType = req.getHeader('content-type')
    const answer = respond(res)
    if (!allowed(req)) return answer(UNAUTHORIZED, true)
    if (Number(req.getHeader('content-length') || 0) > options.maxBodyBytes) return answer(tooLarge(options), true)
    readBody(res, options.maxBodyBytes, (body) => {
      if (body === undefined) answer(tooLarge(options), true)
      else answerWith(answer, routes.postEvents(contentType, body))
    })
  })
  const get = (path: string, handle: (req: uWS.HttpRequest) => Promise<Answer> | Answer, needsToken: boolean) =>
    app.get(path, (res, req) => {
      const answer = respond(res)
      if (needsToken && !allowed(req)) return answer(UNAUTHORIZED)
      answerWith(answer, handle(req))
    })
  get('/v1/calls', (req) => routes.listCalls(new URLSearchParams(req.getQuery())), true)
  get('/v1/calls/:call_sid', (req) => routes.getCall(decode(req.getParameter(0))), true)
  get('/metrics', () => routes.metrics(), false)
  get('/healthz', () => ({ status: '200 OK', body: { status: 'ok' } }), false)
  get('/readyz', () => routes.ready(), false)
  app.any('/*', (res, req) => {
    const { status, body } = problem(
      '404 Not Found',
      'not_found',
      `there is no ${req.getMethod().toUpperCase()} ${req.getUrl()}`,
    )
    respond(res)({ status, body })
  })

  return new Promise((resolve, reject) => {
    app.listen(options.host, options.port, (socket) => {
      if (!socket) {
        reject(new OperatorError(`INGEST_PORT: cannot listen on ${options.host}:${options.port}; is it in use?`))
        return
      }
      resolve({
        port: uWS.us_socket_local_port(socket),
        stopListening: () => uWS.us_listen_socket_close(socket),
        closeConnections: () => {
          for (const ws of [...open])
            ws.end(CLOSE_GOING_AWAY, 'calltape is going away: reconnect and resend what was not acked')
        },
      })
    })
  })
}

function addStream(
  app: uWS.TemplatedApp,
  options: ServerOptions,
  routes: Routes,
  allowed: (req: uWS.HttpRequest) => boolean,
  open: Set<UwsSocket>,
): void {
  app.ws<SocketData>('/v1/stream', {
    maxPayloadLength: options.maxMessageBytes,
    maxBackpressure: MAX_UNREAD_BYTES,
    idleTimeout: IDLE_SECONDS,
    sendPingsAutomatically: true,
    upgrade(res, req, context) {
      if (!allowed(req)) return respond(res)(UNAUTHORIZED)
      res.upgrade<SocketData>(
        { query: req.getQuery() },
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
      const connection = routes.stream(socket, new URLSearchParams(data.query))
      if ('status' in connection) {
        ws.end(1008, JSON.stringify(connection.body).slice(0, 120))
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
  })
}

const UNAUTHORIZED: Answer = problem(
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

/** Compares digests, so that neither the time nor the length tells how much of a token was right. */
function tokenCheck(tokens: string[]): (req: uWS.HttpRequest) => boolean {
  if (tokens.length === 0) return () => true
  const digest = (token: string) => createHash('sha256').update(token).digest()
  const digests = tokens.map(digest)
  return (req) => {
    const [, token] = /^Bearer +(\S+) *$/i.exec(req.getHeader('authorization')) ?? []
    if (token === undefined) return false
    const given = digest(token)
    return digests.filter((each) => timingSafeEqual(each, given)).length > 0
  }
}

type AnswerFunction = (answer: Answer, closeConnection?: boolean) => void

/** A response may be written only while its client is there. */
function respond(res: uWS.HttpResponse): AnswerFunction {
  let gone = false
  res.onAborted(() => {
    gone = true
  })
  return (answer, closeConnection = false) => {
    if (gone) return
    gone = true
    res.cork(() => {
      res.writeStatus(answer.status)
      for (const [name, value] of Object.entries(answer.headers ?? {})) res.writeHeader(name, value)
      if (typeof answer.body === 'string') {
        res.end(answer.body, closeConnection)
      } else {
        res.writeHeader('Content-Type', JSON_TYPE).end(JSON.stringify(answer.body), closeConnection)
      }
    })
  }
}

function answerWith(answer: AnswerFunction, result: Promise<Answer> | Answer): void {
  Promise.resolve(result).then(
    (value) => answer(value),
    (error: Error) => answer(problem('503 Service Unavailable', 'unavailable', error.message, { 'Retry-After': '2' })),
  )
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
