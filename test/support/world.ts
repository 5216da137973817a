/** Two ingests and a sink on real stores, each behind a Link at which it can be made to fail; and producers that resend. */
import { setTimeout as sleep } from 'node:timers/promises'
import { WebSocket } from 'ws'
import { type Ingest, startIngest } from '../../ingest/ingest.js'
import { readConfig } from '../../shared/config.js'
import { Overdue } from '../../sink/overdue.js'
import { type Sink, startSink } from '../../sink/sink.js'
import { Link, type LinkFault } from './link.js'
import { type Database, freshDatabase, freshRedis, log, type RedisDatabase, until } from './stores.js'
import { streamOf } from './streams.js'

/** For how long whoever hangs does so. */
const HANG_MS = 40
const LEASE_SECONDS = 60 // longer than any test: a lease lapses when `World` says so
const LAPSE_MS = 1000
const SETTLED_WITHIN_MS = 20_000

export const TRANSPORTS = ['websocket', 'bound websocket', 'json', 'ndjson'] as const
export type Transport = (typeof TRANSPORTS)[number]

/** What somebody sends, and how it is cut into messages or requests. */
export interface Delivery {
  transport: Transport
  ingest: 0 | 1
  /** How many events each message has; over and over. */
  sizes: number[]
  events: { call_sid: string }[]
}

export type IngestFault = LinkFault | 'stops'

/** An ingest that is replaced when it dies or stops. */
class IngestSlot {
  link!: Link
  ingest!: Ingest
  /** How its clients find out that it is gone. */
  readonly clients = new Set<() => void>()
  ready: Promise<void>

  constructor(private readonly redisUrl: string) {
    this.ready = this.start()
  }

  private async start(): Promise<void> {
    this.link = await Link.open(this.redisUrl)
    this.ingest = await startIngest(readConfig({ REDIS_URL: this.link.urls[0], INGEST_PORT: '0' }), log)
  }

  /** Makes up for a fault that has just happened. */
  async replace(fault: IngestFault): Promise<void> {
    const { link, ingest } = this
    if (fault === 'breaks') return
    if (fault === 'hangs') {
      await sleep(HANG_MS)
      link.release()
      return
    }
    this.ready = this.start()
    if (fault === 'dies') for (const gone of [...this.clients]) gone()
    const stopped = ingest.stop().then(() => link.close())
    await Promise.all([this.ready, fault === 'stops' && stopped]) // a dead one takes its time to find out
  }
}

export class World {
  private readonly ingests: IngestSlot[]
  private link!: Link
  private sink!: Sink
  private readonly overdue: Overdue
  /** When leases of calls that are not settled lapse next, ms epoch: at once after a fault, then again and again. */
  private lapseAt = Date.now() + LAPSE_MS
  private readonly repairs: Promise<void>[] = []
  /** How often what has happened to whom. */
  readonly happened = new Map<string, number>()

  private constructor(
    readonly redis: RedisDatabase,
    readonly database: Database,
  ) {
    this.ingests = [0, 1].map(() => new IngestSlot(redis.url))
    this.overdue = new Overdue(redis.client, redis.partitions)
  }

  static async begin(): Promise<World> {
    const world = new World(await freshRedis(), await freshDatabase())
    await Promise.all([world.startSink(), ...world.ingests.map((slot) => slot.ready)])
    return world
  }

  async end(): Promise<void> {
    await Promise.all(this.ingests.map((slot) => slot.ingest.stop().then(() => slot.link.close())))
    await this.sink.stop()
    await this.link.close()
    await Promise.all([this.redis.drop(), this.database.drop()])
  }

  private async startSink(): Promise<void> {
    this.link = await Link.open(this.redis.url, this.database.url)
    const [REDIS_URL, DATABASE_URL] = this.link.urls
    const environment = { REDIS_URL, DATABASE_URL, SINK_METRICS_PORT: '0', LEASE_SECONDS: String(LEASE_SECONDS) }
    this.sink = await startSink(readConfig(environment), log)
  }

  /** @param nth message between it and Redis from now, at which it happens */
  failIngest(which: 0 | 1, nth: number, fault: IngestFault): void {
    const slot = this.ingests[which]!
    const happened = slot.link.arm(nth, fault === 'stops' ? undefined : fault)
    void happened.then(() => this.repair(`ingest ${fault}`, slot.replace(fault)))
  }

  /** @param nth message between it and Redis or PostgreSQL from now, at which it happens */
  failSink(nth: number, fault: LinkFault): void {
    void this.link.arm(nth, fault).then(() => this.repair(`sink ${fault}`, this.replaceSink(fault)))
  }

  private repair(what: string, repaired: Promise<void>): void {
    this.happened.set(what, (this.happened.get(what) ?? 0) + 1)
    this.repairs.push(repaired)
  }

  /** A sink that died or hangs is replaced by another one; what it held is taken over at once. */
  private async replaceSink(fault: LinkFault): Promise<void> {
    if (fault === 'breaks') {
      this.lapseAt = 0
      return
    }
    const { link, sink } = this
    await this.startSink()
    this.lapseAt = 0
    if (fault === 'hangs') {
      await sleep(HANG_MS)
      link.release() // what it had begun goes on, although its leases are another's now
    }
    const stopped = sink.stop().then(() => link.close())
    if (fault === 'hangs') await stopped
  }

  /** Faults that have not happened yet do not happen any more. */
  async disarm(): Promise<void> {
    this.link.disarm()
    for (const { link } of this.ingests) link.disarm()
    await Promise.all(this.repairs.splice(0))
  }

