/** Ingest's WebSocket: numbering, acks, refusals, the window, bound connections, and what clients may do to it. */
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { connect as connectSocket, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import getPort from 'get-port'
import type { Redis } from 'ioredis'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, onTestFinished, test } from 'vitest'
import { connect } from '../client/client.js'
import type { Appender } from '../ingest/append.js'
import type { Ingest } from '../ingest/ingest.js'
import { StreamConnection } from '../ingest/stream.js'
import { type ConnectionChanged, Refusal } from '../shared/events.js'
import { Partitions } from '../shared/keys.js'
import { createIngestMetrics } from '../shared/metrics.js'
import { connectRedis } from '../shared/redis.js'
import { testIngest, Wire } from './support/ingest.js'
import { figure } from './support/metrics.js'
import { Relay } from './support/relay.js'
import { freshRedis, log, type RedisDatabase, until } from './support/stores.js'
import {
  entriesOf,
  eventsOf,
  ownRedis,
  type Store,
  type StoreServer,
  seqsOf,
  streamOf,
  turn,
} from './support/streams.js'

let redis: RedisDatabase
beforeEach(async () => {
  redis = await freshRedis()
})
afterEach(() => redis.drop())

type Json = Record<string, unknown>

const numbers = (count: number, from = 0) => Array.from({ length: count }, (_, i) => from + i)
const typesOf = async (store: Store, sid: string) => (await eventsOf(store, sid)).map(({ type }) => type)

/** Ingest whose connection to Redis can be held and cut. */
async function relayed(environment: Json = {}): Promise<{ ingest: Ingest; relay: Relay }> {
  const relay = await Relay.start(redis.url)
  onTestFinished(() => relay.stop())
  const ingest = await testIngest({ REDIS_URL: relay.url, ...environment })
  // The first append tells Redis the script.
  const wire = await Wire.open(ingest)
  wire.send(turn('first', 0))
  await wire.untilAcked(1)
  await wire.close()
  return { ingest, relay }
}

/** The neighbour whom whatever happens to others must not disturb. */
async function expectServed(wire: Wire): Promise<void> {
  const before = wire.acked
  wire.send(turn('neighbour', before))
  await wire.untilAcked(before + 1)
  expect(await seqsOf(redis, 'neighbour')).toEqual(numbers(before + 1))
}

describe('hello', () => {
  test('comes_first_with_the_window_and_the_largest_message', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url, WINDOW: '7', MAX_MESSAGE_BYTES: '2048' })
    for (const query of ['', '?call_sid=CA1', '?unknown=1']) {
      const wire = await Wire.open(ingest, query)
      expect(wire.messages).toEqual([{ type: 'hello', protocol: 1, window: 7, max_message_bytes: 2048 }])
    }
  })

  test('comes_to_a_client_that_offers_compression_or_subprotocols', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url })
    const wire = await Wire.open(ingest, '', { perMessageDeflate: true }, ['calltape', 'other'])
    expect(wire.hello).toMatchObject({ protocol: 1 })
    expect(wire.socket.protocol, 'one of those offered').toBe('calltape')
    wire.send(turn('CA1', 0))
    await wire.untilAcked(1)
  })
})

