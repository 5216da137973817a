/** What the suites of the Redis protocol share: producers, leases, a look into streams and groups. */
import { onTestFinished } from 'vitest'
import { Appender, type AppenderOptions, type Origin } from '../../ingest/append.js'
import type { CallEvent, Refusal, Turn } from '../../shared/events.js'
import { GROUP, type PartitionKeys, type Partitions } from '../../shared/keys.js'
import { lanesOf } from '../../shared/lanes.js'
import { createIngestMetrics } from '../../shared/metrics.js'
import type { RedisClient } from '../../shared/redis.js'
import { Script } from '../../shared/script.js'
import type { Entry } from '../../sink/decode.js'
import { type Lease, type LeaseLimits, Leases } from '../../sink/lease.js'
import { Overdue } from '../../sink/overdue.js'
import { readEntries } from '../../sink/read.js'
import type { Settlement } from '../../sink/settle.js'
import { freshRedis, log, type RedisDatabase } from './stores.js'

export type { StoreServer } from './store-server.js'
export { ownRedis } from './stores.js'

export interface Store {
  client: RedisClient
  partitions: Partitions
}

export const turn = (callSid: string, seq: number, text = `turn ${seq}`): Turn => ({
  type: 'turn',
  call_sid: callSid,
  seq,
  speaker: 'agent',
  text,
})

export const streamOf = ({ partitions }: Store, sid: string) => partitions.of(sid).streamPrefix + sid
export const sessionOf = ({ partitions }: Store, sid: string) => partitions.of(sid).sessionPrefix + sid

/** `count` calls that are all in one partition. */
export function callsIn(partitions: Partitions, partition: number, count: number): string[] {
  const sids: string[] = []
  for (let i = 0; sids.length < count; i++) {
    const sid = `p${partition}-${i}`
    if (partitions.of(sid).partition === partition) sids.push(sid)
  }
  return sids
}

/** Ingest's side: an Appender, and what became of every event given to it. */
export class Producer {
  readonly metrics = createIngestMetrics()
  readonly appender: Appender
  /** How often each position was settled; the first one is 1. */
  readonly timesSettled: number[] = [1]
  private readonly waiting = new Map<number, (refusal: Refusal | undefined) => void>()
  private readonly origin: Origin = {
    settle: (position, refusal) => {
      this.timesSettled[position]!++
      this.waiting.get(position)?.(refusal)
    },
    settled: () => undefined,
  }

  constructor({ client, partitions }: Store, options: Partial<AppenderOptions> = {}) {
    const all = { idleTimeoutMs: 60_000, disconnectGraceMs: 10_000, maxQueueBytes: 1e9, ...options }
    this.appender = new Appender(client, partitions, all, this.metrics, log)
  }

  /** @returns what its event was refused with; undefined once it is stored */
  put(event: CallEvent): Promise<Refusal | undefined> {
    const position = this.timesSettled.push(0) - 1
    const settled = new Promise<Refusal | undefined>((resolve) => this.waiting.set(position, resolve))
    this.appender.append(event, JSON.stringify(event), this.origin, position)
    return settled
  }

  /** @throws the first refusal */
  async store(...events: CallEvent[]): Promise<void> {
    for (const refusal of await Promise.all(events.map((event) => this.put(event)))) if (refusal) throw refusal
  }

  get settled(): number {
    return this.timesSettled.reduce((sum, times) => sum + times, -1)
  }

  async failures(): Promise<number> {
    return (await this.metrics.flushFailures.get()).values[0]?.value ?? 0
  }
}

export interface BatchCall {
  sid: string
  events: string[]
  /** field, value, field, value … */
  session?: string[]
}

const appendScript = new Script('ingest/append.lua')

