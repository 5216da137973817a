/** Twilio's webhooks of a call, in whatever order they arrive, and however often, end in the same row. */
import { randomUUID } from 'node:crypto'
import fc from 'fast-check'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { sendRequest } from './support/fixtures.js'
import { startTestStack, type TestStack, until } from './support/stores.js'
import { twilioSignature } from './support/twilio.js'

const TOKEN = 'twilio-token'
const RUNS = 40
const START_MS = Date.UTC(2026, 2, 5, 10)

let stack: TestStack
beforeAll(async () => {
  stack = await startTestStack({ TWILIO_AUTH_TOKEN: TOKEN })
})
afterAll(async () => await stack.end())

interface Webhook {
  path: string
  form: Record<string, string>
  /** I-Twilio-Idempotency-Token */
  token: string
}

const rfc2822 = (second: number) => new Date(START_MS + second * 1000).toUTCString().replace('GMT', '+0000')
const iso = (second: number) => new Date(START_MS + second * 1000).toISOString()

const SAID = [
  ['outbound_track', 'Good morning, this is Acme.'],
  ['inbound_track', 'Hello. Is my order there?'],
  ['inbound_track', ''],
  ['outbound_track', 'One moment, please.'],
  ['outbound_track', 'It will be there on Monday.'],
  ['inbound_track', 'धन्यवाद!'],
] as const

/** An outbound call with all that can be called back: 4 statuses, its transcription, a recording, and TwiML's own URL. */
function webhooksOf(callSid: string): Webhook[] {
  const call = { AccountSid: 'AC1', CallSid: callSid }
  const parties = {
    ...call,
    From: '+14155550100',
    To: '+12125550199',
    Direction: 'outbound-api',
    ApiVersion: '2010-04-01',
  }
  const status = (number: number, CallStatus: string, second: number, more: Record<string, string> = {}) => {
    const SequenceNumber = String(number)
    const callback = { CallStatus, SequenceNumber, Timestamp: rfc2822(second), CallbackSource: 'call-progress-events' }
    return { path: 'voice', form: { ...parties, ...callback, ...more } }
  }
  const transcription = (event: string, number: number, second: number, more: Record<string, string> = {}) => {
    const TranscriptionEvent = `transcription-${event}`
    const numbered = { TranscriptionSid: 'GT1', TranscriptionEvent, SequenceId: String(number), Timestamp: iso(second) }
    return { path: 'transcription', form: { ...call, ...numbered, ...more } }
  }
  const recording = (RecordingStatus: string, more: Record<string, string> = {}) => {
    const recorded = { RecordingSid: 'RE1', RecordingStatus, RecordingStartTime: rfc2822(6), RecordingTrack: 'both' }
    return { path: 'recording', form: { ...call, ...recorded, ...more } }
  }
  const webhooks = [
    status(0, 'initiated', 0),
    status(1, 'ringing', 0),
    status(2, 'in-progress', 5),
    status(3, 'completed', 60, { CallDuration: '55', Duration: '1', SipResponseCode: '200' }),
    { path: 'voice', form: { ...parties, CallStatus: 'in-progress', Called: '+12125550199' } },
    transcription('started', 1, 6, { PartialResults: 'false', Track: 'both_tracks', ProviderConfiguration: '{"a":1}' }),
    ...SAID.map(([Track, transcript], i) => {
      const TranscriptionData = JSON.stringify({ transcript, confidence: 0.9 })
      return transcription('content', i + 2, 10 + i, { Track, TranscriptionData, LanguageCode: 'en-US', Final: 'true' })
    }),
    transcription('stopped', SAID.length + 2, 59),
    recording('in-progress'),
    recording('completed', { RecordingUrl: 'https://api.twilio.com/RE1', RecordingDuration: '53' }),
  ]
  return webhooks.map((webhook) => ({ ...webhook, path: `/webhooks/twilio/${webhook.path}`, token: randomUUID() }))
}

async function send({ path, form, token }: Webhook): Promise<void> {
  const signature = twilioSignature(TOKEN, stack.ingest.url + path, form)
  const headers = { 'X-Twilio-Signature': signature, 'I-Twilio-Idempotency-Token': token }
  const response = await sendRequest(stack.ingest.url, { path, form, headers })
  expect(response.status, await response.text()).toBeLessThan(300)
}

