/** The end of a call, end to end: what producers say of it, in whatever order, and what is made of it when they say nothing. */
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { WebSocket } from 'ws'
import { startTestStack, type TestStack, until } from './support/stores.js'
import { eventsOf } from './support/streams.js'

type Json = Record<string, unknown>

let stack: TestStack
const start = (environment: Record<string, string>) => {
  beforeAll(async () => {
    stack = await startTestStack(environment)
  })
  afterAll(async () => {
    for (const socket of sockets.splice(0)) socket.terminate()
    await stack.end()
  })
}
const sockets: WebSocket[] = []

let calls = 0
const newCall = () => `call-${++calls}`

const T0 = Date.UTC(2026, 0, 1, 12)
const at = (seconds: number) => T0 + seconds * 1000
const turn = (seq: number, more: object = {}) => ({
  type: 'turn',
  seq,
  speaker: 'agent',
  text: `turn ${seq}`,
  ts: at(seq),
  ...more,
})
const ended = (more: object = {}) => ({ type: 'call.ended', id: 'end', ts: at(60), reason: 'hangup', ...more })
const status = (name: string, seconds: number) => ({
  type: 'call.status',
  id: `${name} ${seconds}`,
  status: name,
  ts: at(seconds),
})

/** Resolves when the events are acked. */
type Send = (sid: string, ...events: object[]) => Promise<void>

const overHttp: Send = async (sid, ...events) => {
  const body = JSON.stringify(events.map((event) => ({ ...event, call_sid: sid })))
  const init = { method: 'POST', body, headers: { 'Content-Type': 'application/json' } }
  const answer = (await (await fetch(`${stack.ingest.url}/v1/events`, init)).json()) as Json
  expect(answer).toEqual({ accepted: events.length, rejected: [] })
}

async function connect(query = ''): Promise<WebSocket> {
  const socket = new WebSocket(`${stack.wsUrl}/v1/stream${query}`)
  socket.on('error', () => undefined)
  sockets.push(socket)
  await once(socket, 'message') // hello
  return socket
}

async function sendOn(socket: WebSocket, ...events: object[]): Promise<void> {
  socket.send(JSON.stringify(events))
  await once(socket, 'message') // the ack
}

const overWebSocket: Send = async (sid, ...events) => {
  const socket = await connect()
  await sendOn(socket, ...events.map((event) => ({ ...event, call_sid: sid })))
  socket.close()
}

const TRANSPORTS: [string, Send][] = [
  ['WebSocket', overWebSocket],
  ['HTTP', overHttp],
]

async function rowOf(sid: string): Promise<Json | undefined> {
  const sql = 'SELECT *, xmin::text, ctid::text FROM call_sessions WHERE call_sid = $1'
  return (await stack.database.pool.query<Json>(sql, [sid])).rows[0]
}

/** Waits for the call's row to be as `expected`. (`expect.poll` is not for tests that run at the same time.) */
async function untilRow(sid: string, expected: object): Promise<Json> {
  const deadline = Date.now() + 10_000
  for (;;) {
    const row = await rowOf(sid)
    try {
      expect(row).toMatchObject(expected)
      return row!
    } catch (error) {
      if (Date.now() > deadline) throw error
    }
    await sleep(5)
  }
}

/** All that was appended is committed. */
async function committed(sid: string): Promise<void> {
  const call = async () => (await (await fetch(`${stack.ingest.url}/v1/calls/${sid}`)).json()) as Json
  await until(`all of ${sid} is committed`, async () => (await call()).behind === 0)
}

const FINAL = { finalized_at: expect.any(Date) }
const LIVE = { finalized_at: null, full_transcript: null, turn_count: null }

