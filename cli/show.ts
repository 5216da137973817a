/** `calltape show CALL_SID`: a call as Redis and PostgreSQL have it now, and which of its turns are not in PostgreSQL yet. */
import { type Config, givenEnvironment, OperatorError, readConfig } from '../shared/config.js'
import { idempotencyKey, Refusal, type Turn } from '../shared/events.js'
import { GROUP, type Partitions } from '../shared/keys.js'
import { createLog } from '../shared/log.js'
import { createPool, type Pool } from '../shared/postgres.js'
import { connectRedis, type RedisClient, readPartitions } from '../shared/redis.js'
import { requireSchema } from '../shared/schema.js'
import { parseEntry } from '../sink/decode.js'
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
  /** Null where PostgreSQL could not be asked. */
  inPostgres: boolean | null
}

export interface LiveState {
  session: Record<string, string>
  turns: Map<string, ShownTurn>
  entries: number
  /** The last entry; 0-0 without any. */
  last: string
  /** Last entry committed, as the consumer group has it. */
  cursor: string
}

const PAGE = 500

/** What one store knows, or why it could not be asked. */
type Found<T> = { value: T } | { unreachable: string }

/**
 * Prints what both stores know. One of them may be down: a call is still shown from the other.
 *
 * @throws OperatorError when neither knows the call, saying where it was looked for
 */
export async function show(callSid: string, options: { json?: boolean; data: string }): Promise<void> {
  const config = readConfig({ ...runningStack(options.data), ...givenEnvironment() })
  const [inRedis, inPostgres] = await Promise.all([
    find(() => lookInRedis(config, callSid)),
    find(() => lookInPostgres(config, callSid)),
  ])
  const live = 'value' in inRedis ? inRedis.value.live : undefined
  const stored = 'value' in inPostgres ? inPostgres.value : undefined
  if (!live && !stored) {
    const answer = (found: Found<unknown>) => ('unreachable' in found ? found.unreachable : 'nothing there')
    const key = 'value' in inRedis ? `, key ${inRedis.value.stream}` : ''
    throw new OperatorError(
      `nothing is known of call ${callSid}. Looked in\n` +
        `  Redis at ${hostOf(config.REDIS_URL)}${key}: ${answer(inRedis)}\n` +
        `  PostgreSQL at ${hostOf(config.DATABASE_URL)}, call_sessions and call_transcript_turns: ${answer(inPostgres)}`,
    )
  }
  const turns = merge(live, 'unreachable' in inPostgres ? undefined : (stored?.turns ?? []))
  if (options.json) {
    const { session } = stored ?? {}
    console.log(
      JSON.stringify({ call_sid: callSid, session: session ?? null, live: live?.session ?? null, turns }, null, 2),
    )
    return
  }
  const stores = {
    PostgreSQL: 'unreachable' in inPostgres ? inPostgres.unreachable : describeStored(stored),
    Redis: 'unreachable' in inRedis ? inRedis.unreachable : describeLive(live),
  }
  print(callSid, stores, stored?.session, turns)
}

export async function find<T>(look: () => Promise<T>): Promise<Found<T>> {
  try {
    return { value: await look() }
  } catch (error) {
    return { unreachable: (error as Error).message }
  }
}

export const hostOf = (urls: string) => new URL(urls.split(',')[0]!).host

/** What Redis has of the call, and under which key its stream was looked for. */
export async function lookInRedis(
  config: Config,
  callSid: string,
): Promise<{ stream: string; live: LiveState | undefined }> {
  const redis = await connectRedis(config.REDIS_URL, createLog('show', 'silent'), config)
  try {
    const partitions = await readPartitions(redis, config.PARTITIONS)
    const stream = partitions.of(callSid).streamPrefix + callSid
    return { stream, live: await readLive(redis, partitions, callSid) }
  } finally {
    redis.disconnect()
  }
}

async function lookInPostgres(config: Config, callSid: string): Promise<StoredState | undefined> {
  const pool = createPool(config, 'show', 1)
  try {
    await requireSchema(pool, config)
    return await readStored(pool, callSid)
  } finally {
    await pool.end()
  }
}

