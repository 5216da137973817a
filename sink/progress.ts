/** For readiness: does work get done, and if not, since when and why. */
import { withoutData } from '../shared/log.js'

interface Trouble {
  /** Epoch ms. */
  since: number
  reason: string
}

/** More suspects than that are nobody's own fault. */
const MOST_REMEMBERED = 1000

export class Progress {
  /** When each batch in hand began, epoch ms. */
  private readonly inHand = new Set<{ since: number }>()
  private readonly troubles = new Map<'Redis' | 'batch', Trouble>()
  /** Since the last batch failed another one was stored, with turns and calls: so it is not all of them that fail. */
  storedSinceFailure = false
  /** By call: the entry that failed when it was tried alone. */
  private readonly failedAlone = new Map<string, string>()

  /** @returns to be called when the batch is done with, one way or the other */
  began(): () => void {
    const batch = { since: Date.now() }
    this.inHand.add(batch)
    return () => this.inHand.delete(batch)
  }

  failed(part: 'Redis' | 'batch', error: Error): void {
    const since = this.troubles.get(part)?.since ?? Date.now()
    this.troubles.set(part, { since, reason: withoutData(error) })
  }

  succeeded(part: 'Redis' | 'batch'): void {
    this.troubles.delete(part)
  }

  /** @returns whether that entry of the call had failed alone before */
  failedAloneBefore(callSid: string, entryId: string): boolean {
    const isOnceMore = this.failedAlone.get(callSid) === entryId
    if (this.failedAlone.size >= MOST_REMEMBERED) this.failedAlone.clear()
    this.failedAlone.set(callSid, entryId)
    return isOnceMore
  }

  /** Why nothing gets done; undefined unless that has been so for longer than `ms`. */
  stalled(ms: number): string | undefined {
    const late = ({ since }: { since: number }) => Date.now() - since > ms
    for (const trouble of this.troubles.values()) if (late(trouble)) return `no progress: ${trouble.reason}`
    return [...this.inHand].some(late) ? 'no progress: a batch is not done yet' : undefined
  }
}
