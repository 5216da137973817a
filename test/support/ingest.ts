/** Ingest in this process for one test, and clients of its WebSocket that keep all it says. Both end with the test. */
import { once } from 'node:events'
import { expect, onTestFinished } from 'vitest'
import { type ClientOptions, WebSocket } from 'ws'
import { type Ingest, startIngest } from '../../ingest/ingest.js'
import { type Environment, readConfig } from '../../shared/config.js'
import { log, until } from './stores.js'

export async function testIngest(environment: Environment): Promise<Ingest> {
  const ingest = await startIngest(readConfig({ INGEST_PORT: '0', ...environment }), log)
  let stopped: Promise<void> | undefined
  const stop = () => (stopped ??= ingest.stop())
  onTestFinished(stop)
  return { ...ingest, stop }
}

type Message = Record<string, unknown>

/** A raw connection to /v1/stream. */
export class Wire {
  readonly messages: Message[] = []
  /** What the last ack said. */
  acked = 0
  closed: { code: number; reason: string } | undefined

  private constructor(readonly socket: WebSocket) {
    socket.on('message', (data) => {
      const message = JSON.parse(data.toString()) as Message
      this.messages.push(message)
      if (message.type !== 'ack') return
      if ((message.through as number) <= this.acked) throw new Error('an ack went back, or was sent twice')
      this.acked = message.through as number
    })
    socket.on('close', (code, reason) => {
      this.closed = { code, reason: reason.toString() }
    })
    socket.on('error', () => undefined) // its 'close' follows
  }

  /** @throws when the server does not upgrade: `Unexpected server response: 401` */
  static async open(
    ingest: Pick<Ingest, 'url'>,
    query = '',
    options: ClientOptions = {},
    protocols: string[] = [],
  ): Promise<Wire> {
    const url = `${ingest.url.replace('http', 'ws')}/v1/stream${query}`
    const socket = new WebSocket(url, protocols, { perMessageDeflate: false, ...options })
    const wire = new Wire(socket)
    onTestFinished(() => socket.terminate())
    await once(socket, 'open')
    await until('the server says hello or closes', () => wire.messages.length > 0 || wire.closed !== undefined)
    return wire
  }

  get hello(): Message | undefined {
    return this.messages.find(({ type }) => type === 'hello')
  }

  get errors(): Message[] {
    return this.messages.filter(({ type }) => type === 'error')
  }

  /** A string or bytes are sent as they are, everything else as JSON. */
  send(message: unknown): void {
    this.socket.send(typeof message === 'string' || message instanceof Uint8Array ? message : JSON.stringify(message))
  }

  async untilAcked(through: number): Promise<void> {
    await until(`event ${through} is acked`, () => this.acked >= through || this.closed !== undefined)
    expect({ acked: this.acked, closed: this.closed }).toMatchObject({ acked: through })
  }

  async untilClosed(): Promise<{ code: number; reason: string }> {
    return await until('the connection is closed', () => this.closed)
  }

  async close(): Promise<void> {
    this.socket.close(1000)
    await this.untilClosed()
  }
}
