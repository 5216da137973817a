/** The leases that a worker holds, kept alive for as long as it works on them. */
import type { Logger } from '../shared/log.js'
import type { Lease, Leases } from './lease.js'
import { givenBack, type Settled, type Settlement, untouched } from './settle.js'

export class Hold {
  private readonly held: Set<Lease>
  /** Of those that have lapsed before. What this sink has lived through, Redis may know; of the others there is no news. */
  private readonly tried = new Set<Lease>()
  private readonly timer: NodeJS.Timeout
  private prolonging: Promise<void> = Promise.resolve()

  constructor(
    private readonly leases: Leases,
    taken: Lease[],
    leaseMs: number,
    private readonly log: Logger,
  ) {
    this.held = new Set(taken)
    this.timer = setInterval(() => this.prolong(), leaseMs / 3)
  }

  private prolong(): void {
    this.prolonging = this.prolonging
      .then(() => this.leases.prolong(this.held))
      .catch((error: Error) => this.log.warn({ err: error }, 'leases could not be prolonged'))
  }

  /** Before anything is done with them. */
  tries(leases: Lease[]): void {
    for (const lease of leases) if (lease.lapses > 0) this.tried.add(lease)
  }

  /** See `Leases.isolate`. */
  async isolate(lease: Lease, entryId: string): Promise<boolean> {
    await this.prolonging
    return this.leases.isolate(lease, entryId)
  }

  /** Never throws: what Redis refuses is in the answer. */
  async settle(settlements: Settlement[]): Promise<Settled> {
    for (const { lease } of settlements) this.held.delete(lease)
    await this.prolonging // it moves the deadlines by which settle proves the leases
    return this.leases.settle(settlements)
  }

  /** Gives back what is still held: whoever works next may have it at once. */
  async end(): Promise<void> {
    clearInterval(this.timer)
    const settlements = [...this.held].map((lease) => (this.tried.has(lease) ? givenBack(lease) : untouched(lease)))
    if (settlements.length === 0) return
    const { failure } = await this.settle(settlements)
    if (failure) this.log.warn({ err: failure }, 'leases could not be given back; they will lapse')
  }
}
