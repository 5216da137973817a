/**
 * The legacy way: one JSON blob a call in Redis, for an hour; each turn reads it, appends to its list and writes it back; at the
 * call's end the transcript goes into its row.
 */
import { Redis } from 'ioredis'
import type { SentEvent } from '../../cli/compare.js'
import type { Config } from '../../shared/config.js'
import { createPool } from '../../shared/postgres.js'
import { speakerOf } from './rows.js'
import type { Store } from './websocket.js'

interface Session {
  call_sid: string
  lead_id: number
  lead_name: string
  lead_phone: string
  conversation_stage: string
  /** `timestamp` is UTC without a zone. */
  transcript_history: { speaker: 'ai' | 'user'; text: string; timestamp: string }[]
  collected_data: Record<string, unknown>
  objections_encountered: string[]
  is_bot_speaking: boolean
  waiting_for_response: boolean
  session_start_time: string
  last_interaction_time: string
}

const TTL_SECONDS = 3600
const CONNECTIONS = 10

const withoutZone = (ms: number) => new Date(ms).toISOString().slice(0, -1)

const SAVE = {
  name: 'save-call',
  text: `INSERT INTO call_sessions (call_sid, status, full_transcript, ended_at, finalized_at)
    VALUES ($1, 'completed', $2, $3, now())
    ON CONFLICT (call_sid) DO UPDATE
      SET status = 'completed', full_transcript = excluded.full_transcript, ended_at = excluded.ended_at, finalized_at = now()`,
}

export async function server(config: Config): Promise<Store> {
  const redis = new Redis(config.REDIS_URL, { enableAutoPipelining: true })
  const pool = createPool(config, 'peer', CONNECTIONS)
  const keyOf = (callSid: string) => `session:${callSid}`
  const load = async (callSid: string) => JSON.parse((await redis.get(keyOf(callSid))) ?? 'null') as Session | null
  const save = (session: Session) => redis.set(keyOf(session.call_sid), JSON.stringify(session), 'EX', TTL_SECONDS)

  async function take(event: SentEvent): Promise<void> {
    const session = (await load(event.call_sid)) ?? newSession(event)
    if (event.type === 'turn') {
      const speaker = speakerOf(event.speaker) === 'customer' ? 'user' : 'ai'
      session.transcript_history.push({ speaker, text: event.text, timestamp: withoutZone(event.ts!) })
      session.waiting_for_response = speaker === 'ai'
      session.last_interaction_time = withoutZone(event.ts!)
    }
    await save(session)
    if (event.type !== 'call.ended') return
    await pool.query({
      ...SAVE,
      values: [session.call_sid, JSON.stringify(session.transcript_history), new Date(event.ts!)],
    })
  }

  // A call's events one after the other, as the handler of its connection would: it has no lock.
  const last = new Map<string, Promise<void>>()
  return async (events) => {
    const taken = events.map((event) => {
      const done = (last.get(event.call_sid) ?? Promise.resolve()).then(() => take(event))
      last.set(event.call_sid, done)
      if (event.type === 'call.ended') void done.then(() => last.delete(event.call_sid))
      return done
    })
    await Promise.all(taken)
  }
}

function newSession(event: SentEvent): Session {
  const began = withoutZone(event.ts!)
  return {
    call_sid: event.call_sid,
    lead_id: 4711,
    lead_name: 'Asha Rao',
    lead_phone: '+919800000000',
    conversation_stage: 'intro',
    transcript_history: [],
    collected_data: {},
    objections_encountered: [],
    is_bot_speaking: false,
    waiting_for_response: false,
    session_start_time: began,
    last_interaction_time: began,
  }
}