describe.each(TRANSPORTS)('over %s', (_, send) => {
  start({})

  test('a_duplicate_call_ended_ends_the_call_once', async () => {
    const sid = newCall()
    await send(sid, turn(0), ended({ turn_count: 1 }), ended({ turn_count: 1 }))
    const once = await untilRow(sid, { ...FINAL, turn_count: 1, complete: true, ended_at: new Date(at(60)) })
    await send(sid, ended({ turn_count: 7, reason: 'said otherwise' }))
    await committed(sid)
    expect(await rowOf(sid)).toEqual(once)
  })

  test('an_early_call_ended_is_completed_by_the_turns_behind_it', async () => {
    const sid = newCall()
    await send(sid, ended({ turn_count: 3 }))
    await untilRow(sid, { ...FINAL, turn_count: 0, complete: false, full_transcript: [] })
    await send(sid, turn(2), turn(0))
    await untilRow(sid, { turn_count: 2, complete: false })
    await send(sid, turn(1))
    const { full_transcript } = await untilRow(sid, { turn_count: 3, complete: true })
    expect(full_transcript).toMatchObject([{ seq: 0 }, { seq: 1 }, { seq: 2 }])
  })

  test('without_proof_complete_is_null_and_with_a_gap_it_is_false', async () => {
    const [unproved, gap, keyless] = [newCall(), newCall(), newCall()]
    await send(unproved, turn(0), turn(1), ended())
    await send(gap, turn(0), turn(2), ended())
    await send(keyless, turn(0), { type: 'turn', speaker: 'agent', text: 'x' }, ended({ turn_count: 2 }))
    await untilRow(unproved, { ...FINAL, complete: null, turn_count: 2 })
    await untilRow(gap, { ...FINAL, complete: false, turn_count: 2 })
    await untilRow(keyless, { ...FINAL, complete: true, turn_count: 2 })
  })

  test('turns_and_recording_URLs_after_the_end_are_worked_in', async () => {
    const sid = newCall()
    await send(sid, turn(0), ended({ turn_count: 2 }))
    await untilRow(sid, { ...FINAL, complete: false, recording_url: null })
    await send(sid, { type: 'call.status', ts: at(90), recording_url: 'https://r/1', duration_seconds: 59 })
    await send(sid, turn(1))
    await untilRow(sid, {
      ...FINAL,
      complete: true,
      turn_count: 2,
      recording_url: 'https://r/1',
      duration_seconds: 59,
      ended_at: new Date(at(60)),
      end_reason: 'hangup',
    })
  })

  test('an_end_status_never_goes_back_in_whatever_order_callbacks_arrive', async () => {
    const callbacks = [status('ringing', 1), status('in-progress', 2), status('completed', 3), status('failed', 4)]
    const orders = permutations(callbacks)
    const sids = orders.map(newCall)
    for (const step of callbacks.keys()) await Promise.all(orders.map((order, i) => send(sids[i]!, order[step]!)))
    for (const sid of sids) {
      await committed(sid)
      expect(await rowOf(sid)).toMatchObject({ status: 'completed', answered_at: new Date(at(2)) })
    }
    for (const sid of sids) await send(sid, status('in-progress', 9))
    for (const sid of sids) {
      await committed(sid)
      expect(await rowOf(sid)).toMatchObject({ status: 'completed' })
    }
  })

  test('two_producers_on_one_call_make_one_call', async () => {
    const sid = newCall()
    const bot = [turn(0), turn(1), turn(2), ended({ turn_count: 4, outcome: 'sold', source: 'bot' })]
    const provider = [status('in-progress', 0), turn(1, { text: 'heard otherwise' }), turn(3), status('completed', 61)]
    await Promise.all([send(sid, ...bot), overHttp(sid, ...provider)])
    await untilRow(sid, { ...FINAL, status: 'completed', outcome: 'sold', turn_count: 4, complete: true })
  })

  test('refinalizing_with_nothing_new_changes_nothing', async () => {
    const sid = newCall()
    const events = [
      { type: 'call.started', id: 'start', from: '+1', ts: at(0) },
      turn(0),
      turn(1),
      { type: 'call.data', id: 'data', data: { a: 1 }, objections: ['price'], ts: at(2) },
      ended({ turn_count: 2 }),
    ]
    await send(sid, ...events)
    const before = await untilRow(sid, FINAL)
    await send(sid, ...events)
    for (const event of events) await send(sid, event)
    await committed(sid)
    expect(await rowOf(sid)).toEqual(before)
  })
})

function permutations<T>(items: T[]): T[][] {
  if (items.length < 2) return [items]
  return items.flatMap((item, i) => permutations(items.toSpliced(i, 1)).map((rest) => [item, ...rest]))
}

