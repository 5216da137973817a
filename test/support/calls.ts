/** A stack, and what the suites of the sink ask of it again and again. */
import type { CallEvent } from '../../shared/events.js'
import { type Sink, startSink } from '../../sink/sink.js'
import { figure } from './metrics.js'
import { log, startTestStack, type TestStack, until } from './stores.js'
import { groupOf, Producer, streamOf } from './streams.js'

export type Row = Record<string, unknown>

let names = 0
export const newSid = () => `call-${names++}`
export const seqs = (n: number, from = 0) => Array.from({ length: n }, (_, i) => from + i)
export const ended = (sid: string, turn_count?: number): CallEvent => ({
  type: 'call.ended',
  call_sid: sid,
  ...(turn_count === undefined ? {} : { turn_count }),
})

export class Calls {
  readonly producer: Producer

  constructor(readonly stack: TestStack) {
    this.producer = new Producer(stack.redis)
  }

  static async start(environment: Record<string, string> = {}, sinks = 1): Promise<Calls> {
    return new Calls(await startTestStack(environment, sinks))
  }

  get database(): string {
    return new URL(this.stack.database.url).pathname.slice(1)
  }

  async query(sql: string, ...values: unknown[]): Promise<Row[]> {
    return (await this.stack.database.pool.query<Row>(sql, values)).rows
  }

  turns(sid: string): Promise<Row[]> {
    return this.query('SELECT * FROM call_transcript_turns WHERE call_sid = $1 ORDER BY seq, turn_id', sid)
  }

  async session(sid: string): Promise<Row | undefined> {
    return (await this.query('SELECT * FROM call_sessions WHERE call_sid = $1', sid))[0]
  }

  quarantined(sid: string): Promise<Row[]> {
    const key = streamOf(this.stack.redis, sid)
    return this.query('SELECT * FROM quarantined_events WHERE stream_key = $1 ORDER BY id', key)
  }

  /** Until all that is in the call's stream is in PostgreSQL. */
  settled(sid: string, timeoutMs?: number): Promise<unknown> {
    return until(`${sid} is settled`, async () => (await groupOf(this.stack.redis, sid))?.lag === 0, timeoutMs)
  }

  /** Until nothing waits and nobody is at work. */
  idle(timeoutMs?: number): Promise<unknown> {
    const { client, partitions } = this.stack.redis
    return until(
      'all is settled',
      async () => (await client.exists(...partitions.all.flatMap((p) => [p.ready, p.leased]))) === 0,
      timeoutMs,
    )
  }

  async storeSettled(...events: CallEvent[]): Promise<void> {
    await this.producer.store(...events)
    for (const sid of new Set(events.map((event) => event.call_sid))) await this.settled(sid)
  }

  /** Entries by the hand of somebody who knows where calltape looks, but not what for. @param id of a single one */
  async foreign(sid: string, entries: (string | Buffer)[][], id = '*'): Promise<string[]> {
    const { client, partitions } = this.stack.redis
    const stream = streamOf(this.stack.redis, sid)
    const ids: string[] = []
    for (const fields of entries) ids.push((await client.xadd(stream, id, ...fields))!)
    await client.zadd(partitions.of(sid).ready, Date.now(), sid)
    await this.wake(sid)
    return ids
  }

  async wake(sid: string): Promise<void> {
    const { client, partitions } = this.stack.redis
    await client.spublish(partitions.at(0).wake, String(partitions.of(sid).partition))
  }

  /** Takes its sinks away; `start` brings one. */
  async stop(): Promise<void> {
    await Promise.all(this.stack.sinks.splice(0).map((sink) => sink.stop()))
  }

  async start(): Promise<Sink> {
    const sink = await startSink(this.stack.config, log)
    this.stack.sinks.push(sink)
    return sink
  }

  /** @param name what follows `calltape_sink_` */
  metric(name: string, sink = this.stack.sinks[0]!): Promise<number> {
    return figure(sink.url, `calltape_sink_${name}`)
  }

  async ready(sink = this.stack.sinks[0]!): Promise<string> {
    const answer = await fetch(`${sink.url}/readyz`)
    return `${answer.status} ${(await answer.text()).trim()}`
  }

  /** Ends every connection of the sinks to PostgreSQL that matches. @returns how many there were */
  async terminate(which = 'true', pool = this.stack.database.pool): Promise<number> {
    const { rowCount } = await pool.query(
      `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
       WHERE datname = $1 AND application_name = 'calltape-sink' AND (${which})`,
      [this.database],
    )
    return rowCount!
  }
}
