/** `calltape show CALL_SID`: a call as Redis and PostgreSQL have it now, and which of its turns are not in PostgreSQL yet. */

import { givenEnvironment, OperatorError, readConfig } from '../shared/config.js'
import { idempotencyKey, parseEvent, Refusal, type Turn } from '../shared/events.js'
import { EVENT_FIELD, GROUP, type Partitions } from '../shared/keys.js'
import { createLog } from '../shared/log.js'
import { createPool, type Pool } from '../shared/postgres.js'
import { connectRedis, openPartitions, type RedisClient } from '../shared/redis.js'
import { requireSchema } from '../shared/schema.js'
import { runningStack } from './stack.js'

interface ShownTurn {
  key: string
  seq: number | null
  speaker: string
  text: string
  /** Epoch milliseconds. */
  spokenAt: number
  interrupted: boolean
  inRedis: boolean
  inPostgres: boolean
}

interface LiveState {
  session: Record<string, string>
  turns: Map<string, ShownTurn>
  entries: number
  /** Last entry committed, as the consumer group has it. */
  cursor: string
}

const PAGE = 500

/** @throws OperatorError when neither store knows the call, saying where it was looked for */
export async function show(callSid: string, options: { json?: boolean }): Promise<void> {
  const config = readConfig({ ...runningStack('.calltape'), ...givenEnvironment() })
  const log = createLog('show', 'silent')
  const redis = await connectRedis(config.REDIS_URL, log)
  const pool = createPool(config.DATABASE_URL, 'show', 2)
  try {
    await requireSchema(pool)
    const partitions = await openPartitions(redis, config.PARTITIONS)
    const live = await readLive(redis, partitions, callSid)
    const stored = await readStored(pool, callSid)
    if (!live && !stored.session && stored.turns.length === 0) {
      const where = [config.REDIS_URL, config.DATABASE_URL].map((url) => new URL(url.split(',')[0]!).host)
      const stream = partitions.of(callSid).streamPrefix + callSid
      throw new OperatorError(
        `nothing is known of call ${callSid}. Looked in Redis at ${where[0]} (key ${stream}) and in PostgreSQL at ${where[1]} ` +
          '(call_sessions, call_transcript_turns).',
      )
    }
    const turns = merge(live, stored.turns)
    if (options.json)
      console.log(JSON.stringify({ call_sid: callSid, session: stored.session, live: live?.session, turns }, null, 2))
    else print(callSid, live, stored.session, turns)
  } finally {
    redis.disconnect()
    await pool.end()
  }
}

async function readLive(redis: RedisClient, partitions: Partitions, callSid: string): Promise<LiveState | undefined> {
  const keys = partitions.of(callSid)
  const stream = keys.streamPrefix + callSid
  const session = await redis.hgetall(keys.sessionPrefix + callSid)
  const turns = new Map<string, ShownTurn>()
  let entries = 0
  for (let from = '-'; ; ) {
    const page = await redis.xrange(stream, from, '+', 'COUNT', PAGE)
    for (const [id, fields] of page) {
      entries++
      const turn = turnOf(callSid, fields)
      if (!turn) continue
      const key = idempotencyKey(turn, id)
      if (!turns.has(key)) turns.set(key, shownTurn(turn, key, Number.parseInt(id, 10)))
    }
    const last = page.at(-1)
    if (!last || page.length < PAGE) break
    from = `(${last[0]}`
  }
  if (entries === 0 && Object.keys(session).length === 0) return undefined
  const groups = entries === 0 ? [] : ((await redis.xinfo('GROUPS', stream)) as unknown[][])
  const sink = groups.find((group) => group[1] === GROUP)
  const cursor = String(sink?.[sink.indexOf('last-delivered-id') + 1] ?? '0-0')
  return { session, turns, entries, cursor }
}

function turnOf(callSid: string, fields: string[]): Turn | undefined {
  const json = fields[fields.indexOf(EVENT_FIELD) + 1]
  try {
    const parsed = parseEvent(JSON.parse(json ?? ''), callSid, true)
    return parsed instanceof Refusal || parsed.event.type !== 'turn' ? undefined : parsed.event
  } catch {
    return undefined // not ours: the sink puts it into quarantined_events
  }
}

