/**
 * The calltape client: sends call events over one WebSocket, keeps each until the server has acknowledged it, and after a
 * lost connection reconnects and resends what was not. Imports nothing else of calltape, so it can be used alone.
 */
import { randomBytes } from 'node:crypto'
import { EventEmitter } from 'node:events'
import WebSocket from 'ws'
import {
  type CallEvent,
  type ClientEvents,
  ConnectionClosed,
  type ConnectOptions,
  EventRefused,
  type Stats,
} from './types.js'

export * from './types.js'

interface Waiter {
  resolve(): void
  reject(reason: Error): void
}

interface Entry {
  json: string
  bytes: number
  /** Absent for post(). */
  waiter: Waiter | undefined
  /** Has been on the wire, on this connection or an earlier one. */
  wired: boolean
  refused: boolean
}

type Json = Record<string, unknown>

const READY = Promise.resolve()
const isPositive = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) > 0

function endpoint(base: string, callSid: string | undefined): URL {
  if (!URL.canParse(base) || !/^(ws|http)s?:/i.test(base)) {
    throw new TypeError(`calltape client wants a ws://, wss://, http:// or https:// URL, got ${base}`)
  }
  const url = new URL(base)
  url.protocol = url.protocol.replace('http', 'ws')
  url.pathname = `${url.pathname.replace(/\/+$/, '')}/v1/stream`
  if (callSid !== undefined) url.searchParams.set('call_sid', callSid)
  return url
}

function withDefaults(options: ConnectOptions) {
  const { token, maxUnacked, maxBatch = 256, initialBackoffMs = 100, maxBackoffMs = 5000 } = options
  const { helloTimeoutMs = 10_000, silenceTimeoutMs = 30_000, closeTimeoutMs = 10_000 } = options
  const timeouts = { initialBackoffMs, maxBackoffMs, helloTimeoutMs, silenceTimeoutMs, closeTimeoutMs }
  return { token, maxUnacked, maxBatch, ...timeouts }
}

class Client extends EventEmitter<ClientEvents> {
  readonly #url: URL
  readonly #options: ReturnType<typeof withDefaults>
  readonly #nonce = randomBytes(9).toString('base64url')
  readonly #counts = { sent: 0, acked: 0, refused: 0, reconnects: 0, resent: 0 }
  /** Acknowledged up to #head, on the wire up to #next, waiting from there on. */
  #queue: Entry[] = []
  #head = 0
  #next = 0
  /** The number that the event before #head has on this connection. */
  #through = 0
  /** Events that may be on the wire, and bytes of a message: the server's hello says. */
  #window = 0
  #maxBytes = 0
  #opening: Waiter | undefined
  #socket: WebSocket | undefined
  /** The socket has had its hello. */
  #live = false
  #attempts = 0
  /** Waits for the hello, then for silence, then to reconnect: a connection is in one of these states at a time. */
  #timer: NodeJS.Timeout | undefined
  #scheduled = false
  #producers: Waiter[] = []
  #flushers: Waiter[] = []
  /** Why no more events are taken. */
  #closed: ConnectionClosed | undefined
  #closing: Promise<void> | undefined
  /** No connection any more; after close() that is when its flush has ended. */
  #over = false

  constructor(url: URL, options: ConnectOptions, opening: Waiter) {
    super()
    this.#url = url
    this.#options = withDefaults(options)
    this.#opening = opening
    this.#open()
  }

