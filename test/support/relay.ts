/** A TCP proxy that does to a connection what networks do: holds back, delays, and cuts, also in the middle of a reply. */
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net'

/** One direction of one connection. Chunks keep their order, however the delay changes. */
class Pipe {
  private held: Buffer[] = []
  private freeAt = 0

  constructor(
    private readonly to: Socket,
    private readonly isHeld: () => boolean,
    private readonly delayMs: () => number,
  ) {}

  get holds(): boolean {
    return this.held.length > 0
  }

  push(data: Buffer): void {
    if (this.isHeld()) {
      this.held.push(data)
      return
    }
    const now = performance.now()
    this.freeAt = Math.max(this.freeAt, now + this.delayMs())
    if (this.freeAt <= now) this.to.write(data)
    else setTimeout(() => this.to.write(data), this.freeAt - now)
  }

  release(): void {
    for (const data of this.held.splice(0)) this.to.write(data)
  }

  lose(): void {
    this.held = []
  }
}

/** Stands between a client and a server (or several that are alike), and holds back or cuts what they say to each other. */
export class Relay {
  holdRequests = false
  holdReplies = false
  /** By so much each chunk comes later, ms. */
  delayMs = 0
  /** Asked about each chunk, of requests and of replies. 'drop': it does not arrive, and its connection is cut. */
  onChunk: ((data: Buffer) => 'pass' | 'drop') | undefined
  private cutAfterReplyBytes = Number.POSITIVE_INFINITY
  private next = 0
  private readonly sockets = new Set<Socket>()
  private readonly requests = new Set<Pipe>()
  private readonly replies = new Set<Pipe>()

  private constructor(
    private readonly server: Server,
    /** That of the first server, with the relay's address and port. */
    readonly url: string,
    private readonly targets: URL[],
  ) {}

  /** @param urls where connections go in turn; one that refuses is passed over, as a load balancer does */
  static async start(...urls: [string, ...string[]]): Promise<Relay> {
    // No Nagle: it would hold up what follows a small chunk, and tests count on chunks that are late only when told to be.
    const server = createServer({ noDelay: true }, (client) => {
      relay.watch(client)
      relay.dial(client, relay.targets.length)
    })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    const url = new URL(urls[0])
    url.hostname = '127.0.0.1'
    url.port = String((server.address() as AddressInfo).port)
    const targets = urls.map((each) => new URL(each))
    const relay = new Relay(server, url.href, targets)
    return relay
  }

  private dial(client: Socket, tries: number): void {
    client.pause() // what it says before there is a server waits in the kernel
    const target = this.targets[this.next++ % this.targets.length]!
    const server = connect({ port: Number(target.port), host: target.hostname, noDelay: true })
    const refused = () => (tries > 1 ? this.dial(client, tries - 1) : client.destroy())
    server.once('error', refused)
    server.once('connect', () => {
      server.off('error', refused)
      this.join(client, server)
    })
  }

  private watch(socket: Socket): void {
    this.sockets.add(socket)
    socket.on('error', () => undefined) // a cut connection: its 'close' follows
    socket.on('close', () => this.sockets.delete(socket))
  }

  private join(client: Socket, server: Socket): void {
    const delay = () => this.delayMs
    const request = new Pipe(server, () => this.holdRequests, delay)
    const reply = new Pipe(client, () => this.holdReplies, delay)
    this.requests.add(request)
    this.replies.add(reply)
    this.watch(server)
    const ended = (other: Socket) => () => {
      this.requests.delete(request)
      this.replies.delete(reply)
      other.destroy()
    }
    client.on('close', ended(server))
    server.on('close', ended(client))
    const passes = (data: Buffer) => {
      if (this.onChunk?.(data) !== 'drop') return true
      client.destroy()
      return false
    }
    client.on('data', (data) => {
      if (passes(data)) request.push(data)
    })
    server.on('data', (data) => {
      if (!passes(data)) return
      reply.push(data.subarray(0, this.cutAfterReplyBytes))
      this.cutAfterReplyBytes -= data.length
      if (this.cutAfterReplyBytes > 0) return
      this.cutAfterReplyBytes = Number.POSITIVE_INFINITY
      client.destroySoon() // only this connection, once what passed is written
    })
    if (client.destroyed) server.destroy() // it did not wait
    client.resume()
  }

  get holdsRequests(): boolean {
    return [...this.requests].some((pipe) => pipe.holds)
  }

  get holdsReplies(): boolean {
    return [...this.replies].some((pipe) => pipe.holds)
  }

  /** In both directions, until `release`. */
  hold(): void {
    this.holdRequests = true
    this.holdReplies = true
  }

  release(): void {
    this.holdRequests = false
    this.holdReplies = false
    for (const pipe of [...this.requests, ...this.replies]) pipe.release()
  }

  /** What is held is lost; new connections pass. @param reset with RST instead of FIN */
  cut(reset = false): void {
    for (const pipe of [...this.requests, ...this.replies]) pipe.lose()
    for (const socket of this.sockets) reset ? socket.resetAndDestroy() : socket.destroy()
    this.release()
  }

  /** After so many more bytes of replies, the connection that brings them is cut. */
  cutInReply(bytes: number): void {
    this.cutAfterReplyBytes = Math.max(1, bytes)
  }

  /** As if their machine had lost its power: the connections there are end without a word to either side. New ones pass. */
  forget(): void {
    for (const socket of this.sockets) socket.removeAllListeners('data').removeAllListeners('close').resume()
  }

  async stop(): Promise<void> {
    this.cut()
    await new Promise((resolve) => this.server.close(resolve))
  }
}
