/**
 * Whether PostgreSQL has all that is in a call's stream: the cursor says that it had. Since then somebody may have truncated its
 * tables, or gone back to a backup or to a standby that lacked the last commits, and then the stream is the only copy. Or a replay
 * is filling them again, and has come as far as the call's end, but not to what came behind it.
 */
import { isCallSid } from '../shared/event-rules.js'
import { idempotencyKey, Refusal } from '../shared/events.js'
import { streamKey } from '../shared/keys.js'
import type { Pool } from '../shared/postgres.js'
import type { RedisClient } from '../shared/redis.js'
import type { ArchivedEntry } from './archive.js'
import { type Claimed, readClaimed } from './claimed.js'
import { entryMs, iso, parseEntry, storable } from './decode.js'

/** After this time a claim is about to lapse, and nobody answers any more. */
const ANSWER_MS = 30_000

/**
 * Of these calls, those that are final, with all the turns that were counted then. (What has made a call final is one of its
 * events: where there is none, somebody has emptied that table.)
 *
 * `counted`: for each entry of the stream there is a row. That holds for nearly all calls, and costs no more than counting; but not
 * if events were sent twice, or if the stream is not the call's first one, whose rows are there, too.
 */
const FINAL_CALLS = {
  name: 'retention',
  text: `
    SELECT c.call_sid, t.rows + e.rows + q.rows = c.entries AND e.since >= c.since AS counted
    FROM unnest($1::text[], $2::text[], $3::int[], $4::timestamptz[]) AS c(call_sid, stream_key, entries, since)
    CROSS JOIN LATERAL (SELECT finalized_at, turn_count FROM call_sessions WHERE call_sid = c.call_sid OFFSET 0) s -- by its key
    CROSS JOIN LATERAL (SELECT count(*) AS rows FROM call_transcript_turns WHERE call_sid = c.call_sid) t
    CROSS JOIN LATERAL (
      SELECT count(*) AS rows, min(ingested_at) AS since, bool_or(type = 'call.ended') AS ended
      FROM call_events WHERE call_sid = c.call_sid) e
    CROSS JOIN LATERAL (SELECT count(*) AS rows FROM quarantined_events WHERE stream_key = c.stream_key) q
    WHERE s.finalized_at IS NOT NULL AND s.turn_count = t.rows AND e.ended`,
}

/**
 * Of these entries, how many have no row: no turn or event of their key, and no place in quarantine (dropped ones keep theirs).
 * Each by its key: joined, an entry would be compared with all turns of a call, however many it has.
 */
const MISSING_ENTRIES = {
  name: 'retention-entries',
  text: `
    SELECT count(*)::int AS missing
    FROM unnest($3::text[], $4::text[], $5::text[]) AS c(entry_id, turn_id, event_id)
    WHERE coalesce(
      (SELECT true FROM call_transcript_turns t WHERE t.call_sid = $1 AND t.turn_id = c.turn_id),
      (SELECT true FROM call_events e WHERE e.call_sid = $1 AND e.event_id = c.event_id),
      (SELECT true FROM quarantined_events q WHERE q.stream_key = $2 AND q.entry_id = c.entry_id)) IS NULL`,
}

/**
 * @param calls that have a stream, all of which is committed by what the cursor says
 * @returns the call_sids of those that PostgreSQL has as final, with every entry
 * @throws Redis' and PostgreSQL's errors, also when there is no answer in time
 */
export async function storedOf(redis: RedisClient, pool: Pool, calls: Claimed[]): Promise<Set<string>> {
  // What is no call_sid (NUL in it, say) might be refused, and all others with it.
  const asked = calls.filter((call) => isCallSid(call.callSid))
  if (asked.length === 0) return new Set()
  const values = [
    asked.map((call) => call.callSid),
    asked.map(streamKey),
    asked.map((call) => call.entries),
    asked.map((call) => iso(call.first === '' ? 0 : entryMs(call.first))),
  ]
  const question = { ...FINAL_CALLS, values, query_timeout: ANSWER_MS }
  const { rows } = await pool.query<{ call_sid: string; counted: boolean }>(question)
  const counted = new Map(rows.map((row) => [row.call_sid, row.counted]))
  const stored = new Set<string>()
  for (const call of asked) {
    const isCounted = counted.get(call.callSid)
    if (isCounted || (isCounted === false && (await hasEveryEntry(redis, pool, call)))) stored.add(call.callSid)
  }
  return stored
}

async function hasEveryEntry(redis: RedisClient, pool: Pool, call: Claimed): Promise<boolean> {
  for await (const page of readClaimed(redis, call)) {
    const keys = page.map((entry) => keyOf(call.callSid, entry))
    const values = [
      call.callSid,
      streamKey(call),
      page.map(({ id }) => id),
      keys.map((key) => key.turn ?? null),
      keys.map((key) => key.event ?? null),
    ]
    const question = { ...MISSING_ENTRIES, values, query_timeout: ANSWER_MS }
    const { rows } = await pool.query<{ missing: number }>(question)
    if (rows[0]!.missing > 0) return false
  }
  return true
}

/** The key that the entry's row has, as decode.ts makes it; none when it cannot be read: then it is in quarantine. */
function keyOf(callSid: string, { id, fields }: ArchivedEntry): { turn?: string; event?: string } {
  const event = parseEntry(callSid, fields.map(String))
  if (event instanceof Refusal) return {}
  const key = storable(idempotencyKey(event, id))
  return event.type === 'turn' ? { turn: key } : { event: key }
}