describe('events', () => {
  let ingest: Ingest
  beforeEach(async () => {
    ingest = await testIngest({ REDIS_URL: redis.url, WINDOW: '4096' })
  })

  test('are_numbered_over_single_ones_arrays_and_what_is_refused', async () => {
    const wire = await Wire.open(ingest)
    wire.send(turn('CA1', 0)) // 1
    wire.send([turn('CA1', 1), { type: 'nonsense' }, turn('CA2', 0), 5]) // 2 to 5
    wire.send([]) // none
    wire.send('{"type":') // 6
    wire.send([turn('CA1', 2), [turn('CA1', 3)]]) // 7, 8
    wire.send(Buffer.from(JSON.stringify(turn('CA1', 4)))) // 9, binary
    wire.send({ ...turn('CA1', 5), text: undefined }) // 10
    wire.send(turn('CA1', 6)) // 11
    await wire.untilAcked(11)
    expect(wire.errors).toEqual([
      { type: 'error', event: 3, code: 'unknown_type', path: 'type', message: expect.stringContaining('"nonsense"') },
      { type: 'error', event: 5, code: 'not_an_object', message: expect.stringContaining('got 5') },
      { type: 'error', event: 6, code: 'invalid_json', message: expect.any(String) },
      { type: 'error', event: 8, code: 'not_an_object', message: expect.stringContaining('an array') },
      { type: 'error', event: 9, code: 'not_text', message: expect.stringContaining('text message') },
      { type: 'error', event: 10, code: 'missing_field', path: 'text', message: expect.stringMatching(/^text is req/) },
    ])
    expect(await seqsOf(redis, 'CA1')).toEqual([0, 1, 2, 6])
    expect(await seqsOf(redis, 'CA2')).toEqual([0])
    expect(wire.closed).toBeUndefined()
    for (const [i, { type, event }] of wire.messages.entries()) {
      if (type !== 'error') continue
      const acks = wire.messages.slice(0, i).filter((message) => message.type === 'ack')
      for (const { through } of acks)
        expect(through, 'an error comes before the ack that covers it').toBeLessThan(event as number)
    }
  })

  test('that_are_not_JSON_are_errors_and_no_disconnects', async () => {
    const wire = await Wire.open(ingest)
    const bad = ['', ' ', '{', 'turn', '[1,]', '{"a":1}{"b":2}', '\ufeff{}', "{'type':'turn'}", 'undefined', '[', '\0']
    for (const text of bad) wire.send(text)
    wire.send(new Uint8Array(0))
    wire.send(randomBytes(100))
    await wire.untilAcked(bad.length + 2)
    expect(wire.errors.map(({ event }) => event)).toEqual(numbers(bad.length + 2, 1))
    expect(wire.errors.map(({ code }) => code)).toEqual([...bad.map(() => 'invalid_json'), 'not_text', 'not_text'])
    wire.send(turn('CA1', 0))
    await wire.untilAcked(bad.length + 3)
    expect(await seqsOf(redis, 'CA1')).toEqual([0])
  })

  test('that_Redis_refuses_are_errors_and_acked', async () => {
    await redis.client.set(streamOf(redis, 'CA2'), 'somebody else’s')
    const wire = await Wire.open(ingest)
    wire.send([turn('CA1', 0), turn('CA2', 0), turn('CA1', 1)])
    await wire.untilAcked(3)
    expect(wire.errors).toEqual([
      { type: 'error', event: 2, code: 'not_stored', message: expect.stringContaining('WRONGTYPE') },
    ])
    expect(await seqsOf(redis, 'CA1')).toEqual([0, 1])
  })

  test('deep_ones_are_refused_and_harm_nobody', async () => {
    const wire = await Wire.open(ingest)
    const deep = '['.repeat(100_000) + ']'.repeat(100_000)
    const event = (fields: string) => `{"call_sid":"CA1",${fields}}`
    const bad = [
      event(`"type":"turn","speaker":"agent","text":"x","extra":${deep}`),
      event(`"type":"call.status","status":${deep}`),
      event(`"type":"call.started","direction":${deep}`),
      event(`"type":"call.data","data":{"a":${deep}}`),
      event(`"type":${deep}`),
    ]
    for (const text of bad) wire.send(text)
    for (const text of bad) wire.send(`[${text},${JSON.stringify(turn('CA1', 0))}]`)
    wire.send(deep) // an array with one element that is no event
    await wire.untilAcked(3 * bad.length + 1)
    expect(wire.errors).toHaveLength(2 * bad.length + 1)
    expect(await eventsOf(redis, 'CA1')).toHaveLength(bad.length)
  })

  test('of_a_call_are_in_its_stream_in_the_order_sent', async () => {
    const CALLS = 3
    const wires = await Promise.all(numbers(CALLS).map(() => Wire.open(ingest)))
    const MESSAGES = 400
    for (let m = 0, seq = 0; m < MESSAGES; m++) {
      const size = 1 + ((m * m) % 9)
      // Each connection has a call of its own, and all of them write to a common one.
      for (const [c, wire] of wires.entries()) {
        const events = numbers(size, seq).map((n) => turn(`own${c}`, n, 'x'.repeat((n * 37) % 900)))
        wire.send(size === 1 ? events[0] : events)
        wire.send(turn('common', m * CALLS + c))
      }
      seq += size
      if (m % 50 === 0) await sleep(1)
    }
    const perWire = numbers(MESSAGES).reduce((sum, m) => sum + 2 + ((m * m) % 9), 0)
    for (const wire of wires) await wire.untilAcked(perWire)
    for (const c of numbers(CALLS)) expect(await seqsOf(redis, `own${c}`)).toEqual(numbers(perWire - MESSAGES))
    const common = (await seqsOf(redis, 'common')) as number[]
    expect(common).toHaveLength(CALLS * MESSAGES)
    for (const c of numbers(CALLS)) {
      expect(common.filter((n) => n % CALLS === c)).toEqual(numbers(MESSAGES).map((m) => m * CALLS + c))
    }
  })

  test('that_need_no_change_are_stored_byte_for_byte_when_they_come_alone', async () => {
    const wire = await Wire.open(ingest)
    const unchanged = [
      '{"type":"turn","call_sid":"CA1","speaker":"agent","text":"h\\u00e9llo \\ud83d\\ude00 😀","meta":{"n":1.50,"big":12345678901234567890}}',
      ' { "text" : "" ,\n"speaker":"Bob",\t"call_sid":"CA1","type":"turn" } ',
      '{"type":"call.data","call_sid":"CA1","data":{"__proto__":1,"a":[ ]},"objections":[]}',
    ]
    const changed = [
      [
        '{"type":"turn","call_sid":"CA1","speaker":"AI","text":"x"}',
        '{"type":"turn","call_sid":"CA1","speaker":"agent","text":"x"}',
      ],
      [
        '{"type":"turn","call_sid":"CA1","speaker":"agent","text":"x","id":null}',
        '{"type":"turn","call_sid":"CA1","speaker":"agent","text":"x"}',
      ],
      [
        '{"type":"call.ended","ts":"2024-01-01T00:00:00Z","call_sid":"CA1","x":1}',
        '{"type":"call.ended","ts":1704067200000,"call_sid":"CA1","meta":{"x":1}}',
      ],
    ] as const
    for (const text of unchanged) wire.send(text)
    for (const [text] of changed) wire.send(text)
    await wire.untilAcked(unchanged.length + changed.length)
    const stored = (await entriesOf(redis, 'CA1')).map(([, fields]) => fields)
    expect(stored).toEqual([...unchanged, ...changed.map(([, text]) => text)].map((text) => ['e', text]))
  })
})

