/** Waits until PostgreSQL has the turns that rescue has seen: the sinks bring them there. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Pool } from '../../shared/postgres.js'

const PAGE_TURNS = 5000
const LOOK_MS = 200

const COUNT = {
  name: 'rescue-turns',
  text: `
    SELECT count(*)::int AS n FROM call_transcript_turns
    JOIN unnest($1::text[], $2::text[]) AS k(call_sid, turn_id) USING (call_sid, turn_id)`,
}

interface Page {
  callSids: string[]
  turnIds: string[]
  missing: number
}

/**
 * @param onLook told how many turns are missing
 * @returns how many are missing when all the patience is used up
 * @throws as PostgreSQL does
 */
export async function waitUntilStored(
  pool: Pool,
  turns: Iterable<[callSid: string, turnIds: Iterable<string>]>,
  waitMs: number,
  signal: AbortSignal,
  onLook: (missing: number) => void,
): Promise<number> {
  const deadline = performance.now() + waitMs
  let pages = inPages(turns)
  for (;;) {
    for (const page of pages) {
      const { rows } = await pool.query<{ n: number }>({ ...COUNT, values: [page.callSids, page.turnIds] })
      page.missing = page.turnIds.length - rows[0]!.n
    }
    pages = pages.filter(({ missing }) => missing > 0)
    const missing = pages.reduce((sum, page) => sum + page.missing, 0)
    onLook(missing)
    if (missing === 0 || performance.now() >= deadline || signal.aborted) return missing
    await sleep(LOOK_MS, undefined, { signal }).catch(() => undefined) // then it looks once more
  }
}

function inPages(turns: Iterable<[callSid: string, turnIds: Iterable<string>]>): Page[] {
  const pages: Page[] = []
  for (const [callSid, turnIds] of turns) {
    for (const turnId of turnIds) {
      let page = pages.at(-1)
      if (!page || page.turnIds.length === PAGE_TURNS) {
        page = { callSids: [], turnIds: [], missing: 0 }
        pages.push(page)
      }
      page.callSids.push(callSid)
      page.turnIds.push(turnId)
    }
  }
  return pages
}
