/** CloudEvents on POST /v1/events: through ingest, Redis and sink, into the rows. */
import { afterAll, beforeAll, expect, test } from 'vitest'
import { startTestStack, type TestStack, until } from './support/stores.js'

const ONE = 'application/cloudevents+json'
const BATCH = 'application/cloudevents-batch+json'

let stack: TestStack
beforeAll(async () => {
  stack = await startTestStack()
})
afterAll(async () => await stack.end())

type Json = Record<string, unknown>

async function post(body: unknown, type: string): Promise<{ status: number; body: Json }> {
  const text = typeof body === 'string' ? body : JSON.stringify(body)
  const response = await fetch(`${stack.ingest.url}/v1/events`, {
    method: 'POST',
    body: text,
    headers: { 'Content-Type': type },
  })
  return { status: response.status, body: (await response.json()) as Json }
}

const cloudEvent = (type: string, data: Json, more: Json = {}) => ({
  specversion: '1.0',
  id: 'e1',
  source: '/bots/7',
  type,
  datacontenttype: 'application/json',
  data,
  ...more,
})
const said = (call_sid: string, text: string, more: Json = {}) =>
  cloudEvent('com.example.turn', { call_sid, speaker: 'user', text }, more)
const ended = (call_sid: string, more: Json = {}) =>
  cloudEvent('io.calltape.call.ended', { call_sid }, { id: 'end', ...more })

/** The call's row and turns once it is finalized. */
async function rowsOf(callSid: string): Promise<{ session: Json; turns: Json[] }> {
  const { pool } = stack.database
  return await until(`${callSid} is finalized`, async () => {
    const { rows } = await pool.query('SELECT * FROM call_sessions WHERE call_sid = $1 AND finalized_at IS NOT NULL', [
      callSid,
    ])
    if (!rows[0]) return undefined
    const turns = await pool.query('SELECT * FROM call_transcript_turns WHERE call_sid = $1 ORDER BY spoken_at', [
      callSid,
    ])
    return { session: rows[0], turns: turns.rows }
  })
}

test('a_single_one_ends_in_the_rows', async () => {
  const time = '2026-01-25T10:00:00.250Z'
  expect(await post(said('ce-single', 'Hello', { time, traceparent: '00-7' }), `${ONE}; charset=UTF-8`)).toEqual({
    status: 200,
    body: { accepted: 1, rejected: [] },
  })
  const end = cloudEvent('call.ended', { reason: 'hangup', turn_count: 1 }, { id: 'end', subject: 'ce-single' })
  expect(await post(end, ONE)).toMatchObject({ status: 200, body: { accepted: 1 } })
  const { session, turns } = await rowsOf('ce-single')
  expect(session).toMatchObject({ complete: true, end_reason: 'hangup', turn_count: 1 })
  expect(turns).toMatchObject([
    {
      turn_id: '["/bots/7","e1"]',
      speaker: 'customer',
      text: 'Hello',
      spoken_at: new Date(time),
      meta: { traceparent: '00-7' },
    },
  ])
})

test('a_batch_is_judged_one_by_one', async () => {
  const batch = [
    said('ce-batch', 'one'),
    said('ce-batch', 'two', { specversion: '0.3', id: 'e2' }),
    said('ce-batch', 'three', { id: 'e3' }),
    'four',
    cloudEvent('com.example.turn', { call_sid: 'ce-batch', text: 5, speaker: 'ai' }, { id: 'e5' }),
    ended('ce-batch'),
  ]
  expect(await post(batch, BATCH)).toEqual({
    status: 200,
    body: {
      accepted: 3,
      rejected: [
        { index: 1, code: 'invalid_field', path: 'specversion', message: 'specversion wants "1.0"; got "0.3"' },
        { index: 3, code: 'not_an_object', message: 'a CloudEvent is a JSON object, got "four"' },
        { index: 4, code: 'invalid_field', path: 'text', message: expect.stringContaining('got 5') },
      ],
    },
  })
  expect((await rowsOf('ce-batch')).turns.map(({ text }) => text)).toEqual(['one', 'three'])
  expect(await post([], BATCH)).toEqual({ status: 200, body: { accepted: 0, rejected: [] } })
})

test('the_same_event_twice_is_one_row_and_the_same_id_of_two_sources_are_two', async () => {
  const first = said('ce-twice', 'said once', { time: '2026-01-25T10:00:00Z' })
  const other = said('ce-twice', 'said elsewhere', { time: '2026-01-25T10:00:01Z', source: '/bots/8' })
  await post(first, ONE)
  await post([first, other, ended('ce-twice')], BATCH)
  await post([other, first], BATCH)
  const { session, turns } = await rowsOf('ce-twice')
  expect(turns.map(({ text }) => text)).toEqual(['said once', 'said elsewhere'])
  expect(session).toMatchObject({ turn_count: 2 })
})

test('a_body_that_is_none_is_refused_as_a_whole', async () => {
  expect(await post('{', ONE)).toMatchObject({ status: 400, body: { error: { code: 'invalid_json' } } })
  expect(await post('[', BATCH)).toMatchObject({ status: 400, body: { error: { code: 'invalid_json' } } })
  expect(await post(said('ce-none', 'x'), BATCH)).toMatchObject({
    status: 400,
    body: { error: { code: 'not_an_array' } },
  })
  expect(await post([said('ce-none', 'x')], ONE)).toMatchObject({
    body: { accepted: 0, rejected: [{ index: 0, code: 'not_an_object' }] },
  })
  const tooMany = JSON.stringify(Array.from({ length: 100_001 }, () => 0))
  expect(await post(tooMany, BATCH)).toMatchObject({ status: 413, body: { error: { code: 'too_many_events' } } })
  expect(await post(said('ce-none', 'x'), 'application/cloudevents+avro')).toMatchObject({
    status: 415,
    body: {
      error: {
        message: expect.stringMatching(
          /wants application\/json or application\/x-ndjson or application\/cloudevents\+json or application\/cloudevents-batch\+json; got application\/cloudevents\+avro/,
        ),
      },
    },
  })
})