async function readLive(redis: RedisClient, partitions: Partitions, callSid: string): Promise<LiveState | undefined> {
  const keys = partitions.of(callSid)
  const stream = keys.streamPrefix + callSid
  const session = await redis.hgetall(keys.sessionPrefix + callSid)
  const turns = new Map<string, ShownTurn>()
  let [entries, lastId] = [0, '0-0']
  for (let from = '-'; ; ) {
    const page = await redis.xrange(stream, from, '+', 'COUNT', PAGE)
    for (const [id, fields] of page) {
      entries++
      const turn = parseEntry(callSid, fields)
      if (turn instanceof Refusal || turn.type !== 'turn') continue
      const key = idempotencyKey(turn, id)
      if (!turns.has(key)) turns.set(key, shownTurn(turn, key, Number.parseInt(id, 10)))
    }
    const last = page.at(-1)
    lastId = last?.[0] ?? lastId
    if (!last || page.length < PAGE) break
    from = `(${last[0]}`
  }
  if (entries === 0 && Object.keys(session).length === 0) return undefined
  const groups = entries === 0 ? [] : ((await redis.xinfo('GROUPS', stream)) as unknown[][])
  const sink = groups.find((group) => group[1] === GROUP)
  const cursor = String(sink?.[sink.indexOf('last-delivered-id') + 1] ?? '0-0')
  return { session, turns, entries, last: lastId, cursor }
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
    inPostgres: null,
  }
}

type SessionRow = Record<string, unknown> & { finalized_at: Date | null }

interface StoredState {
  session: SessionRow | undefined
  turns: ShownTurn[]
}

async function readStored(pool: Pool, callSid: string): Promise<StoredState | undefined> {
  const session = await pool.query<SessionRow>('SELECT * FROM call_sessions WHERE call_sid = $1', [callSid])
  const { rows } = await pool.query<ShownTurn>(
    `SELECT turn_id AS key, seq, speaker, text, extract(epoch FROM spoken_at)::float8 * 1000 AS "spokenAt",
       coalesce(interrupted, false) AS interrupted, false AS "inRedis", true AS "inPostgres"
     FROM call_transcript_turns WHERE call_sid = $1`,
    [callSid],
  )
  return session.rows[0] || rows.length > 0 ? { session: session.rows[0], turns: rows } : undefined
}

/** All turns of both stores in call order. @param stored undefined where PostgreSQL could not be asked */
function merge(live: LiveState | undefined, stored: ShownTurn[] | undefined): ShownTurn[] {
  const turns = new Map(live?.turns)
  if (stored) for (const turn of turns.values()) turn.inPostgres = false
  for (const turn of stored ?? []) turns.set(turn.key, { ...turn, inRedis: turns.has(turn.key) })
  return [...turns.values()].sort(
    (a, b) => (a.seq !== null && b.seq !== null ? a.seq - b.seq : 0) || a.spokenAt - b.spokenAt,
  )
}

function print(
  callSid: string,
  stores: Record<string, string>,
  session: SessionRow | undefined,
  turns: ShownTurn[],
): void {
  console.log(`call ${callSid}\n`)
  const fields = Object.entries(session ?? {}).filter(
    ([name, value]) => value !== null && name !== 'full_transcript' && name !== 'call_sid',
  )
  for (const [name, value] of [...Object.entries(stores), ...fields]) {
    const isPlain = typeof value !== 'object'
    const text = value instanceof Date ? value.toISOString() : isPlain ? String(value) : JSON.stringify(value)
    console.log(`  ${name.padEnd(24)}${text}`)
  }
  console.log(turns.length === 0 ? '\nno turns' : '')
  const start = Math.min(...turns.map((turn) => turn.spokenAt))
  for (const turn of turns) {
    const seconds = Math.floor((turn.spokenAt - start) / 1000)
    const clock = `${String(Math.floor(seconds / 60)).padStart(2, '0')}:${String(seconds % 60).padStart(2, '0')}`
    const marks = `${turn.interrupted ? ' [interrupted]' : ''}${turn.inPostgres === false ? '  ← not in PostgreSQL yet' : ''}`
    console.log(`[${clock}] ${turn.speaker}: ${turn.text}${marks}`)
  }
  const missing = turns.filter((turn) => turn.inPostgres === false)
  if (missing.length > 0) {
    const keys = missing.map((turn) => turn.key).join(', ')
    console.log(`\n${missing.length} of ${count(turns.length, 'turn')} not in PostgreSQL yet: ${keys}`)
  }
}

const count = (n: number, what: string) => `${n} ${what}${n === 1 ? '' : 's'}`

function describeStored(stored: StoredState | undefined): string {
  if (!stored) return 'nothing'
  const { session, turns } = stored
  const state = !session ? 'no call_sessions row yet' : session.finalized_at ? 'finalized' : 'live, not finalized yet'
  return `${count(turns.length, 'turn')}, ${state}`
}

function describeLive(live: LiveState | undefined): string {
  if (!live) return 'nothing'
  const { connection, ended, status } = live.session
  const state = ended ? 'ended' : connection === 'disconnected' ? 'disconnected' : 'open'
  return `${count(live.entries, 'event')}, ${state}${status ? `, status ${status}` : ''}; committed up to entry ${live.cursor}`
}
