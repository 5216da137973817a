/** retention: calls that have run, ended and passed their retention leave nothing behind in Redis' memory. */
import type { Redis } from 'ioredis'
import { expect, onTestFinished, test } from 'vitest'
import { startIngest } from '../ingest/ingest.js'
import { readConfig } from '../shared/config.js'
import { connectRedis } from '../shared/redis.js'
import { startSink } from '../sink/sink.js'
import { seqs } from './support/calls.js'
import { freshDatabase, log, ownRedis, until } from './support/stores.js'

const CALLS = 20_000
const TURNS = 3
const SINKS = 3
const REQUEST_CALLS = 1000
const TEXT = 'What was said, more or less, in a turn of a call of which nothing is to stay behind. '.repeat(2)

/** With its connections, an empty one has about 2 MB: 5 % of it are 100 kB, or 5 bytes a call. */
const TOLERANCE = 1.05

test('memory_returns_to_its_starting_level_after_20000_calls_have_passed_their_retention', async () => {
  const [server, database] = await Promise.all([ownRedis(), freshDatabase()])
  const environment = { REDIS_URL: server.url, DATABASE_URL: database.url, STREAM_RETENTION: '1' }
  const config = readConfig({ ...environment, INGEST_PORT: '0', SINK_METRICS_PORT: '0' })
  const ingest = await startIngest(config, log)
  const sinks = await Promise.all(Array.from({ length: SINKS }, () => startSink(config, log)))
  const redis = (await connectRedis(server.url, log)) as Redis
  // On a busy machine logs of whatever took its time, or was large, have some hundred kB.
  for (const log of ['slowlog', 'commandlog-large-request', 'commandlog-large-reply']) {
    await redis.config('SET', `${log}-max-len`, 0).catch((error: Error) => {
      if (!/unknown/i.test(error.message)) throw error // only Valkey 8.1 has the latter
    })
  }
  onTestFinished(async () => {
    redis.disconnect()
    await ingest.stop()
    await Promise.all(sinks.map((sink) => sink.stop()))
    await Promise.all([server.stop(), database.drop()])
  })

  const play = async (name: string, count: number) => {
    for (let from = 0; from < count; from += REQUEST_CALLS) {
      const events = seqs(Math.min(REQUEST_CALLS, count - from), from).flatMap((n) => eventsOf(`${name}-${n}`))
      const response = await fetch(`${ingest.url}/v1/events`, {
        method: 'POST',
        headers: { 'Content-Type': 'application/x-ndjson' },
        body: events.join('\n'),
      })
      expect(await response.json()).toMatchObject({ accepted: events.length })
    }
  }
  const THERE_ANYWAY = 5 // `ct:partitions`, `ct:sinks`, the sweep's two, and ingest's producer
  const isEmpty = async () => (await redis.dbsize()) <= THERE_ANYWAY
  const memory = async () => figureOf(await redis.info('memory'), 'used_memory')

  await play('first', 500) // scripts, connections and their buffers are there from then on
  await until('the first ones are gone', isEmpty, 20_000)
  const before = await memory()

  await play('call', CALLS)
  const atMost = await memory()
  await until('all are gone', isEmpty, 150_000)
  expect(await stored(database.pool)).toEqual({ calls: CALLS + 500, turns: (CALLS + 500) * TURNS })
  expect(atMost, 'there was something to give back').toBeGreaterThan(before * 2)

  let after = 0
  await until(
    'memory is given back',
    async () => {
      const info = await redis.info('memory')
      after = figureOf(info, 'used_memory')
      return figureOf(info, 'lazyfree_pending_objects') === 0 && after <= before * TOLERANCE
    },
    15_000,
  ).catch(() => undefined) // said better below
  expect(after).toBeLessThanOrEqual(before * TOLERANCE)
}, 240_000)

function eventsOf(call_sid: string): string[] {
  const turns = seqs(TURNS).map((seq) => ({ type: 'turn', call_sid, seq, speaker: 'agent', text: TEXT }))
  return [...turns, { type: 'call.ended', call_sid, turn_count: TURNS }].map((event) => JSON.stringify(event))
}

function figureOf(info: string, name: string): number {
  return Number(new RegExp(`^${name}:(\\d+)`, 'm').exec(info)![1])
}

async function stored(pool: { query(sql: string): Promise<{ rows: unknown[] }> }) {
  const { rows } = await pool.query(`
    SELECT (SELECT count(*)::int FROM call_sessions WHERE complete) AS calls,
      (SELECT count(*)::int FROM call_transcript_turns) AS turns`)
  return rows[0]
}