describe('an ack', () => {
  test('comes_only_when_Redis_has_the_event_and_has_said_so', async () => {
    const { ingest, relay } = await relayed()
    const wire = await Wire.open(ingest)
    relay.holdRequests = true
    wire.send(turn('CA1', 0))
    await until('the append is on its way', () => relay.holdsRequests)
    wire.send('not JSON') // refused at once, but only the second one
    await until('the error comes', () => wire.errors.length === 1)
    await sleep(50)
    expect([await seqsOf(redis, 'CA1'), wire.acked]).toEqual([[], 0])
    relay.holdReplies = true
    relay.holdRequests = false
    relay.release()
    await wire.untilAcked(2)
    expect(await seqsOf(redis, 'CA1')).toEqual([0])

    relay.holdReplies = true
    wire.send(turn('CA1', 1))
    await until('Redis has answered', () => relay.holdsReplies)
    await sleep(50)
    expect([await seqsOf(redis, 'CA1'), wire.acked], 'stored, but nobody knows').toEqual([[0, 1], 2])
    relay.release()
    await wire.untilAcked(3)
  })

  test('finds_its_events_in_the_streams_whenever_one_arrives', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url })
    const wire = await Wire.open(ingest)
    const looks: Promise<[number, number]>[] = []
    wire.socket.on('message', () => {
      const through = wire.acked
      if (wire.messages.at(-1)!.type === 'ack')
        looks.push(redis.client.xlen(streamOf(redis, 'CA1')).then((n) => [n, through]))
    })
    for (let seq = 0; seq < 3000; seq++) {
      wire.send(turn('CA1', seq))
      if (seq % 20 === 0) await sleep(0)
    }
    await wire.untilAcked(3000)
    for (const [stored, acked] of await Promise.all(looks)) expect(stored).toBeGreaterThanOrEqual(acked)
    expect(looks.length, 'in groups').toBeGreaterThan(5)
    expect(looks.length).toBeLessThan(3000)
  })

  test('survives_a_connection_to_Redis_that_breaks_before_it_has_answered', async () => {
    const { ingest, relay } = await relayed()
    const wire = await Wire.open(ingest)
    for (let round = 0; round < 5; round++) {
      relay.holdReplies = true
      wire.send(turn('CA1', 2 * round))
      await until('Redis has answered', () => relay.holdsReplies)
      relay.cut()
      wire.send(turn('CA1', 2 * round + 1))
      await wire.untilAcked(2 * round + 2)
    }
    expect(await seqsOf(redis, 'CA1')).toEqual(numbers(10))
  })

  test('comes_although_a_connection_to_Redis_went_silent_without_closing', async () => {
    const { ingest, relay } = await relayed()
    const wire = await Wire.open(ingest)
    relay.holdRequests = true
    wire.send(turn('CA1', 0))
    await until('the append is on its way', () => relay.holdsRequests)
    relay.holdRequests = false // what is held never arrives, but a new connection would work
    await wire.untilAcked(1)
    wire.send(turn('CA1', 1))
    await wire.untilAcked(2)
    expect(await seqsOf(redis, 'CA1')).toEqual([0, 1])
  })

  test('never_runs_ahead_of_an_event_that_still_waits', () => {
    // In a Cluster the lanes finish in any order; here the order is ours.
    const sent: Json[] = []
    const waiting: number[] = []
    const socket = { send: (message: string) => void sent.push(JSON.parse(message) as Json), close: () => undefined }
    const appender = {
      append: (_e: unknown, _p: unknown, _o: unknown, position: number) => waiting.push(position),
      isFull: false,
      isFullFor: () => false,
    }
    const options = { window: 100, maxMessageBytes: 1000 }
    const connection = new StreamConnection(
      socket,
      undefined,
      appender as unknown as Appender,
      options,
      createIngestMetrics(),
    )
    connection.accept(Buffer.from(JSON.stringify(numbers(6).map((seq) => turn('CA1', seq)))))
    expect(waiting).toEqual([1, 2, 3, 4, 5, 6])
    const settle = (position: number, refusal?: Refusal) => {
      connection.settle(position, refusal)
      connection.settled()
      return sent.splice(0)
    }
    expect(settle(3)).toEqual([])
    expect(settle(2, new Refusal('not_stored', 'why'))).toEqual([
      { type: 'error', event: 2, code: 'not_stored', message: 'why' },
    ])
    expect(settle(5)).toEqual([])
    expect(settle(1)).toEqual([{ type: 'ack', through: 3 }])
    expect(settle(4)).toEqual([{ type: 'ack', through: 5 }])
    expect(settle(6)).toEqual([{ type: 'ack', through: 6 }])
    connection.closed(1000)
    expect(sent).toEqual([])
  })
})

