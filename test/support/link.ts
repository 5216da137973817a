/** A TCP link to the stores that fails at a message chosen beforehand: how a process dies, or is cut off, in the middle of anything. */
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net'

/**
 * - `dies`: cut, and nothing passes ever again. For the stores, whoever is behind it is as dead as by `kill -9`.
 * - `breaks`: the connections to that store are cut; those to the other one live on, and new ones pass.
 * - `hangs`: nothing passes until `release`; then all of it does, late.
 */
export const LINK_FAULTS = ['dies', 'breaks', 'hangs'] as const
export type LinkFault = (typeof LINK_FAULTS)[number]

export class Link {
  /** The targets' URLs, by way of this link. */
  readonly urls: string[] = []
  private readonly servers: Server[] = []
  /** Of each target. */
  private readonly sockets: Set<Socket>[] = []
  private held: [Socket, Buffer][] | undefined
  private isDead = false
  private armed: { left: number; fault: LinkFault | undefined; happened: () => void } | undefined

  static async open(...targets: string[]): Promise<Link> {
    const link = new Link()
    for (const target of targets) await link.add(new URL(target))
    return link
  }

  private async add(target: URL): Promise<void> {
    const sockets = new Set<Socket>()
    this.sockets.push(sockets)
    const server = createServer((near) => {
      if (this.isDead) {
        near.destroy()
        return
      }
      const far = connect(Number(target.port), target.hostname)
      for (const [from, to] of [[near, far] as const, [far, near] as const]) {
        sockets.add(from)
        from.setNoDelay(true)
        from.on('data', (data) => this.pass(sockets, to, data))
        from.on('error', () => undefined) // its 'close' follows
        from.on('close', () => {
          sockets.delete(from)
          to.destroy()
        })
      }
    })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    this.servers.push(server)
    const url = new URL(target)
    url.hostname = '127.0.0.1'
    url.port = String((server.address() as AddressInfo).port)
    this.urls.push(url.href)
  }

  /** @returns when the `nth` message from now, in whatever direction, has met its fault: it gets lost, or late. Without one it passes */
  arm(nth: number, fault?: LinkFault): Promise<void> {
    return new Promise((happened) => {
      this.armed = { left: nth, fault, happened }
    })
  }

  disarm(): void {
    this.armed = undefined
  }

  /** Ends a hang: what was held arrives now, in order. */
  release(): void {
    const held = this.held ?? []
    this.held = undefined
    for (const [to, data] of held) to.write(data)
  }

  private pass(sockets: Set<Socket>, to: Socket, data: Buffer): void {
    if (this.armed && --this.armed.left <= 0) {
      const { fault, happened } = this.armed
      this.armed = undefined
      if (fault === 'hangs') this.held = []
      else if (fault === 'dies') this.cut()
      else if (fault === 'breaks') for (const socket of sockets) socket.destroy()
      happened()
      if (fault && fault !== 'hangs') return
    }
    if (this.held) this.held.push([to, data])
    else to.write(data)
  }

  private cut(): void {
    this.isDead = true
    this.held = undefined
    for (const sockets of this.sockets) for (const socket of sockets) socket.destroy()
  }

  async close(): Promise<void> {
    this.cut()
    await Promise.all(this.servers.map((server) => new Promise((resolve) => server.close(resolve))))
  }
}
