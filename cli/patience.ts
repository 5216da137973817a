/** Patience with servers that are away for a while: somebody may kill them, to see whether anything gets lost. */
import { setMaxListeners } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { backoffMs } from '../shared/backoff.js'
import { isBug, OperatorError } from '../shared/config.js'
import { reasonOf } from '../shared/log.js'
import { sqlState } from '../shared/postgres.js'
import { verdictOn } from '../sink/verdict.js'

const FIRST_PAUSE_MS = 200
const MAX_PAUSE_MS = 3000
/** A server that vanished without a word would be waited for in vain. */
const ATTEMPT_MS = 30_000

export class Patience {
  /**
   * @param limitMs how long the same thing may go on failing; 0: not at all
   * @param say told when something begins to fail, and when it is back
   */
  constructor(
    private readonly limitMs: number,
    private readonly say: (line: string) => void,
    private readonly signal: AbortSignal,
  ) {
    setMaxListeners(0, signal) // everybody who waits listens
  }

  /**
   * Tries `work` until it succeeds.
   *
   * @param what the server that it asks
   * @throws (rejects) OperatorError when that server stays away; what is not for being away, and without patience everything, as it comes
   */
  async insist<T>(what: string, work: () => Promise<T>): Promise<T> {
    if (this.limitMs === 0) return work()
    const began = performance.now()
    for (let failures = 1; ; failures++) {
      try {
        const result = await withinAttempt(work())
        if (failures > 1) this.say(`${what} is back`)
        return result
      } catch (error) {
        this.signal.throwIfAborted()
        if (!isPassing(error)) throw error
        const reason = `${what} is away: ${reasonOf(rootOf(error as Error))}`
        if (performance.now() - began > this.limitMs) throw new OperatorError(reason, { cause: error })
        if (failures === 1) this.say(`${reason}; trying again`)
        await sleep(backoffMs(failures, FIRST_PAUSE_MS, MAX_PAUSE_MS), undefined, { signal: this.signal })
      }
    }
  }
}

async function withinAttempt<T>(work: Promise<T>): Promise<T> {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no answer within ${ATTEMPT_MS} ms`)), ATTEMPT_MS)
  })
  try {
    return await Promise.race([work, late])
  } finally {
    clearTimeout(timer)
  }
}

/** fetch() says only that it failed, with a TypeError; why is in its cause. */
const isFetchFailure = (error: unknown) => error instanceof TypeError && error.cause instanceof Error
const rootOf = (error: Error) => (isFetchFailure(error) ? (error.cause as Error) : error)

function isPassing(error: unknown): boolean {
  if (isFetchFailure(error)) return true
  if (error instanceof OperatorError || isBug(error)) return false
  return sqlState(error) === undefined || verdictOn(error) === 'retry'
}