describe('a call that nobody ends', () => {
  start({ IDLE_TIMEOUT: '3', DISCONNECT_GRACE: '1' })
  /** Longer than the grace, and shorter than the idle time. */
  const A_WHILE_MS = 1900
  const types = async (sid: string) => (await eventsOf(stack.redis, sid)).map(({ type }) => type)
  const turnNow = (seq: number) => ({ type: 'turn', seq, speaker: 'agent', text: `turn ${seq}` })
  const live = async (sid: string) => (await (await fetch(`${stack.ingest.url}/v1/calls/${sid}`)).json()) as Json

  test.concurrent('and_is_silent_is_abandoned_over_HTTP_and_WebSocket_and_its_real_end_counts_when_it_comes', async () => {
    const abandon = async (send: Send) => {
      const sid = newCall()
      await send(sid, turnNow(0), turnNow(1))
      await untilRow(sid, LIVE)
      const row = await untilRow(sid, { ...FINAL, end_reason: 'abandoned', turn_count: 2, complete: null })
      expect(row.ended_at).toEqual(row.last_event_at)
      await send(sid, { type: 'call.ended', reason: 'hangup', turn_count: 2 })
      await untilRow(sid, { ...FINAL, end_reason: 'hangup', complete: true })
    }
    await Promise.all(TRANSPORTS.map(([, send]) => abandon(send)))
  })

  test.concurrent('and_whose_bound_connection_resumes_within_the_grace_goes_on', async () => {
    const sid = newCall()
    for (let seq = 0; seq < 4; seq++) {
      const socket = await connect(`?call_sid=${sid}`)
      await sendOn(socket, turnNow(seq))
      socket.terminate()
      await until('the disconnect is recorded', async () => (await types(sid)).at(-1) === 'call.disconnected')
      await sleep(400) // together longer than the grace
      expect(await rowOf(sid)).toMatchObject(LIVE)
    }
    const socket = await connect(`?call_sid=${sid}`)
    await sleep(A_WHILE_MS)
    expect(await live(sid)).toMatchObject({ session: { connection: 'connected' } })
    expect(await rowOf(sid)).toMatchObject(LIVE)
    await sendOn(socket, { type: 'call.ended', reason: 'hangup', turn_count: 4 })
    await untilRow(sid, { ...FINAL, end_reason: 'hangup', turn_count: 4, complete: true })
    expect((await types(sid)).filter((type) => type === 'call.ended')).toHaveLength(1)
  })

  test.concurrent('and_is_on_a_new_connection_does_not_end_with_the_late_close_of_an_older_one', async () => {
    const sid = newCall()
    const halfOpen = await connect(`?call_sid=${sid}`)
    await sendOn(halfOpen, turnNow(0))
    const second = await connect(`?call_sid=${sid}`)
    await sendOn(second, turnNow(1))
    halfOpen.terminate()
    await until('its disconnect is recorded', async () => (await types(sid)).at(-1) === 'call.disconnected')
    await sleep(A_WHILE_MS)
    expect(await live(sid)).toMatchObject({ session: { connection: 'connected' } })
    expect(await rowOf(sid)).toMatchObject(LIVE)
    second.terminate()
    await untilRow(sid, { ...FINAL, end_reason: 'disconnected', turn_count: 2 })
  })

  test.concurrent('and_goes_on_with_a_turn_after_it_was_presumed_over_is_live_again', async () => {
    const sid = newCall()
    await overHttp(sid, turnNow(0))
    await untilRow(sid, { ...FINAL, end_reason: 'abandoned', turn_count: 1 })
    await overHttp(sid, turnNow(1))
    await untilRow(sid, { ...LIVE, end_reason: null, ended_at: null })
    expect(await active(), 'it counts as active').toContain(sid)
    await untilRow(sid, { ...FINAL, end_reason: 'abandoned', turn_count: 2 })
    expect(await active()).not.toContain(sid)
  })

  test.concurrent('and_comes_back_on_a_new_connection_after_its_grace_is_live_again', async () => {
    const sid = newCall()
    const first = await connect(`?call_sid=${sid}`)
    await sendOn(first, turnNow(0))
    first.terminate()
    await untilRow(sid, { ...FINAL, end_reason: 'disconnected' })
    const back = await connect(`?call_sid=${sid}`)
    await untilRow(sid, LIVE)
    expect(await active()).toContain(sid)
    await sendOn(back, turnNow(1), { type: 'call.ended', reason: 'hangup', turn_count: 2 })
    await untilRow(sid, { ...FINAL, end_reason: 'hangup', turn_count: 2, complete: true })
  })

  test.concurrent('and_was_presumed_over_is_not_brought_back_by_a_late_recording_or_status', async () => {
    const sid = newCall()
    await overHttp(sid, turnNow(0))
    await untilRow(sid, { ...FINAL, end_reason: 'abandoned' })
    await overHttp(sid, { type: 'call.status', recording_url: 'https://r/1' }, { type: 'call.data', stage: 'after' })
    await overHttp(sid, { type: 'call.status', status: 'in-progress' })
    await committed(sid)
    expect(await rowOf(sid)).toMatchObject({
      ...FINAL,
      recording_url: 'https://r/1',
      conversation_stage: 'after',
      end_reason: 'abandoned',
    })
    expect(await active()).not.toContain(sid)
  })

  async function active(): Promise<string[]> {
    const page = (await (await fetch(`${stack.ingest.url}/v1/calls?state=active&limit=1000`)).json()) as Json
    return (page.calls as { call_sid: string }[]).map(({ call_sid }) => call_sid)
  }
})