describe('the window', () => {
  const WINDOW = 8
  const messages: [string, (seqs: number[]) => unknown[]][] = [
    ['single events', (seqs) => seqs.map((seq) => turn('CA1', seq))],
    ['an array', (seqs) => [seqs.map((seq) => turn('CA1', seq))]],
  ]
  test.each(messages)('may_be_filled_but_not_exceeded_with_%s', async (_, messagesOf) => {
    const { ingest, relay } = await relayed({ WINDOW: String(WINDOW) })
    const full = await Wire.open(ingest)
    const over = await Wire.open(ingest)
    relay.holdRequests = true
    for (const message of messagesOf(numbers(WINDOW))) full.send(message)
    for (const message of messagesOf(numbers(WINDOW + 1, 100))) over.send(message)
    expect(await over.untilClosed()).toEqual({ code: 4008, reason: 'more than 8 events unacknowledged' })
    await sleep(50)
    expect(full.closed).toBeUndefined()
    relay.release()
    await full.untilAcked(WINDOW)
    for (const message of messagesOf(numbers(WINDOW, WINDOW))) full.send(message)
    await full.untilAcked(2 * WINDOW)
    const stored = (await seqsOf(redis, 'CA1')) as number[]
    expect(stored.filter((seq) => seq < 100)).toEqual(numbers(2 * WINDOW))
    expect(
      stored.filter((seq) => seq >= 100),
      'what was taken is stored',
    ).toEqual(numbers(WINDOW + 1, 100))
    expect(over.acked).toBe(0)
  })

  test('bounds_what_is_taken_of_one_message', async () => {
    const { ingest, relay } = await relayed({ WINDOW: String(WINDOW) })
    const wire = await Wire.open(ingest, '?call_sid=CA1')
    relay.holdRequests = true
    wire.send(numbers(1000).map((seq) => turn('CA1', seq)))
    expect((await wire.untilClosed()).code).toBe(4008)
    relay.release()
    await until('the disconnect is recorded', async () => (await typesOf(redis, 'CA1')).at(-1) === 'call.disconnected')
    expect(await typesOf(redis, 'CA1')).toEqual([
      'call.connected',
      ...Array(WINDOW + 1).fill('turn'),
      'call.disconnected',
    ])
  })

  test('does_not_count_what_was_refused_and_acked', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url, WINDOW: String(WINDOW) })
    const wire = await Wire.open(ingest)
    wire.send(Array(100).fill(0))
    await wire.untilAcked(100)
    expect(wire.errors).toHaveLength(100)
    await expectServed(wire).catch(() => undefined)
    expect(wire.acked).toBe(101)
  })

  test('is_kept_by_our_client', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url, WINDOW: String(WINDOW) })
    const client = await connect(ingest.url)
    for (const seq of numbers(500)) client.post({ ...turn('CA1', seq) })
    await client.flush()
    expect(client.stats).toMatchObject({ acked: 500, reconnects: 0 })
    await client.close()
    expect(await seqsOf(redis, 'CA1')).toEqual(numbers(500))
  })
})

describe('while Redis is frozen', () => {
  let server: StoreServer
  let own: Store & { client: Redis }
  beforeAll(async () => {
    server = await ownRedis()
  })
  afterAll(() => server.stop())
  beforeEach(async () => {
    own = { client: (await connectRedis(server.url, log)) as Redis, partitions: new Partitions(64) }
    await own.client.flushall()
  })
  afterEach(() => own.client.disconnect())

  test('nothing_is_acked_and_the_queue_is_bounded_by_closing_with_1013', async () => {
    const ingest = await testIngest({ REDIS_URL: server.url, MAX_QUEUE_BYTES: String(1024 * 1024) })
    const wire = await Wire.open(ingest)
    wire.send(turn('CA1', 0))
    await wire.untilAcked(1)
    await server.signal('SIGSTOP')
    onTestFinished(() => server.signal('SIGCONT'))
    let sent = 1
    while (!wire.closed && sent < 1000) {
      wire.send(turn('CA1', sent++, 'x'.repeat(16_000)))
      await sleep(1)
    }
    expect(wire.closed).toMatchObject({ code: 1013, reason: expect.stringContaining('resend what was not acked') })
    expect(wire.acked).toBe(1)
    await server.signal('SIGCONT')
    await until('it takes events again', async () => {
      const next = await Wire.open(ingest)
      next.send(turn('CA2', 0))
      await until('there is an answer', () => next.acked > 0 || next.closed !== undefined)
      return next.acked > 0
    })
    const stored = await seqsOf(own, 'CA1')
    expect(stored, 'what was taken, once and in order').toEqual(numbers(stored.length))
    expect(stored.length, '1 MiB of 16 KB, and the one that was too much').toBeGreaterThan(60)
    expect(stored.length).toBeLessThan(70)
  })
})

describe('a full queue', () => {
  test('does_not_grow_by_bound_connections_that_come_back', async () => {
    const { ingest, relay } = await relayed({ MAX_QUEUE_BYTES: String(1024 * 1024) })
    const queued = () => figure(ingest.url, 'calltape_ingest_queued_events')
    relay.holdRequests = true
    const flood = await Wire.open(ingest)
    flood.send(numbers(80).map((seq) => turn('CA1', seq, 'x'.repeat(12_000))))
    flood.send(numbers(10, 80).map((seq) => turn('CA1', seq, 'x'.repeat(12_000))))
    expect(await flood.untilClosed()).toMatchObject({ code: 1013 })
    const full = await queued()
    for (let i = 0; i < 200; i++) {
      const wire = await Wire.open(ingest, '?call_sid=CA1')
      expect(await wire.untilClosed()).toMatchObject({ code: 1013, reason: expect.stringContaining('reconnect later') })
      expect(wire.messages).toEqual([])
    }
    expect(await queued()).toBe(full)
    relay.release()
    await until('what was taken is stored', async () => (await queued()) === 0)
    expect((await Wire.open(ingest, '?call_sid=CA1')).hello).toBeDefined()
  })
})

