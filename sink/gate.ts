/**
 * The gate before the workers. While PostgreSQL cannot store anything it is closed: nothing is leased, so memory stays as it
 * is and other sinks may have the calls. Behind the closed gate PostgreSQL is asked again and again, for ever, less and less
 * often; as soon as it can store, the gate opens by itself.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { backoffMs } from '../shared/backoff.js'
import { type Logger, withoutData } from '../shared/log.js'
import type { Pool } from '../shared/postgres.js'

const FIRST_PAUSE_MS = 50
const MAX_PAUSE_MS = 5000

export class Gate {
  private opening: Promise<void> | undefined
  /** In a row: an answer to the question is not yet a success, the next batch may fail like the last one. */
  private failures = 0
  /** How often PostgreSQL answered and then nothing could be stored all the same. */
  vainOpenings = 0
  /** Why it is closed; or why it was, until a batch is stored: PostgreSQL that answers may still refuse the next one. */
  reason: string | undefined

  /** @param ask rejects while PostgreSQL cannot store anything @param signal aborted: the gate opens for good */
  constructor(
    private readonly ask: () => Promise<void>,
    private readonly log: Logger,
    private readonly signal: AbortSignal,
  ) {}

  get isOpen(): boolean {
    return this.opening === undefined
  }

  /** Resolves when it is open. */
  async pass(): Promise<void> {
    while (this.opening) await this.opening
  }

  /** @param hint what an operator should do about it */
  close(error: Error, hint: string | undefined): void {
    this.reason = describe(error, hint)
    if (this.opening || this.signal.aborted) return
    this.log[hint ? 'error' : 'warn']({ err: error, hint }, 'PostgreSQL cannot store: nothing is leased until it can')
    this.opening = this.reopen().finally(() => {
      this.opening = undefined
    })
  }

  /** A batch was stored. */
  succeeded(): void {
    this.failures = 0
    this.vainOpenings = 0
    if (!this.opening) this.reason = undefined
  }

  /** There is nothing to store: whatever it was, others have got over it. */
  idle(): void {
    if (!this.opening) this.reason = undefined
  }

  private async reopen(): Promise<void> {
    const since = Date.now()
    while (!this.signal.aborted) {
      this.failures++
      const pause = backoffMs(this.failures, FIRST_PAUSE_MS, MAX_PAUSE_MS)
      await sleep(pause, undefined, { signal: this.signal }).catch(() => undefined) // aborted: the loop ends
      try {
        await this.ask()
        this.vainOpenings++
        this.log.info({ seconds: (Date.now() - since) / 1000 }, 'PostgreSQL answers again')
        return
      } catch (error) {
        this.reason = withoutData(error as Error)
      }
    }
  }
}

const describe = (error: Error, hint: string | undefined) =>
  hint ? `${hint} (${withoutData(error)})` : withoutData(error)

const ANSWER_TIMEOUT_MS = 2000

/** PostgreSQL answers, and it is not a standby. @throws why it cannot store */
export async function askWritable(pool: Pool): Promise<void> {
  const asked = ask(pool)
  const isLate = await Promise.race([asked, sleep(ANSWER_TIMEOUT_MS, true, { ref: false })])
  if (!isLate) return
  asked.catch(() => undefined) // nobody waits for it any more
  throw new Error(`timeout: no answer within ${ANSWER_TIMEOUT_MS} ms`)
}

async function ask(pool: Pool): Promise<void> {
  const client = await pool.connect()
  let isFit = false
  try {
    // The timeout is pg's own, but its types know it only for whole connections.
    const question = { text: 'SHOW transaction_read_only', query_timeout: ANSWER_TIMEOUT_MS }
    const { rows } = await client.query<{ transaction_read_only: string }>(question)
    isFit = rows[0]?.transaction_read_only === 'off'
    if (!isFit) throw new Error('it is read-only: a standby, or a demoted primary')
  } finally {
    client.release(!isFit) // what led here once would lead here again: a new connection may find the new primary
  }
}