function shownTurn(turn: Turn, key: string, receivedMs: number): ShownTurn {
  return {
    key,
    seq: turn.seq ?? null,
    speaker: turn.speaker,
    text: turn.text,
    spokenAt: turn.ts ?? receivedMs,
    interrupted: turn.interrupted ?? false,
    inRedis: true,
    inPostgres: false,
  }
}

type SessionRow = Record<string, unknown> & { finalized_at: Date | null }

async function readStored(
  pool: Pool,
  callSid: string,
): Promise<{ session: SessionRow | undefined; turns: ShownTurn[] }> {
  const session = await pool.query<SessionRow>('SELECT * FROM call_sessions WHERE call_sid = $1', [callSid])
  const { rows } = await pool.query<ShownTurn>(
    `SELECT turn_id AS key, seq, speaker, text, extract(epoch FROM spoken_at)::float8 * 1000 AS "spokenAt",
       coalesce(interrupted, false) AS interrupted, false AS "inRedis", true AS "inPostgres"
     FROM call_transcript_turns WHERE call_sid = $1`,
    [callSid],
  )
  return { session: session.rows[0], turns: rows }
}

/** All turns of both stores in call order. */
function merge(live: LiveState | undefined, stored: ShownTurn[]): ShownTurn[] {
  const turns = new Map(live?.turns)
  for (const turn of stored) turns.set(turn.key, { ...turn, inRedis: turns.has(turn.key) })
  return [...turns.values()].sort(
    (a, b) => (a.seq !== null && b.seq !== null ? a.seq - b.seq : 0) || a.spokenAt - b.spokenAt,
  )
}

function print(
  callSid: string,
  live: LiveState | undefined,
  session: SessionRow | undefined,
  turns: ShownTurn[],
): void {
  const missing = turns.filter((turn) => !turn.inPostgres)
  console.log(`call ${callSid}\n`)
  console.log(`  PostgreSQL  ${describeStored(session, turns.length - missing.length)}`)
  console.log(`  Redis       ${describeLive(live)}`)
  for (const [name, value] of Object.entries(session ?? {})) {
    if (value === null || name === 'full_transcript' || name === 'call_sid') continue
    const text =
      value instanceof Date ? value.toISOString() : typeof value === 'object' ? JSON.stringify(value) : String(value)
    console.log(`  ${name.padEnd(24)}${text}`)
  }
  console.log(turns.length === 0 ? '\nno turns' : '')
  const start = Math.min(...turns.map((turn) => turn.spokenAt))
  for (const turn of turns) {
    const seconds = Math.floor((turn.spokenAt - start) / 1000)
    const clock = `${String(Math.floor(seconds / 60)).padStart(2, '0')}:${String(seconds % 60).padStart(2, '0')}`
    const marks = `${turn.interrupted ? ' [interrupted]' : ''}${turn.inPostgres ? '' : '  ← not in PostgreSQL yet'}`
    console.log(`[${clock}] ${turn.speaker}: ${turn.text}${marks}`)
  }
  if (missing.length > 0) {
    console.log(
      `\n${missing.length} of ${turns.length} turns are not in PostgreSQL yet: ${missing.map((t) => t.key).join(', ')}`,
    )
  }
}

function describeStored(session: SessionRow | undefined, turns: number): string {
  if (!session) return turns > 0 ? `${turns} turns, no call_sessions row yet` : 'nothing'
  return `${turns} turns, ${session.finalized_at ? 'finalized' : 'live, not finalized yet'}`
}

function describeLive(live: LiveState | undefined): string {
  if (!live) return 'nothing (its retention is over, or it was never here)'
  const { connection, ended, status } = live.session
  const state = ended ? 'ended' : connection === 'disconnected' ? 'disconnected' : 'open'
  return `${live.entries} events, ${state}${status ? `, status ${status}` : ''}; committed up to entry ${live.cursor}`
}
