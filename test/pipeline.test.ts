/** The whole way, at full speed: WebSocket → Redis → sinks → PostgreSQL. What was sent is what is there, once. */
import { afterEach, expect, test } from 'vitest'
import { compareCall, expectedCall, type SentEvent, verifyCalls } from '../cli/compare.js'
import { connect } from '../client/client.js'
import { startTestStack, type TestStack, until } from './support/stores.js'

let stack: TestStack
afterEach(async () => await stack.end())

/** What breaks careless escaping, and what only just fits. */
const TEXTS = [
  'plain',
  'tab\tnewline\nreturn\rbackslash\\ \\N \\. \\t \\x41 \\u0041',
  '\\N',
  '\\.',
  '',
  ' ',
  `"double" 'single' \`back\` $1 %s {"json":[1]}`,
  '👩‍👩‍👧‍👦 🇮🇳 👍🏽 𝒳',
  'क्या आप मुझे order number बता सकते हैं?',
  'هل يمكنك إرسال الرقم ٤٤١٧ من فضلك؟ שלום',
  'e\u0301 n\u0303 \u200d\u200f\u202e\ufeff',
  '\u0001\u001b[31m\u007f\u0085\u2028',
]
const LONGEST = ['x'.repeat(65_536), '€'.repeat(21_845), '\\'.repeat(65_536), '\n'.repeat(65_536)]

function callEvents(callSid: string, turns: number): SentEvent[] {
  const start = Date.UTC(2026, 0, 1)
  const events: SentEvent[] = [
    { type: 'call.started', call_sid: callSid, id: 'started', ts: start, direction: 'inbound', from: '+911234567890' },
    {
      type: 'call.data',
      call_sid: callSid,
      id: 'data',
      ts: start,
      data: { budget: 5 },
      stage: 'closing',
      objections: ['x'],
    },
  ]
  for (let seq = 0; seq < turns; seq++) {
    const number = seq + callSid.length
    const text = seq === 50 && callSid.endsWith('7') ? LONGEST[number % LONGEST.length]! : TEXTS[number % TEXTS.length]!
    const speaker = seq % 2 === 0 ? 'agent' : 'customer'
    events.push({ type: 'turn', call_sid: callSid, seq, speaker, text, ts: start + seq * 1000, confidence: 0.5 })
  }
  const ended = { reason: 'hangup', outcome: 'qualified', turn_count: turns }
  return [...events, { type: 'call.ended', call_sid: callSid, id: 'ended', ts: start + turns * 1000, ...ended }]
}

const finalized = async (count: number) => {
  const sql = 'SELECT count(finalized_at)::int AS n FROM call_sessions'
  return (await stack.database.pool.query<{ n: number }>(sql)).rows[0]!.n === count
}

async function expectEverythingCommitted(): Promise<void> {
  const { client, partitions } = stack.redis
  await until('nothing is ready or leased', async () => {
    const counts = await Promise.all(partitions.all.flatMap((p) => [client.zcard(p.ready), client.zcard(p.leased)]))
    return counts.every((count) => count === 0)
  })
}

test('500_calls_over_50_websockets_are_in_postgres_byte_for_byte_once_and_in_order', async () => {
  stack = await startTestStack({}, 2)
  const calls = Array.from({ length: 500 }, (_, i) => `call-${i}`)
  await Promise.all(
    Array.from({ length: 50 }, async (_, connection) => {
      const client = await connect(stack.wsUrl)
      const mine = calls.filter((_, i) => i % 50 === connection).map((sid) => callEvents(sid, 100))
      for (let i = 0; i < mine[0]!.length; i++) {
        for (const events of mine) client.post(events[i]!)
        await client.ready()
      }
      await client.flush()
      expect(client.stats.refused).toBe(0)
      await client.close()
    }),
  )
  await until('all calls are finalized', () => finalized(500), 60_000)
  const expected = calls.map((sid) => expectedCall(sid, callEvents(sid, 100)))
  const report = await verifyCalls(stack.database.pool, 'call-', expected)
  expect(report.differences).toEqual([])
  expect(report).toMatchObject({ calls: 500, turns: 50_000, rows: 50_000 })
  await expectEverythingCommitted()
}, 120_000)

test('the_same_events_again_and_in_shuffled_batches_leave_the_same_rows', async () => {
  stack = await startTestStack({}, 2)
  const calls = Array.from({ length: 40 }, (_, i) => `again-${i}`)
  const events = calls.flatMap((sid) => callEvents(sid, 25))
  await sendInBatches(events)
  await until('all calls are finalized', () => finalized(40), 30_000)
  await expectEverythingCommitted()
  const first = await rows()
  expect(first.turns).toHaveLength(40 * 25)

  await sendInBatches(shuffled([...events, ...events]))
  await expectEverythingCommitted()
  expect(await rows()).toEqual(first)
}, 60_000)

test('a_call_sent_backwards_and_by_two_producers_is_the_same_call', async () => {
  stack = await startTestStack()
  const events = callEvents('backwards', 60)
  const clients = await Promise.all([connect(stack.wsUrl), connect(stack.wsUrl)])
  for (const event of events.toReversed()) for (const client of clients) await client.send(event)
  for (const client of clients) await client.close()
  await expectEverythingCommitted()
  const { pool } = stack.database
  const report = await verifyCalls(pool, 'backwards', [expectedCall('backwards', events)])
  expect(report.differences).toEqual([])
  // The comparison itself must be able to fail.
  expect(compareCall(expectedCall('backwards', callEvents('backwards', 61)), [], undefined)).not.toEqual([])
})

/** Array bodies of 50 events over HTTP, eight at a time. */
async function sendInBatches(events: SentEvent[]): Promise<void> {
  const batches = Array.from({ length: Math.ceil(events.length / 50) }, (_, i) => events.slice(i * 50, i * 50 + 50))
  const post = async () => {
    for (let batch = batches.shift(); batch; batch = batches.shift()) {
      const headers = { 'Content-Type': 'application/json' }
      const response = await fetch(`${stack.ingest.url}/v1/events`, {
        method: 'POST',
        headers,
        body: JSON.stringify(batch),
      })
      expect(await response.json()).toEqual({ accepted: batch.length, rejected: [] })
    }
  }
  await Promise.all(Array.from({ length: 8 }, post))
}

function shuffled<T>(items: T[]): T[] {
  const copy = [...items]
  for (let i = copy.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1))
    ;[copy[i], copy[j]] = [copy[j]!, copy[i]!]
  }
  return copy
}

/** All that does not say when and by which entry a row came about. */
async function rows(): Promise<{ turns: unknown[]; calls: unknown[]; events: unknown[] }> {
  const { pool } = stack.database
  const turns = await pool.query(
    'SELECT call_sid, turn_id, seq, speaker, text, spoken_at, confidence, meta, stream_id FROM call_transcript_turns ORDER BY 1, 2',
  )
  const calls = await pool.query('SELECT * FROM call_sessions ORDER BY call_sid')
  const events = await pool.query('SELECT call_sid, event_id, event, stream_id FROM call_events ORDER BY 1, 2')
  return { turns: turns.rows, calls: calls.rows, events: events.rows }
}
