/**
 * The peers' WebSocket server: the library, the protocol and the acks are calltape's, so that what is compared is what comes
 * behind them.
 */
import uWS from 'uWebSockets.js'
import type { SentEvent } from '../../cli/compare.js'
import type { Config } from '../../shared/config.js'

/** Resolves when all events are safe in the peer's first store. */
export type Store = (events: SentEvent[]) => Promise<void>

interface Socket {
  isOpen: boolean
  received: number
  /** Everything before is acked. */
  acked: Promise<void>
}

/**
 * Whatever fails ends the process, loudly.
 *
 * @param config what calltape's own ingest would give its clients, it gives them, too
 * @returns http://host:port
 */
export function serve({ WINDOW, MAX_MESSAGE_BYTES }: Config, store: Store): Promise<string> {
  const hello = JSON.stringify({
    type: 'hello',
    protocol: 1,
    window: WINDOW,
    max_message_bytes: MAX_MESSAGE_BYTES,
  })
  const app = uWS.App().ws<Socket>('/v1/stream', {
    maxPayloadLength: MAX_MESSAGE_BYTES,
    idleTimeout: 0,
    upgrade(res, req, context) {
      const socket: Socket = { isOpen: true, received: 0, acked: Promise.resolve() }
      const header = (name: string) => req.getHeader(`sec-websocket-${name}`)
      res.upgrade(socket, header('key'), header('protocol'), header('extensions'), context)
    },
    open(ws) {
      ws.send(hello)
    },
    message(ws, message) {
      const given = JSON.parse(Buffer.from(message).toString()) as SentEvent | SentEvent[]
      const events = Array.isArray(given) ? given : [given]
      const socket = ws.getUserData()
      socket.received += events.length
      const ack = JSON.stringify({ type: 'ack', through: socket.received })
      const stored = store(events)
      socket.acked = Promise.all([socket.acked, stored]).then(() => {
        if (socket.isOpen) ws.send(ack)
      })
    },
    close(ws) {
      ws.getUserData().isOpen = false
    },
  })
  return new Promise((resolve, reject) => {
    app.listen('127.0.0.1', 0, (socket) => {
      if (socket) resolve(`http://127.0.0.1:${uWS.us_socket_local_port(socket)}`)
      else reject(new Error('cannot listen on 127.0.0.1'))
    })
  })
}
