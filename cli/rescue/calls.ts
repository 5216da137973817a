/** What rescue knows of calls: what their streams in calltape have, what it has seen of them, and how to add to it. */
import type { Appender } from '../../ingest/append.js'
import type { Deliveries } from '../../ingest/deliver.js'
import { type CallEvent, idempotencyKey, Refusal, resumes } from '../../shared/events.js'
import type { Partitions } from '../../shared/keys.js'
import type { RedisClient } from '../../shared/redis.js'
import { parseEntry } from '../../sink/decode.js'
import { contentOf, presumedEnd, type Session, SOURCE, type UnreadableSession } from './session.js'

const PAGE_ENTRIES = 1000
/** Of what is delivered together: ingest's own wait for Redis must do for it. */
const DELIVERY_EVENTS = 5000

/** Redis has not taken what it was given. */
export class NotStoredError extends Error {}

/** One call. Small: ids, no text. */
export interface KnownCall {
  readonly callSid: string
  /** Turns in its stream that no blob has shown yet. */
  readonly onlyInStream: Set<string>
  /** Turns that a blob has shown, and that are in its stream. */
  readonly seen: Set<string>
  /** Idempotency keys of its other events. */
  readonly events: Set<string>
  /** Of the last call.data by rescue. */
  dataContent: string | undefined
  /** It has ended, or was presumed over, and has not gone on since. */
  isOver: boolean
}

/** Events of a call that its stream does not have. */
export interface News {
  call: KnownCall
  events: CallEvent[]
}

/** @throws as Redis does; a stream that is none has nothing: Redis will refuse what is appended to it */
export async function readKnownCall(client: RedisClient, partitions: Partitions, callSid: string): Promise<KnownCall> {
  const call: KnownCall = {
    callSid,
    onlyInStream: new Set(),
    seen: new Set(),
    events: new Set(),
    dataContent: undefined,
    isOver: false,
  }
  const stream = partitions.of(callSid).streamPrefix + callSid
  for (let from = '-'; ; ) {
    const page = await client.xrange(stream, from, '+', 'COUNT', PAGE_ENTRIES).catch((error: Error) => {
      if (error.message.startsWith('WRONGTYPE')) return []
      throw error
    })
    for (const [id, fields] of page) {
      const event = parseEntry(callSid, fields)
      if (event instanceof Refusal) continue // for the sinks to put into quarantine
      const key = idempotencyKey(event, id)
      if (event.type === 'turn') call.onlyInStream.add(key)
      learn(call, event, key)
    }
    if (page.length < PAGE_ENTRIES) return call
    from = `(${page.at(-1)![0]}`
  }
}

/** An event that is in the stream now; a turn's place in the sets of ids is for the caller. */
function learn(call: KnownCall, event: CallEvent, key: string): void {
  if (event.type !== 'turn') call.events.add(key)
  if (event.type === 'call.data' && event.source === SOURCE) call.dataContent = contentOf(event)
  if (event.type === 'call.ended') call.isOver = true
  else if (resumes(event)) call.isOver = false
}

/** @returns what of a blob's events the stream does not have, and how many of its turns are seen for the first time there */
export function newsOf(call: KnownCall, session: Session | UnreadableSession): News & { alreadyThere: string[] } {
  const events: CallEvent[] = []
  const alreadyThere: string[] = []
  if ('started' in session) {
    if (!call.events.has(idempotencyKey(session.started, ''))) events.push(session.started)
    for (const turn of session.turns) {
      if (call.onlyInStream.has(turn.id!)) alreadyThere.push(turn.id!)
      else if (!call.seen.has(turn.id!)) events.push(turn)
    }
  }
  const { data } = session
  // By what it says, for its id has the time in it, which changes with every turn; and by id, for it may have been said before.
  const isSaid = !data || contentOf(data) === call.dataContent || call.events.has(idempotencyKey(data, ''))
  if (!isSaid) events.push(data)
  return { call, events, alreadyThere }
}

/** @returns undefined when its stream has an end already */
export function endOf(call: KnownCall): News | undefined {
  if (call.isOver) return undefined
  const end = presumedEnd(call.callSid, [...call.seen, ...call.onlyInStream])
  return { call, events: [end] }
}

/** What is appended is known from then on. */
function markStored({ call, events }: News): void {
  for (const event of events) {
    const key = idempotencyKey(event, '')
    if (event.type === 'turn') call.seen.add(key)
    learn(call, event, key)
  }
}

/** Appends as ingest does. */
export class Stream {
  constructor(
    private readonly deliveries: Deliveries,
    private readonly appender: Appender,
  ) {}

  /**
   * Resolves when all of it is in the streams. What is stored is marked so; the events of a call keep their order.
   *
   * @returns the calls whose events Redis refused (their key in calltape is something else), with the reason
   * @throws NotStoredError when Redis does not take it
   */
  async append(news: News[]): Promise<Map<KnownCall, string>> {
    const refused = new Map<KnownCall, string>()
    let batch: News[] = []
    let size = 0
    const flush = async () => {
      for (const [call, reason] of await this.appendBatch(batch)) refused.set(call, reason)
      batch = []
      size = 0
    }
    for (const each of news) {
      if (each.events.length === 0) continue
      if (size > 0 && size + each.events.length > DELIVERY_EVENTS) await flush()
      batch.push(each)
      size += each.events.length
    }
    if (size > 0) await flush()
    return refused
  }

  private async appendBatch(batch: News[]): Promise<Map<KnownCall, string>> {
    const callOf = batch.flatMap(({ call, events }) => events.map(() => call))
    const refusals = await this.deliver(batch.flatMap(({ events }) => events))
    const refused = new Map(refusals.map(({ index, refusal }) => [callOf[index]!, refusal.message]))
    for (const news of batch) if (!refused.has(news.call)) markStored(news)
    return refused
  }

  /**
   * What Redis does not take in time stays with the appender, which goes on trying: no more is given to it until then. What is
   * delivered again later on may come to the stream twice; its ids are the same, so it is one row.
   */
  private async deliver(events: CallEvent[]): Promise<{ index: number; refusal: Refusal }[]> {
    if (this.appender.isAway) throw new NotStoredError(this.appender.failure ?? 'Redis does not answer')
    const { state, reason, refused } = await this.deliveries.deliver(events)
    if (state !== 'stored') throw new NotStoredError(reason)
    return refused
  }
}
