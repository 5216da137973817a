/** Two ingests and two sinks on stores of their own, and traffic that leaves no metric and no table empty. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { WebSocket } from 'ws'
import { type Ingest, startIngest } from '../../ingest/ingest.js'
import { type Config, readConfig } from '../../shared/config.js'
import { Partitions } from '../../shared/keys.js'
import { connectRedis, type RedisClient } from '../../shared/redis.js'
import { type Sink, startSink } from '../../sink/sink.js'
import { type Database, freshDatabase, log, ownRedis } from '../support/stores.js'
import { streamOf } from '../support/streams.js'

const ROUND_MS = 100
/** Ends without its last turn, and has been said everything of. */
export const INCOMPLETE = 'incomplete-call'
export const FROM_NUMBER = '+14155550100'

type JsonObject = Record<string, unknown>

export class Traffic {
  private readonly stopping = new AbortController()
  private running: Promise<void> = Promise.resolve()
  private rounds = 0

  private constructor(
    readonly ingests: Ingest[],
    readonly sinks: Sink[],
    readonly database: Database,
    private readonly redis: RedisClient,
    private readonly partitions: Partitions,
    private readonly removeStores: () => Promise<void>,
  ) {}

  static async start(): Promise<Traffic> {
    // Of its own: the memory of a server, and its limit, are of all of its databases.
    const [server, database] = await Promise.all([ownRedis('single', '--maxmemory', '512mb'), freshDatabase()])
    const folder = await mkdtemp(join(tmpdir(), 'calltape-test-grafana-'))
    const config = (more: Record<string, string> = {}): Config =>
      readConfig({
        REDIS_URL: server.url,
        DATABASE_URL: database.url,
        INGEST_PORT: '0',
        SINK_METRICS_PORT: '0',
        IDLE_TIMEOUT: '1',
        STREAM_RETENTION: '2',
        SWEEP_INTERVAL: '1',
        EXOTEL_SECRET: 'exotel-secret',
        ...more,
      })
    const ingests = await Promise.all(
      ['a', 'b'].map((name) => startIngest(config({ SPOOL_DIR: join(folder, name) }), log)),
    )
    const sinks = await Promise.all([startSink(config(), log), startSink(config(), log)])
    const { PARTITIONS } = config()
    const redis = await connectRedis(server.url, log)
    const traffic = new Traffic(ingests, sinks, database, redis, new Partitions(PARTITIONS), async () => {
      redis.disconnect()
      await Promise.all([server.stop(), database.drop(), rm(folder, { recursive: true, force: true })])
    })
    await traffic.once()
    traffic.running = traffic.keepGoing()
    return traffic
  }

  /** Returns when nothing is sent any more; what was sent may be on its way. */
  async stop(): Promise<void> {
    this.stopping.abort()
    await this.running
  }

  /** @throws when something of the traffic was not answered as it should be */
  async end(): Promise<void> {
    try {
      await this.stop()
    } finally {
      await Promise.all([...this.ingests, ...this.sinks].map((service) => service.stop()))
      await this.removeStores()
    }
  }

  /** A call with all that can be said of one. */
  private async once(): Promise<void> {
    const all = {
      call_sid: INCOMPLETE,
      direction: 'inbound',
      from: FROM_NUMBER,
      to: '+12125550199',
      provider: 'twilio',
    }
    await this.post(0, [
      { type: 'call.started', ...all },
      { type: 'turn', call_sid: INCOMPLETE, seq: 0, speaker: 'agent', text: "It's me." },
      { type: 'turn', call_sid: INCOMPLETE, seq: 1, speaker: 'customer', text: 'Who?' },
      { type: 'call.ended', call_sid: INCOMPLETE, reason: 'hangup', turn_count: 3 },
    ])
  }

  private async keepGoing(): Promise<void> {
    while (!this.stopping.signal.aborted) {
      await this.round()
      await sleep(ROUND_MS, undefined, { signal: this.stopping.signal }).catch(() => undefined) // stopped: the loop ends
    }
  }

  private async round(): Promise<void> {
    const n = this.rounds++
    const ingest = n % 2
    const sid = `call-${n}`
    const turn = (call_sid: string, seq: number) => ({
      type: 'turn',
      call_sid,
      seq,
      speaker: 'agent',
      text: `turn ${seq}`,
    })
    await this.post(ingest, [
      { type: 'call.started', call_sid: sid, from: FROM_NUMBER },
      ...[0, 1, 2].map((seq) => turn(sid, seq)),
      turn(sid, 2), // a second time
      { type: 'call.ended', call_sid: sid, turn_count: 3, ...(n % 3 === 0 ? { outcome: 'sold' } : {}) },
      turn('live-call', n),
      ...(n % 10 === 0 ? [turn(`abandoned-${n}`, 0)] : []),
      { type: 'nothing', call_sid: sid },
    ])
    const { url } = this.ingests[ingest]!
    const status = new URLSearchParams({ CallSid: `exotel-${n}`, Status: 'busy' })
    const secret = n % 5 === 0 ? 'wrong' : 'exotel-secret'
    const answer = await fetch(`${url}/webhooks/exotel/status/${secret}`, { method: 'POST', body: status })
    if (answer.status !== (n % 5 === 0 ? 403 : 200)) throw new Error(`a webhook was answered ${answer.status}`)
    await this.connection(url, `bound-${n}`)
    if (n % 20 === 10) await this.mishap(n)
  }

  /** What must be seen when it happens: a call without its last turn, an entry that is no event. */
  private async mishap(n: number): Promise<void> {
    await this.post(0, [{ type: 'call.ended', call_sid: `incomplete-${n}`, turn_count: 1 }])
    const sid = `not-an-event-${n}`
    await this.redis.xadd(streamOf({ client: this.redis, partitions: this.partitions }, sid), '*', 'e', '{')
    await this.redis.zadd(this.partitions.of(sid).ready, Date.now(), sid)
  }

  private async connection(url: string, callSid: string): Promise<void> {
    const socket = new WebSocket(`${url.replace('http', 'ws')}/v1/stream?call_sid=${callSid}`)
    await new Promise<void>((resolve, reject) => {
      socket.on('message', (data) => {
        const { type } = JSON.parse(data.toString()) as { type: string }
        if (type === 'hello') socket.send(JSON.stringify({ type: 'call.ended', outcome: 'none' }))
        else socket.close(1000)
      })
      socket.once('close', () => resolve())
      socket.once('error', reject)
    })
  }

  private async post(ingest: number, events: JsonObject[]): Promise<void> {
    const headers = { 'Content-Type': 'application/json' }
    const body = JSON.stringify(events)
    const answer = await fetch(`${this.ingests[ingest]!.url}/v1/events`, { method: 'POST', headers, body })
    if (answer.status !== 200) throw new Error(`events were answered ${answer.status}: ${await answer.text()}`)
  }
}