describe('a message that is too large', () => {
  const LIMIT = 2048
  const sized = (bytes: number) => {
    const text = (fill: string) => JSON.stringify(turn('CA1', 0, fill))
    return text('x'.repeat(bytes - text('').length))
  }

  test('closes_its_connection_and_no_other', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url, MAX_MESSAGE_BYTES: String(LIMIT) })
    const neighbour = await Wire.open(ingest)
    for (const options of [{}, { fin: false }]) {
      const wire = await Wire.open(ingest, '?call_sid=CA1')
      expect(Buffer.byteLength(sized(LIMIT))).toBe(LIMIT)
      wire.send(sized(LIMIT))
      await wire.untilAcked(1)
      if ('fin' in options) for (const _ of [1, 2, 3]) wire.socket.send('x'.repeat(LIMIT - 1), options)
      else wire.send(sized(LIMIT + 1))
      expect((await wire.untilClosed()).code).toSatisfy((code: number) => [1006, 1009].includes(code))
      await expectServed(neighbour)
    }
    await until('both disconnects are recorded', async () => (await eventsOf(redis, 'CA1')).length === 6)
    const one = ['call.connected', 'turn', 'call.disconnected']
    expect(await typesOf(redis, 'CA1')).toEqual([...one, ...one])
  })
})

describe('a connection that is bound to a call', () => {
  let ingest: Ingest
  beforeEach(async () => {
    ingest = await testIngest({ REDIS_URL: redis.url })
  })
  const lastType = async (sid: string) => (await typesOf(redis, sid)).at(-1)

  test('gives_its_call_to_events_without_one_and_refuses_any_other_by_name', async () => {
    const wire = await Wire.open(ingest, '?call_sid=CA1')
    const { call_sid: _, ...without } = turn('', 0, 'hello')
    wire.send(without)
    wire.send([{ ...without, seq: 1 }, turn('CA2', 2), turn('CA1', 3), { ...without, seq: 4, call_sid: null }])
    await wire.untilAcked(5)
    expect(wire.errors).toEqual([
      {
        type: 'error',
        event: 3,
        code: 'call_sid_mismatch',
        path: 'call_sid',
        message: expect.stringMatching(/bound to call CA1.*"CA2"/),
      },
    ])
    expect(await eventsOf(redis, 'CA1')).toEqual([
      { type: 'call.connected', call_sid: 'CA1', source: 'ingest', connection: expect.any(String) },
      turn('CA1', 0, 'hello'),
      turn('CA1', 1, 'hello'),
      turn('CA1', 3),
      turn('CA1', 4, 'hello'),
    ])
    expect(await eventsOf(redis, 'CA2')).toEqual([])
  })

  test.each([
    ['a close', (wire: Wire) => wire.socket.close(1000), 'closed with 1000'],
    ['a close with a code of its own', (wire: Wire) => wire.socket.close(4321, 'why'), 'closed with 4321'],
    ['a cut', (wire: Wire) => wire.socket.terminate(), 'closed with 1006'],
  ])('records_the_disconnect_after_%s', async (_, close, reason) => {
    const wire = await Wire.open(ingest, '?call_sid=CA1')
    wire.send(turn('CA1', 0))
    await wire.untilAcked(1)
    close(wire)
    await until('the disconnect is recorded', async () => (await lastType('CA1')) === 'call.disconnected')
    const events = await eventsOf(redis, 'CA1')
    const { connection } = events[0] as ConnectionChanged
    expect(connection).toMatch(/^[0-9a-f-]{36}$/)
    expect(events).toEqual([
      { type: 'call.connected', call_sid: 'CA1', source: 'ingest', connection },
      turn('CA1', 0),
      { type: 'call.disconnected', call_sid: 'CA1', source: 'ingest', connection, reason },
    ])
    const [, session] = await Promise.all([
      sleep(20),
      redis.client.hgetall(`${redis.partitions.of('CA1').sessionPrefix}CA1`),
    ])
    expect(session).toMatchObject({ connection: 'disconnected' })
  })

  test('is_presumed_over_after_the_grace_and_no_longer_once_it_resumes', async () => {
    const grace = await testIngest({ REDIS_URL: redis.url, DISCONNECT_GRACE: '15', IDLE_TIMEOUT: '600' })
    const due = async () => Number(await redis.client.zscore(redis.partitions.of('CA1').open, 'CA1')) - Date.now()
    const wire = await Wire.open(grace, '?call_sid=CA1')
    await until('the call is open', async () => (await due()) > 500_000)
    await wire.close()
    await until('the grace runs', async () => (await due()) < 16_000)
    expect(await due()).toBeGreaterThan(10_000)
    await Wire.open(grace, '?call_sid=CA1')
    await until('the call is resumed', async () => (await due()) > 500_000)
  })

  test.each([
    ['alone', { type: 'call.ended', call_sid: 'CA1' }],
    ['without its call', { type: 'call.ended', reason: 'hangup' }],
    ['in an array', [turn('CA1', 0), { type: 'call.ended' }]],
  ])('records_no_disconnect_after_call_ended_%s', async (_, message) => {
    const wire = await Wire.open(ingest, '?call_sid=CA1')
    wire.send(message)
    await wire.untilAcked(Array.isArray(message) ? 2 : 1)
    await wire.close()
    await sleep(100)
    expect(await lastType('CA1')).toBe('call.ended')
  })

  test('records_the_disconnect_after_a_call_ended_that_was_refused', async () => {
    const wire = await Wire.open(ingest, '?call_sid=CA1')
    wire.send({ type: 'call.ended', turn_count: -1 })
    wire.send({ type: 'call.ended', call_sid: 'CA2' })
    await wire.untilAcked(2)
    expect(wire.errors).toHaveLength(2)
    await wire.close()
    await until('the disconnect is recorded', async () => (await lastType('CA1')) === 'call.disconnected')
  })

  test('that_is_not_one_is_refused_and_leaves_nothing_behind', async () => {
    const neighbour = await Wire.open(ingest)
    const bad = [
      '',
      'a b',
      'x'.repeat(129),
      'a/b',
      'ü',
      '€'.repeat(100),
      '😀'.repeat(60),
      // Their end does not fit into a close frame: it must not be cut within a character.
      ...[0, 1, 2, 3].flatMap((n) => ['ü', '€', '😀'].map((c) => 'x'.repeat(n) + c.repeat(28))),
      'a\n',
      '%00',
      '"',
      'a%2Bb%20',
      '\u0000',
    ]
    for (const sid of bad) {
      const wire = await Wire.open(ingest, `?call_sid=${encodeURIComponent(sid)}`)
      const { code, reason } = await wire.untilClosed()
      expect(code, sid).toBe(1008)
      expect(reason).toContain('call_sid wants 1 to 128 characters of A-Z a-z 0-9 _ . : @ + -')
      expect(wire.messages, 'not even a hello').toEqual([])
    }
    await expectServed(neighbour)
    expect((await redis.client.keys('ct:*:call:*')).length, 'only the neighbour’s').toBe(1)
  })

  test('may_have_any_name_that_a_call_may_have', async () => {
    for (const sid of ['a:b@c.d+e-f_G', '__proto__', 'x'.repeat(128)]) {
      const wire = await Wire.open(ingest, `?call_sid=${encodeURIComponent(sid)}`)
      wire.send({ type: 'turn', speaker: 'agent', text: 'x' })
      await wire.untilAcked(1)
      expect((await eventsOf(redis, sid)).at(-1)).toMatchObject({ type: 'turn', call_sid: sid })
    }
  })

  test('a_connection_that_is_not_bound_records_nothing', async () => {
    const wire = await Wire.open(ingest)
    wire.send(turn('CA1', 0))
    await wire.untilAcked(1)
    await wire.close()
    await sleep(50)
    expect(await typesOf(redis, 'CA1')).toEqual(['turn'])
  })
})

