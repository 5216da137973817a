/** The live session of calls, as Redis has it. Reads pages, never all calls in one command. */
import { setTimeout as sleep } from 'node:timers/promises'
import { type CallEvent, parseJson, Refusal } from '../shared/events.js'
import { EVENT_FIELD, GROUP, type PartitionKeys, type Partitions } from '../shared/keys.js'
import type { RedisClient } from '../shared/redis.js'

/** Fields of the session that are calltape's own business. */
const OWN_FIELDS = new Set(['bytes', 'lapses', 'alone', 'presumed', 'connection_id', 'end_quarantined'])

export interface LiveCall {
  call_sid: string
  /** What the producers said of the call, as strings: status, direction, from, to, provider, stage, outcome, … */
  session: Record<string, string>
  /** Events in the stream. */
  events: number
  /** Of these, how many are not committed to PostgreSQL yet; null when Redis cannot say. */
  behind: number | null
  /** Epoch milliseconds. */
  last_event_at: number | null
}

/** @returns undefined when Redis knows nothing of the call */
export async function readLiveCall(
  client: RedisClient,
  partitions: Partitions,
  callSid: string,
): Promise<LiveCall | undefined> {
  const keys = partitions.of(callSid)
  const stream = keys.streamPrefix + callSid
  const [session, events, last, groups] = await Promise.all([
    client.hgetall(keys.sessionPrefix + callSid),
    client.xlen(stream),
    client.xrevrange(stream, '+', '-', 'COUNT', 1),
    client.xinfo('GROUPS', stream).catch(ignoreNoStream),
  ])
  if (events === 0 && Object.keys(session).length === 0) return undefined
  const shown = Object.fromEntries(Object.entries(session).filter(([field]) => !OWN_FIELDS.has(field)))
  const lastId = last[0]?.[0]
  return {
    call_sid: callSid,
    session: shown,
    events,
    behind: groupLag(groups as unknown[]),
    last_event_at: lastId === undefined ? null : Number.parseInt(lastId, 10),
  }
}

export interface CallPage {
  calls: LiveCall[]
  /** Give it as `cursor` for the next page; null after the last one. */
  next: string | null
}

/**
 * A page of the calls that have not ended, in no particular order. A call that begins or ends meanwhile may be missing, or
 * come twice.
 *
 * @param cursor '' for the first page
 * @returns undefined when the cursor is not one of ours
 */
export async function listOpenCalls(
  client: RedisClient,
  partitions: Partitions,
  cursor: string,
  limit: number,
): Promise<CallPage | undefined> {
  const [, partitionText, scanText] = /^(\d{1,4})\.(\d{1,15})$/.exec(cursor || '0.0') ?? []
  let partition = Number(partitionText ?? -1)
  let scan = scanText ?? '0'
  if (!partitions.all[partition]) return undefined
  const found: string[] = []
  while (found.length < limit && partition < partitions.all.length) {
    const keys = partitions.all[partition] as PartitionKeys
    const [next, members] = await client.zscan(keys.open, scan, 'COUNT', limit - found.length)
    for (let i = 0; i < members.length; i += 2) found.push(members[i]!)
    scan = next
    if (next === '0') partition++
  }
  const calls = await Promise.all(found.map((sid) => readLiveCall(client, partitions, sid)))
  const next = partition < partitions.all.length ? `${partition}.${scan}` : null
  return { calls: calls.filter((call) => call !== undefined), next }
}

function ignoreNoStream(error: Error): unknown[] {
  if (error.message.includes('no such key')) return []
  throw error
}

/** @param groups the reply of XINFO GROUPS: a flat list of names and values for each group */
function groupLag(groups: unknown[]): number | null {
  for (const group of groups as unknown[][]) {
    const info = new Map<unknown, unknown>()
    for (let i = 0; i + 1 < group.length; i += 2) info.set(group[i], group[i + 1])
    if (info.get('name') === GROUP) return typeof info.get('lag') === 'number' ? (info.get('lag') as number) : null
  }
  return null
}

/** Entries looked through at a time. */
const PAGE_ENTRIES = 500
/** Whoever sends a report waits for its answer. */
const LOOK_TIMEOUT_MS = 2000

/**
 * Has Redis turns of a call with other ids than these?
 *
 * @returns false also when Redis does not say so in time: turns that come twice are better than none
 */
export async function hasOtherTurns(
  client: RedisClient,
  partitions: Partitions,
  callSid: string,
  ids: ReadonlySet<unknown>,
): Promise<boolean> {
  const stream = partitions.of(callSid).streamPrefix + callSid
  const look = async (): Promise<boolean> => {
    for (let from = '-'; ; ) {
      const page = await client.xrange(stream, from, '+', 'COUNT', PAGE_ENTRIES)
      if (page.some(([, fields]) => isOtherTurn(fields, ids))) return true
      if (page.length < PAGE_ENTRIES) return false
      from = `(${page.at(-1)![0]}`
    }
  }
  return (await inTime(look())) ?? false
}

/**
 * Has somebody answered a call?
 *
 * @returns undefined when Redis does not say so in time
 */
export async function isAnswered(
  client: RedisClient,
  partitions: Partitions,
  callSid: string,
): Promise<boolean | undefined> {
  const status = client.hget(partitions.of(callSid).sessionPrefix + callSid, 'status')
  return await inTime(status.then((said) => said === 'in-progress' || said === 'completed'))
}

async function inTime(answer: Promise<boolean>): Promise<boolean | undefined> {
  const late = sleep(LOOK_TIMEOUT_MS, undefined, { ref: false })
  return await Promise.race([answer.catch(() => undefined), late])
}

function isOtherTurn(fields: string[], ids: ReadonlySet<unknown>): boolean {
  const event = parseJson(fields[fields.indexOf(EVENT_FIELD) + 1] ?? '')
  if (event instanceof Refusal || typeof event !== 'object' || event === null) return false
  const { type, id } = event as Partial<CallEvent>
  return type === 'turn' && !ids.has(id)
}
