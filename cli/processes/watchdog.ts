/**
 * Finds a process that lives and does nothing: its event loop is blocked, or it was stopped (SIGSTOP). It holds connections that
 * nobody answers, and the system goes on giving it new ones.
 */
import { setImmediate as nextEvents, setTimeout as sleep } from 'node:timers/promises'

export interface Patience {
  /** Between two questions, and how long each waits for its answer, ms. */
  everyMs: number
  /** So many in a row without an answer are too many. */
  questions: number
}

/** Half a minute: longer than any pause of a garbage collector, or of a machine that is too busy. */
export const PATIENCE: Patience = { everyMs: 5000, questions: 6 }

/**
 * Counted in questions and not by the clock: when this process itself, or the machine, was suspended for an hour, that is one
 * question that was not answered. The next one finds out.
 *
 * @param ask rejects when there is no answer within that time, or when there can be none
 * @param isWatched asked before each question
 * @returns whether it hangs; false once it is no longer watched
 */
export async function hangs(
  ask: (timeoutMs: number) => Promise<unknown>,
  isWatched: () => boolean,
  { everyMs, questions }: Patience,
): Promise<boolean> {
  let unanswered = 0
  while (isWatched()) {
    const answers = await ask(everyMs).then(
      () => true,
      () => false,
    )
    if (answers) {
      unanswered = 0
      await sleep(everyMs)
      continue
    }
    await nextEvents() // questions to one that has just died fail at once, before it is known that it died
    if (++unanswered >= questions) return isWatched()
  }
  return false
}
