/**
 * Lanes that could not be asked: their server of a Cluster is down, or hangs. They are left alone for a while, for a worker that
 * waits for them keeps the other servers' calls waiting: until a connection is given up that owes an answer, it takes seconds.
 */
import { backoffMs } from '../shared/backoff.js'
import type { Lane } from '../shared/lanes.js'

const FIRST_PAUSE_MS = 50
const MAX_PAUSE_MS = 5000

export class AwayLanes {
  private readonly away = new Map<Lane, { failures: number; until: number }>()

  /** @param lanes how many there are: where one is all (a single Redis), there is nobody else to go on with, and it is never away */
  constructor(private readonly lanes: number) {}

  isAway(lane: Lane): boolean {
    return (this.away.get(lane)?.until ?? 0) > Date.now()
  }

  /** @returns what was asked of it, or its error, as it comes */
  async watch<T>(lane: Lane, asked: Promise<T>): Promise<T> {
    try {
      const answer = await asked
      this.away.delete(lane)
      return answer
    } catch (error) {
      const failures = (this.away.get(lane)?.failures ?? 0) + 1
      const pause = this.lanes === 1 ? 0 : backoffMs(failures, FIRST_PAUSE_MS, MAX_PAUSE_MS)
      this.away.set(lane, { failures, until: Date.now() + pause })
      throw error
    }
  }
}