describe('stop', () => {
  test('stores_and_acks_what_was_taken_closes_with_1001_and_records_the_disconnects', async () => {
    const { ingest, relay } = await relayed()
    const free = await Wire.open(ingest)
    const bound = await Wire.open(ingest, '?call_sid=CA2')
    const over = await Wire.open(ingest, '?call_sid=CA3')
    over.send({ type: 'call.ended' })
    await over.untilAcked(1)
    relay.holdRequests = true
    free.send(turn('CA1', 0))
    bound.send(turn('CA2', 0))
    await until('the append is on its way', () => relay.holdsRequests)
    await sleep(20)
    const stopped = ingest.stop()
    free.send(turn('CA1', 1)) // too late
    await sleep(50)
    expect([free.closed, bound.closed, free.acked], 'closed before it is stored').toEqual([undefined, undefined, 0])
    await expect(Wire.open(ingest)).rejects.toThrow('ECONNREFUSED')
    relay.release()
    await stopped
    for (const wire of [free, bound, over]) {
      expect(await wire.untilClosed()).toMatchObject({
        code: 1001,
        reason: expect.stringContaining('resend what was not acked'),
      })
      expect(wire.acked).toBe(1)
    }
    expect(await seqsOf(redis, 'CA1'), 'what came too late was not acked, and is not stored').toEqual([0])
    expect(await typesOf(redis, 'CA2')).toEqual(['call.connected', 'turn', 'call.disconnected'])
    expect(await typesOf(redis, 'CA3')).toEqual(['call.connected', 'call.ended'])
  })

  test('ends_although_producers_never_pause_and_keeps_all_that_it_acked', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url })
    const wires = await Promise.all(numbers(4).map(() => Wire.open(ingest)))
    const sent = wires.map(() => 0)
    const pumps = wires.map(async (wire, w) => {
      while (!wire.closed) {
        for (let i = 0; i < 20 && sent[w]! - wire.acked < 1000; i++) wire.send(turn(`CA${w}`, sent[w]!++))
        await new Promise((resolve) => setImmediate(resolve))
      }
    })
    await until('they are at it', () => wires.every((wire) => wire.acked > 500))
    const start = performance.now()
    await ingest.stop()
    expect(performance.now() - start).toBeLessThan(3000)
    await Promise.all(pumps)
    for (const [w, wire] of wires.entries()) {
      expect(wire.closed?.code).toBe(1001)
      const stored = await seqsOf(redis, `CA${w}`)
      expect(stored).toEqual(numbers(stored.length))
      expect(stored.length, 'acked means stored').toBeGreaterThanOrEqual(wire.acked)
      expect(wire.acked, 'and all that was stored was acked').toBe(stored.length)
    }
  })

  test('loses_and_doubles_nothing_for_a_client_that_goes_on_with_the_next_process', async () => {
    // On a port of its own choice it could not start while the connections of the one before are still closing.
    const port = String(await getPort({ host: '127.0.0.1' }))
    let ingest = await testIngest({ REDIS_URL: redis.url, INGEST_PORT: port })
    const client = await connect(ingest.url, { initialBackoffMs: 10, maxBackoffMs: 20 })
    onTestFinished(() => client.terminate())
    const TURNS = 3000
    for (const seq of numbers(TURNS)) {
      if (seq % 1000 === 500) {
        const next = ingest.stop().then(() => testIngest({ REDIS_URL: redis.url, INGEST_PORT: port }))
        for (const more of numbers(20)) client.post({ ...turn('CA1', TURNS + seq + more) })
        ingest = await next
      }
      await client.ready()
      client.post({ ...turn('CA1', seq) })
      if (seq % 100 === 0) await sleep(1)
    }
    await client.flush()
    expect(client.stats).toMatchObject({ acked: TURNS + 60, refused: 0, unacked: 0 })
    const stored = (await seqsOf(redis, 'CA1')) as number[]
    expect(new Set(stored).size, 'nothing is lost').toBe(TURNS + 60)
    expect(
      stored.filter((seq) => seq < TURNS),
      'what was acked is not sent again',
    ).toHaveLength(TURNS)
    await client.close()
  })

  test('leaves_no_connection_open', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url })
    const { port, hostname } = new URL(ingest.url)
    const idle = connectSocket(Number(port), hostname)
    idle.write('GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n')
    await once(idle, 'data')
    const deaf = await rawStream(ingest) // never answers the close
    const closed = Promise.all([once(idle.resume(), 'close'), once(deaf.resume(), 'close')])
    await ingest.stop()
    await Promise.race([closed, sleep(3000).then(() => expect.unreachable('a connection is still open'))])
  })
})