/** append.lua itself, for what no Appender does of its own will. @param known the last batch the producer knows is applied */
export async function appendBatch(store: Store, producer: string, batch: number, known: number, calls: BatchCall[]) {
  const { client, partitions } = store
  const used = [...new Set(calls.map(({ sid }) => partitions.of(sid)))]
  const lane = lanesOf(client, partitions).find((each) => each.partitions.includes(used[0]!))!
  const keys = [lane.partitions[0]!.producerPrefix + producer, lane.wake]
  for (const p of used) keys.push(p.ready, p.leased, p.open, p.ended)
  const args: (string | number)[] = [batch, known, 60_000, 10_000, used.length]
  for (const { sid, events, session = [] } of calls) {
    keys.push(streamOf(store, sid), sessionOf(store, sid))
    const bytes = events.reduce((sum, event) => sum + event.length, 0)
    args.push(sid, used.indexOf(partitions.of(sid)) + 1, bytes, 1, events.length, ...events)
    args.push(session.length, ...session)
  }
  return (await appendScript.run(client, keys, args)) as [index: number, error: string][]
}

export async function entriesOf(store: Store, sid: string): Promise<Entry[]> {
  return await store.client.xrange(streamOf(store, sid), '-', '+')
}

export async function eventsOf(store: Store, sid: string): Promise<CallEvent[]> {
  return (await entriesOf(store, sid)).map(([, fields]) => JSON.parse(fields[1]!) as CallEvent)
}

export async function seqsOf(store: Store, sid: string): Promise<(number | undefined)[]> {
  return (await eventsOf(store, sid)).map((event) => (event as Turn).seq)
}

/** XINFO GROUPS of the sinks' group; undefined when there is none. */
export async function groupOf(store: Store, sid: string): Promise<Record<string, unknown> | undefined> {
  const groups = (await store.client.xinfo('GROUPS', streamOf(store, sid))) as unknown[][]
  const named = groups.map((g) => Object.fromEntries(g.flatMap((name, i) => (i % 2 === 0 ? [[name, g[i + 1]]] : []))))
  return named.find((group) => group.name === GROUP)
}

/** In which of its partition's sets a call is, with its score there. */
export async function placesOf({ client, partitions }: Store, sid: string): Promise<Record<string, number>> {
  const places: Record<string, number> = {}
  for (const name of ['ready', 'leased', 'open', 'ended'] as const) {
    const score = await client.zscore(partitions.of(sid)[name], sid)
    if (score !== null) places[name] = Number(score)
  }
  return places
}

export const LIMITS: LeaseLimits = { calls: 1000, entries: 100_000, bytes: 1e9, leaseMs: 60_000, suspectLapses: 2 }

export const everywhere = (partitions: Partitions) => partitions.all.map((p: PartitionKeys) => p.partition)

/** For one test: an empty Redis, what a sink does with it, and a producer. */
export async function freshLeases(): Promise<{
  redis: RedisDatabase
  leases: Leases
  overdue: Overdue
  producer: Producer
}> {
  const redis = await freshRedis()
  onTestFinished(() => redis.drop())
  const leases = new Leases(redis.client, redis.partitions, LIMITS.leaseMs)
  const overdue = new Overdue(redis.client, redis.partitions)
  return { redis, leases, overdue, producer: new Producer(redis) }
}

/** Leases whatever is ready, within `limits`. */
export async function leaseAll(leases: Leases, { partitions }: Store, limits: Partial<LeaseLimits> = {}) {
  return (await leases.lease(everywhere(partitions), { ...LIMITS, ...limits })).leases
}

/** Leases the one call that is expected to be ready, and reads it. */
export async function take(leases: Leases, store: Store, limits: Partial<LeaseLimits> = {}): Promise<LeasedEntries> {
  const taken = await leaseAll(leases, store, limits)
  if (taken.length !== 1) throw new Error(`expected one ready call, there are ${taken.length}`)
  return (await readAll(store.client, taken, { ...LIMITS, ...limits }))[0]!
}

/** As if the first `count` entries were committed. */
export function committed({ lease, entries }: LeasedEntries, count = entries.length, finalized = false): Settlement {
  return { lease, last: entries[count - 1]?.[0], count, finalized }
}

export interface LeasedEntries {
  lease: Lease
  entries: Entry[]
}

/** What `readEntries` hands over, in the order of the leases. */
export async function readAll(client: RedisClient, leases: Lease[], limits: LeaseLimits): Promise<LeasedEntries[]> {
  const found = new Map<Lease, Entry[]>()
  await readEntries(client, leases, limits, (lease, entries) => found.set(lease, entries))
  return leases.map((lease) => ({ lease, entries: found.get(lease)! }))
}