  /**
   * Sends one event; `event` may be changed afterwards. Events are stored in the order sent.
   *
   * @returns resolves when the server has stored it
   * @throws (rejects) EventRefused; ConnectionClosed; TypeError if JSON cannot express it
   */
  send<E extends CallEvent>(event: E): Promise<void> {
    return new Promise((resolve, reject) => this.#enqueue(event, { resolve, reject }))
  }

  /**
   * send() without a promise, for many events: a refusal is emitted as 'refused', flush() says when all are stored.
   *
   * @throws ConnectionClosed; TypeError if JSON cannot express it
   */
  post<E extends CallEvent>(event: E): void {
    this.#enqueue(event, undefined)
  }

  /**
   * Resolves when fewer than `maxUnacked` events are unacknowledged. A producer that does not await this before each
   * event fills the memory while the server is slow or away.
   *
   * @throws (rejects) ConnectionClosed
   */
  ready(): Promise<void> {
    if (this.#closed) return Promise.reject(this.#closed)
    if (this.#hasRoom()) return READY
    return new Promise((resolve, reject) => this.#producers.push({ resolve, reject }))
  }

  /**
   * Resolves when every event has been acknowledged or refused.
   *
   * @throws (rejects) ConnectionClosed if the client ends before that
   */
  flush(): Promise<void> {
    if (this.#over) return Promise.reject(this.#closed)
    if (this.#pending() === 0) return READY
    return new Promise((resolve, reject) => this.#flushers.push({ resolve, reject }))
  }

  /**
   * Takes no more events, flushes, reconnecting if need be, and closes the connection with code 1000.
   *
   * @throws (rejects) ConnectionClosed if events are still unacknowledged after `closeTimeoutMs`
   */
  close(): Promise<void> {
    this.#closing ??= this.#over ? READY : this.#flushAndClose()
    return this.#closing
  }

  /** Cuts the connection and ends the client, as a crash would: what is unacknowledged rejects with ConnectionClosed. */
  terminate(): void {
    this.#socket?.terminate() // first: no closing handshake comes after it
    this.#end(new ConnectionClosed('the client was terminated'))
  }

  /** Cuts the connection as a network failure would: the client reconnects and resends. Without a connection: nothing. */
  drop(): void {
    if (this.#live) this.#lost(new Error('dropped by drop()'))
  }

  get stats(): Stats {
    const { sent, acked, refused } = this.#counts
    return { ...this.#counts, unacked: sent - acked - refused }
  }

  #pending(): number {
    return this.#queue.length - this.#head
  }

  #hasRoom(): boolean {
    return this.#pending() < (this.#options.maxUnacked ?? this.#window)
  }

  #enqueue(event: CallEvent, waiter: Waiter | undefined): void {
    if (this.#closed) throw this.#closed
    // Without a key the server could not tell a resend from a second event. null is absent, as for the server.
    const keyed = event.id != null || (event.type === 'turn' && event.seq != null)
    const json = JSON.stringify(keyed ? event : { ...event, id: `${this.#nonce}-${this.#counts.sent}` })
    const entry = { json, bytes: Buffer.byteLength(json), waiter, wired: false, refused: false }
    this.#counts.sent++
    if (entry.bytes > this.#maxBytes) this.#refuseTooLarge(entry)
    else {
      this.#queue.push(entry)
      this.#schedule()
    }
  }

  /** What is sent before the event loop's next turn goes into one message. */
  #schedule(): void {
    if (this.#scheduled) return
    this.#scheduled = true
    setImmediate(this.#pump)
  }

  readonly #pump = (): void => {
    this.#scheduled = false
    if (!this.#live) return
    if (this.#next === this.#head) this.#timer?.refresh() // an idle connection's silence starts to count now
    const end = Math.min(this.#queue.length, this.#head + this.#window)
    while (this.#next < end) this.#socket?.send(this.#takeMessage(end))
  }

  #takeMessage(end: number): string {
    const start = this.#next
    const stop = Math.min(end, start + this.#options.maxBatch)
    let text = ''
    let bytes = 1
    do {
      const entry = this.#queue[this.#next]!
      bytes += entry.bytes + 1
      if (bytes > this.#maxBytes && this.#next > start) break
      text += this.#next === start ? entry.json : `,${entry.json}`
      if (entry.wired) this.#counts.resent++
      entry.wired = true
      this.#next++
    } while (this.#next < stop)
    return this.#next - start === 1 ? text : `[${text}]`
  }

  #open(): void {
    const { token, helloTimeoutMs } = this.#options
    const headers = token === undefined ? {} : { Authorization: `Bearer ${token}` }
    const socket = new WebSocket(this.#url, { headers, perMessageDeflate: false, skipUTF8Validation: true })
    this.#socket = socket
    this.#timer = setTimeout(() => this.#lost(new Error(`no hello within ${helloTimeoutMs} ms`)), helloTimeoutMs)
    // A socket that was given up still has events to emit.
    const current = () => socket === this.#socket
    const lost = (why: Error, final = false) => {
      if (current()) this.#lost(why, final)
    }
    socket.on('error', (error) => lost(error))
    socket.on('close', (code, reason) => lost(new Error(`the connection was closed: ${code} ${reason}`.trimEnd())))
    socket.on('unexpected-response', (_request, { statusCode, statusMessage }) =>
      lost(new Error(`the server answered ${statusCode} ${statusMessage}`), statusCode === 401),
    )
    socket.on('ping', () => current() && this.#live && this.#timer?.refresh())
    socket.on('message', (data) => current() && this.#receive(data.toString()))
  }

  #lost(why: Error, final = false): void {
    const socket = this.#socket
    this.#socket = undefined
    this.#live = false
    clearTimeout(this.#timer)
    socket?.terminate()
    if (this.#opening || final) {
      // Refused on each of several addresses, Node's error has a code but no message.
      const message = why.message || (why as NodeJS.ErrnoException).code
      const { origin, pathname } = this.#url
      this.#end(new ConnectionClosed(`cannot connect to ${origin}${pathname}: ${message}`, { cause: why }))
      return
    }
    const { initialBackoffMs, maxBackoffMs } = this.#options
    const retryMs = Math.min(maxBackoffMs, initialBackoffMs * 2 ** this.#attempts++) * (1 - Math.random() / 2)
    this.#timer = setTimeout(() => this.#open(), retryMs)
    this.emit('disconnect', why, retryMs)
  }

  #receive(text: string): void {
    if (this.#live) this.#timer?.refresh()
    let message: Json
    try {
      message = (JSON.parse(text) ?? {}) as Json
    } catch {
      message = {}
    }
    if (!this.#handle(message)) this.#lost(new Error(`bad message from the server: ${text.slice(0, 200)}`))
  }

  /** False for a message that the protocol does not allow now. */
  #handle(message: Json): boolean {
    if (message.type === 'hello') return !this.#live && this.#handleHello(message)
    if (message.type === 'ack') return this.#live && this.#handleAck(message)
    return message.type === 'error' && this.#live && this.#handleError(message)
  }

  #handleHello({ protocol, window, max_message_bytes: maxBytes }: Json): boolean {
    if (protocol !== 1 || !isPositive(window) || !isPositive(maxBytes)) return false
    const { silenceTimeoutMs } = this.#options
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => {
      if (this.#next > this.#head) this.#lost(new Error(`silent for ${silenceTimeoutMs} ms`))
    }, silenceTimeoutMs)
    this.#live = true
    this.#window = window
    this.#maxBytes = maxBytes
    const unacked = this.#queue.slice(this.#head).filter((entry) => !entry.refused)
    this.#queue = unacked.filter((entry) => entry.bytes <= maxBytes)
    this.#head = this.#next = this.#through = 0
    // Otherwise only an acknowledgement resets it: a server that falls over what is resent is left in peace.
    if (this.#queue.length === 0) this.#attempts = 0
    const opening = this.#opening
    this.#opening = undefined
    this.#schedule()
    this.#wake()
    // Last, because listeners may call the client.
    if (opening) opening.resolve()
    else {
      this.#counts.reconnects++
      for (const entry of unacked) if (entry.bytes > maxBytes) this.#refuseTooLarge(entry)
      this.emit('reconnect', this.#pending())
    }
    return true
  }

  #handleAck({ through }: Json): boolean {
    if (!Number.isSafeInteger(through)) return false
    const end = this.#head + (through as number) - this.#through
    if (end < this.#head || end > this.#next) return false
    let stored = 0
    for (let i = this.#head; i < end; i++) {
      const entry = this.#queue[i]!
      if (entry.refused) continue
      stored++
      entry.waiter?.resolve()
    }
    this.#counts.acked += stored
    this.#head = end
    this.#through = through as number
    this.#attempts = 0
    // Trimmed when at least half is acknowledged: each event is copied less than once on average.
    if (this.#head * 2 >= this.#queue.length) {
      this.#queue = this.#queue.slice(this.#head)
      this.#next -= this.#head
      this.#head = 0
    }
    if (this.#next < this.#queue.length) this.#schedule()
    this.#wake()
    this.emit('ack', stored)
    return true
  }

  #handleError({ event, code, message, path }: Json): boolean {
    const index = this.#head + Number(event) - this.#through - 1
    const entry = index >= this.#head && index < this.#next ? this.#queue[index] : undefined
    if (!entry || entry.refused) return false
    this.#refuse(entry, String(code), String(message), path === undefined ? undefined : String(path))
    return true
  }

  #refuseTooLarge(entry: Entry): void {
    this.#refuse(entry, 'too_large', `${entry.bytes} bytes; the server takes ${this.#maxBytes} at most`, undefined)
  }

  #refuse(entry: Entry, code: string, message: string, path: string | undefined): void {
    entry.refused = true
    this.#counts.refused++
    const error = new EventRefused(code, message, path, JSON.parse(entry.json) as CallEvent)
    if (entry.waiter) entry.waiter.reject(error)
    else this.emit('refused', error)
  }

  #wake(): void {
    if (this.#producers.length > 0 && this.#hasRoom()) for (const waiter of this.#producers.splice(0)) waiter.resolve()
    if (this.#pending() === 0) for (const waiter of this.#flushers.splice(0)) waiter.resolve()
  }

  async #flushAndClose(): Promise<void> {
    const { closeTimeoutMs } = this.#options
    const reason = new ConnectionClosed('the client was closed')
    this.#closed = reason
    const timer = setTimeout(() => {
      const message = `closed after ${closeTimeoutMs} ms with ${this.stats.unacked} events unacknowledged`
      this.#end(new ConnectionClosed(message))
    }, closeTimeoutMs)
    await this.flush().finally(() => clearTimeout(timer))
    const socket = this.#socket
    const gone = socket && new Promise((resolve) => socket.once('close', resolve))
    this.#end(reason)
    await gone
  }

  #end(reason: ConnectionClosed): void {
    if (this.#over) return
    this.#over = true
    this.#closed = reason
    this.#live = false
    clearTimeout(this.#timer)
    const socket = this.#socket
    this.#socket = undefined
    if (socket) {
      socket.close(1000)
      const cut = setTimeout(() => socket.terminate(), this.#options.closeTimeoutMs)
      socket.once('close', () => clearTimeout(cut))
    }
    const senders = this.#queue.slice(this.#head).map((entry) => entry.waiter)
    const waiters = [...senders, ...this.#producers.splice(0), ...this.#flushers.splice(0), this.#opening]
    for (const waiter of waiters) waiter?.reject(reason)
    this.#queue = []
    this.#head = this.#next = 0
    this.emit('close', reason)
  }
}

export type { Client }

/**
 * Opens a connection. Once it has been open, the client reconnects for ever, until close(), terminate() or a 401.
 *
 * @param url ws://, wss://, http:// or https://, without the /v1/stream
 * @returns resolves after the server's hello
 * @throws (rejects) ConnectionClosed that names why the first connection failed, with the error as `cause`; TypeError for
 * a bad URL
 */
export function connect(url: string, options: ConnectOptions = {}): Promise<Client> {
  return new Promise((resolve, reject) => {
    const opening = { resolve: () => resolve(client), reject }
    const client: Client = new Client(endpoint(url, options.callSid), options, opening)
  })
}