/** A client's frame, masked as it must be. */
function frame(opcode: number, payload: Buffer, fin = true): Buffer {
  const head = Buffer.alloc(payload.length < 126 ? 2 : payload.length < 65_536 ? 4 : 10)
  head[0] = (fin ? 0x80 : 0) | opcode
  if (head.length === 2) head[1] = 0x80 | payload.length
  else if (head.length === 4) head.writeUInt16BE(payload.length, head.fill(0x80 | 126, 1, 2) && 2)
  else head.writeBigUInt64BE(BigInt(payload.length), head.fill(0x80 | 127, 1, 2) && 2)
  return Buffer.concat([head, Buffer.alloc(4), payload]) // a mask of zeros changes nothing
}

/** A TCP connection that has become a WebSocket. */
async function rawStream(ingest: Ingest, query = ''): Promise<Socket> {
  const { port, hostname } = new URL(ingest.url)
  const socket = connectSocket(Number(port), hostname)
  onTestFinished(() => void socket.destroy())
  socket.on('error', () => undefined)
  socket.write(
    `GET /v1/stream${query} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n` +
      'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n',
  )
  const [answer] = (await once(socket, 'data')) as [Buffer]
  if (!answer.toString('latin1').startsWith('HTTP/1.1 101 ')) throw new Error(answer.toString('latin1'))
  return socket
}