async function rowOf(callSid: string): Promise<Record<string, unknown>> {
  const { rows } = await until(`${callSid} is committed`, async () => {
    const live = await fetch(`${stack.ingest.url}/v1/calls/${callSid}`)
    if (((await live.json()) as { behind: number }).behind !== 0) return undefined
    return await stack.database.pool.query('SELECT * FROM call_sessions WHERE call_sid = $1', [callSid])
  })
  expect(rows).toHaveLength(1)
  // When the URL of its TwiML was asked, Twilio does not say.
  const { call_sid: _, finalized_at, last_event_at: __, ...row } = rows[0]
  const events = await stack.database.pool.query('SELECT event_id FROM call_events WHERE call_sid = $1', [callSid])
  return { ...row, finalized: finalized_at !== null, events: events.rowCount }
}

const WEBHOOKS = webhooksOf('').length
let calls = 0

test('a_call_whose_webhooks_arrive_in_any_order_and_repeatedly_ends_as_one_complete_ordered_transcript', async () => {
  const inOrder = `CA-in-order-${calls++}`
  for (const webhook of webhooksOf(inOrder)) await send(webhook)
  const expected = await rowOf(inOrder)
  expect(expected).toMatchObject({
    finalized: true,
    // Each webhook but the turns is one; the end is another one, and so are the first word and the last of who is calling.
    events: WEBHOOKS - SAID.length + 3,
    complete: true,
    turn_count: SAID.length,
    full_transcript: SAID.map(([track, text], i) => ({
      seq: i + 2,
      speaker: track === 'inbound_track' ? 'customer' : 'agent',
      text,
    })),
    status: 'completed',
    end_reason: 'completed',
    direction: 'outbound',
    from_number: '+14155550100',
    to_number: '+12125550199',
    initiated_at: new Date(START_MS),
    answered_at: new Date(START_MS + 5002),
    ended_at: new Date(START_MS + 60_003),
    duration_seconds: 55,
    recording_url: 'https://api.twilio.com/RE1',
  })

  /** Each webhook by its place, one to three times, in any order; sent `atOnce` at a time. */
  const arrivals = fc.record({
    order: fc
      .array(fc.integer({ min: 1, max: 3 }), { minLength: WEBHOOKS, maxLength: WEBHOOKS })
      .map((times) => times.flatMap((n, place) => Array<number>(n).fill(place)))
      .chain((places) => fc.shuffledSubarray(places, { minLength: places.length, maxLength: places.length })),
    atOnce: fc.constantFrom(1, 3, 50),
  })
  await fc.assert(
    fc.asyncProperty(arrivals, async ({ order, atOnce }) => {
      const callSid = `CA-shuffled-${calls++}`
      const webhooks = webhooksOf(callSid)
      for (let i = 0; i < order.length; i += atOnce) {
        await Promise.all(order.slice(i, i + atOnce).map((place) => send(webhooks[place]!)))
      }
      expect(await rowOf(callSid)).toEqual(expected)
    }),
    { numRuns: RUNS },
  )
  const { rows } = await stack.database.pool.query(
    'SELECT count(*)::int AS turns, count(DISTINCT call_sid)::int AS calls FROM call_transcript_turns',
  )
  expect(rows).toEqual([{ turns: calls * SAID.length, calls }])
})

test('a_transcription_with_one_webhook_missing_is_not_complete', async () => {
  const callSid = `CA-gap-${calls++}`
  const webhooks = webhooksOf(callSid)
  const lost = webhooks.findIndex(({ form }) => form.SequenceId === '4')
  for (const webhook of webhooks.toSpliced(lost, 1).reverse()) await send(webhook)
  expect(await rowOf(callSid)).toMatchObject({ finalized: true, complete: false, turn_count: SAID.length - 1 })
  await send(webhooks[lost]!)
  expect(await rowOf(callSid)).toMatchObject({ finalized: true, complete: true, turn_count: SAID.length })
})
