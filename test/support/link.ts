/** A way to the stores that fails at a message chosen beforehand: how a process dies, or is cut off, in the middle of anything. */
import { Relay } from './relay.js'

/**
 * - `dies`: cut, and nothing passes ever again. For the stores, whoever is behind it is as dead as by `kill -9`.
 * - `breaks`: the connections to that store are cut; those to the other one live on, and new ones pass.
 * - `hangs`: nothing passes until `release`; then all of it does, late.
 */
export const LINK_FAULTS = ['dies', 'breaks', 'hangs'] as const
export type LinkFault = (typeof LINK_FAULTS)[number]

/** A relay for each store, and a count of what passes all of them. */
export class Link {
  private isDead = false
  private armed: { left: number; fault: LinkFault | undefined; happened: () => void } | undefined

  private constructor(private readonly relays: Relay[]) {
    for (const relay of relays) relay.onChunk = () => this.meet(relay)
  }

  static async open(...targets: string[]): Promise<Link> {
    return new Link(await Promise.all(targets.map((target) => Relay.start(target))))
  }

  /** The targets' URLs, by way of this link. */
  get urls(): string[] {
    return this.relays.map(({ url }) => url)
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

  /** Ends a hang: what was held arrives now, each connection's in its order. */
  release(): void {
    for (const relay of this.relays) relay.release()
  }

  /** A message that passes `relay` counts, and may be the one that meets its fault. */
  private meet(relay: Relay): 'pass' | 'drop' {
    // It goes on listening: were the port free, another link might get it, and whoever is dead would live on behind that one.
    if (this.isDead) return 'drop'
    if (!this.armed || --this.armed.left > 0) return 'pass'
    const { fault, happened } = this.armed
    this.armed = undefined
    if (fault === 'hangs') for (const each of this.relays) each.hold()
    if (fault === 'dies') {
      this.isDead = true
      for (const each of this.relays) each.cut()
    }
    if (fault === 'breaks') relay.cut()
    happened()
    return fault === 'dies' || fault === 'breaks' ? 'drop' : 'pass'
  }

  async close(): Promise<void> {
    await Promise.all(this.relays.map((relay) => relay.stop()))
  }
}