describe('a client that misbehaves', () => {
  let ingest: Ingest
  let neighbour: Wire
  beforeEach(async () => {
    ingest = await testIngest({ REDIS_URL: redis.url })
    neighbour = await Wire.open(ingest)
  })
  afterEach(async () => {
    await expectServed(neighbour)
  })

  test('and_reads_nothing_is_cut_before_its_answers_fill_the_memory', async () => {
    const socket = await rawStream(ingest, '?call_sid=CA1')
    socket.pause()
    const flood = frame(1, Buffer.from(`[${'0,'.repeat(400_000)}0]`))
    const before = process.memoryUsage().rss
    for (let i = 0; i < 10; i++) socket.write(flood) // each of them wants 35 MB of errors
    await until('it is cut', async () => (await typesOf(redis, 'CA1')).includes('call.disconnected'))
    expect(process.memoryUsage().rss - before).toBeLessThan(300_000_000)
  })

  test('and_sends_text_that_is_not_UTF_8_loses_its_connection', async () => {
    for (const bytes of [[0xff], [0xc3], [0xed, 0xa0, 0x80], [0xf8, 0x88, 0x80, 0x80, 0x80]]) {
      const socket = await rawStream(ingest)
      socket.write(frame(1, Buffer.from([0x22, ...bytes, 0x22])))
      await once(socket.resume(), 'close')
    }
  })

  test.each<[string, Buffer]>([
    ['a reserved opcode', frame(3, Buffer.from('5'))],
    ['reserved bits', Buffer.concat([Buffer.from([0xf1]), frame(1, Buffer.from('5')).subarray(1)])],
    ['a fragmented control frame', frame(9, Buffer.from('x'), false)],
    ['a control frame that is too long', frame(9, Buffer.alloc(126))],
    ['a continuation of nothing', frame(0, Buffer.from('5'))],
    ['a length of 2^63', Buffer.from([0x81, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])],
    ['a close frame of one byte', frame(8, Buffer.from([3]))],
    ['a close frame with a forbidden code', frame(8, Buffer.from([3, 0xed]))],
    ['HTTP', Buffer.from('GET / HTTP/1.1\r\nHost: x\r\n\r\n')],
  ])('and_sends_%s_is_cut_off', async (_, bytes) => {
    const socket = await rawStream(ingest, '?call_sid=CA1')
    socket.write(bytes)
    await Promise.race([
      once(socket.resume(), 'close'),
      sleep(2000).then(() => expect.unreachable('it is still connected')),
    ])
    await until('its disconnect is recorded', async () => (await typesOf(redis, 'CA1')).includes('call.disconnected'))
  })

  test('and_sends_a_message_in_pieces_is_understood', async () => {
    const socket = await rawStream(ingest)
    const text = Buffer.from(JSON.stringify(turn('CA1', 0, 'in pieces, größer 😀')))
    const pieces = numbers(text.length).map((i) =>
      frame(i === 0 ? 1 : 0, text.subarray(i, i + 1), i === text.length - 1),
    )
    const bytes = Buffer.concat(
      pieces.flatMap((piece, i) => (i % 10 === 5 ? [frame(9, Buffer.from('ping')), piece] : [piece])),
    )
    for (let i = 0; i < bytes.length; i += 97) {
      socket.write(bytes.subarray(i, i + 97))
      await sleep(1)
    }
    await until('it is stored', async () => (await eventsOf(redis, 'CA1')).length === 1)
    expect(await eventsOf(redis, 'CA1')).toEqual([turn('CA1', 0, 'in pieces, größer 😀')])
  })

  test('and_comes_and_goes_leaves_nothing_behind', async () => {
    for (let round = 0; round < 5; round++) {
      await Promise.all(
        numbers(40).map(async (n) => {
          const wire = await Wire.open(ingest, n % 2 ? `?call_sid=CA${n}` : '')
          wire.send(turn(`CA${n}`, round))
          if (n % 3) wire.socket.terminate()
          else await wire.close()
        }),
      )
    }
    const gauge = async (name: string) => {
      const text = await (await fetch(`${ingest.url}/metrics`)).text()
      return Number(new RegExp(`^${name} (\\S+)$`, 'm').exec(text)?.[1])
    }
    await until('only the neighbour is connected', async () => (await gauge('calltape_ingest_connections')) === 1)
    expect(await gauge('calltape_ingest_queued_events')).toBe(0)
    expect(await gauge('calltape_ingest_queued_bytes')).toBe(0)
  })

  /** Park and Miller's generator: the same mutations in every run. */
  let seed = 77_001
  const random = (below: number) => {
    seed = (seed * 48_271) % 2_147_483_647
    return seed % below
  }
  const mutate = (given: Buffer): Buffer => {
    const bytes = Buffer.from(given)
    const at = random(bytes.length)
    const kind = random(4)
    if (kind === 0) bytes[at] = random(256)
    else if (kind === 1) return Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + 1 + random(8))])
    else if (kind === 2) return Buffer.concat([bytes.subarray(0, at), bytes.subarray(random(at + 1))])
    else return Buffer.concat([bytes.subarray(0, at), Buffer.from('"{}[],:\\0n'[random(10)]!), bytes.subarray(at)])
    return bytes
  }
  const events = [
    turn('CA1', 0, 'hello'),
    { type: 'call.status', call_sid: 'CA1', status: 'in_progress', extra: { x: null } },
    { type: 'call.data', call_sid: 'CA1', data: { a: [1, 2] }, objections: ['price'] },
  ]

  test('with_thousands_of_mutated_messages_gets_a_number_for_each_event_and_an_ack_for_all', async () => {
    const wire = await Wire.open(ingest)
    let expected = 0
    for (let i = 0; i < 4000; i++) {
      const given = i % 2 ? JSON.stringify(events) : JSON.stringify(events[i % 3])
      const text = mutate(mutate(Buffer.from(given))).toString() // valid UTF-8 again
      wire.send(text)
      try {
        const parsed = JSON.parse(text) as unknown
        expected += Array.isArray(parsed) ? parsed.length : 1
      } catch {
        expected++
      }
      while (expected - wire.acked > 1000 && !wire.closed) await sleep(1)
    }
    await wire.untilAcked(expected)
    expect(wire.acked).toBe(expected)
    const refused = wire.errors.map(({ event }) => event as number)
    expect(refused.length).toBeGreaterThan(1000)
    expect(new Set(refused).size, 'one error each').toBe(refused.length)
    const keys = (await redis.client.keys('ct:*:call:*')).filter((key) => !key.endsWith(':neighbour'))
    const lengths = await Promise.all(keys.map((key) => redis.client.xlen(key)))
    expect(lengths.reduce((sum, length) => sum + length, 0)).toBe(expected - refused.length)
  })

  test('with_thousands_of_mutated_frames_harms_nobody', async () => {
    const valid = [
      frame(1, Buffer.from(JSON.stringify(events[0]))),
      frame(1, Buffer.from(JSON.stringify(events))),
      Buffer.concat([
        frame(1, Buffer.from('{"type":'), false),
        frame(9, Buffer.from('x')),
        frame(0, Buffer.from('1}')),
      ]),
      frame(2, randomBytes(300)),
      frame(8, Buffer.from([3, 0xe8])),
      frame(1, Buffer.alloc(70_000, 0x20)),
    ]
    let survived = 0
    const attack = async () => {
      for (let i = 0; i < 50; i++) {
        const socket = await rawStream(ingest, random(2) ? '?call_sid=CA1' : '')
        let closed = false
        socket.resume().on('close', () => {
          closed = true
        })
        for (let n = 0; n < 3; n++) socket.write(mutate(valid[random(valid.length)]!))
        await sleep(5)
        if (!closed) survived++
        if (random(2)) socket.destroy()
        else socket.resetAndDestroy()
      }
    }
    await Promise.all([...numbers(20).map(attack), expectServed(neighbour)])
    expect(survived, 'not all of them are nonsense').toBeGreaterThan(50)
    expect(survived).toBeLessThan(990)
  })
})