  /** As if the calls had been silent for too long. */
  async presumeOver(sids: string[]): Promise<void> {
    for (const sid of sids) await this.redis.client.zadd(this.redis.partitions.of(sid).open, 'XX', 1, sid)
    await this.overdue.reap(1000)
  }

  /** Waits until all entries of these calls are committed and settled. */
  async settled(sids: string[]): Promise<void> {
    const what = `${sids.join(', ')} are settled`
    if (this.lapseAt > 0) this.lapseAt = Date.now() + LAPSE_MS
    await until(
      what,
      async () => {
        const areSettled = await Promise.all(sids.map((sid) => this.isSettled(sid)))
        if (areSettled.every(Boolean)) return true
        if (Date.now() > this.lapseAt) await this.takeOver(sids)
        return false
      },
      SETTLED_WITHIN_MS,
    )
  }

  private async takeOver(sids: string[]): Promise<void> {
    this.lapseAt = Date.now() + LAPSE_MS
    for (const sid of sids) await this.redis.client.zadd(this.redis.partitions.of(sid).leased, 'XX', 1, sid)
    await this.overdue.reclaim(1000)
  }

  private async isSettled(sid: string): Promise<boolean> {
    const { client, partitions } = this.redis
    const { ready, leased } = partitions.of(sid)
    const replies = await client
      .multi()
      .zscore(ready, sid)
      .zscore(leased, sid)
      .xinfo('GROUPS', streamOf(this.redis, sid))
      .xrevrange(streamOf(this.redis, sid), '+', '-', 'COUNT', 1)
      .exec()
    const [isReady, isLeased, groups, last] = replies!.map(([, reply]) => reply)
    if (!Array.isArray(groups)) return (await client.exists(streamOf(this.redis, sid))) === 0
    const group = groups[0] as unknown[]
    const cursor = group[group.indexOf('last-delivered-id') + 1]
    return isReady === null && isLeased === null && cursor === (last as [string][])[0]![0]
  }

  /** Sends until all of it is acked: what was not is sent again, to whoever is there then. */
  async deliver({ transport, ingest, sizes, events }: Delivery): Promise<void> {
    const slot = this.ingests[ingest]!
    if (transport === 'websocket') return overWebSocket(slot, '', events, sizes)
    if (transport !== 'bound websocket') return overHttp(slot, transport, events, sizes)
    const sids = new Set(events.map(({ call_sid }) => call_sid))
    const deliverCall = (sid: string) => {
      const its = events.filter(({ call_sid }) => call_sid === sid).map(({ call_sid: _, ...event }) => event)
      return overWebSocket(slot, `?call_sid=${sid}`, its, sizes)
    }
    await Promise.all([...sids].map(deliverCall))
  }
}

function* cut<T>(events: T[], sizes: number[]): Generator<T[]> {
  for (let from = 0, i = 0; from < events.length; i++) {
    const size = sizes[i % sizes.length] ?? 1
    yield events.slice(from, from + size)
    from += size
  }
}

async function overWebSocket(slot: IngestSlot, query: string, events: object[], sizes: number[]): Promise<void> {
  let acked = 0
  while (acked < events.length) {
    await slot.ready
    const before = acked
    const socket = new WebSocket(`${slot.ingest.url.replace('http', 'ws')}/v1/stream${query}`, {
      perMessageDeflate: false,
    })
    const gone = () => socket.terminate()
    slot.clients.add(gone)
    await new Promise<void>((resolve, reject) => {
      socket.on('open', () => {
        for (const batch of cut(events.slice(before), sizes)) {
          socket.send(JSON.stringify(batch.length === 1 ? batch[0] : batch))
        }
      })
      socket.on('message', (text) => {
        const message = JSON.parse(String(text)) as { type: string; through: number }
        if (message.type === 'error') reject(new Error(`refused: ${text}`))
        if (message.type === 'ack') acked = before + message.through
        if (acked === events.length) socket.close(1000)
      })
      socket.on('error', () => undefined) // its 'close' follows
      socket.on('close', () => resolve())
    })
    slot.clients.delete(gone)
    if (acked < events.length) await sleep(5)
  }
}

async function overHttp(slot: IngestSlot, type: 'json' | 'ndjson', events: object[], sizes: number[]): Promise<void> {
  for (const batch of cut(events, sizes)) {
    const body = type === 'json' ? JSON.stringify(batch) : batch.map((event) => JSON.stringify(event)).join('\n')
    const contentType = type === 'json' ? 'application/json' : 'application/x-ndjson'
    while (!(await wasStored(slot, contentType, body, batch.length))) await sleep(5)
  }
}

/** @returns false when it must be sent again. @throws when an event was refused */
async function wasStored(slot: IngestSlot, contentType: string, body: string, count: number): Promise<boolean> {
  await slot.ready
  const abort = new AbortController()
  const gone = () => abort.abort()
  slot.clients.add(gone)
  try {
    const init = { method: 'POST', body, headers: { 'Content-Type': contentType }, signal: abort.signal }
    const response = await fetch(`${slot.ingest.url}/v1/events`, init)
    const answer = (await response.json()) as { accepted: number }
    if (response.status !== 503 && answer.accepted !== count) throw new RefusedError(JSON.stringify(answer))
    return response.status === 200
  } catch (error) {
    if (error instanceof RefusedError) throw error
    return false // it died under the request
  } finally {
    slot.clients.delete(gone)
  }
}

class RefusedError extends Error {}
