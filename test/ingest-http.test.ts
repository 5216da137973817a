import { once } from 'node:events'
import { Agent, request as httpRequest, type IncomingHttpHeaders } from 'node:http'
import { connect, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import type { Redis } from 'ioredis'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, onTestFinished, test } from 'vitest'
import type { Ingest } from '../ingest/ingest.js'
import { Partitions } from '../shared/keys.js'
import { connectRedis } from '../shared/redis.js'
import { testIngest, Wire } from './support/ingest.js'
import { figure } from './support/metrics.js'
import { Relay } from './support/relay.js'
import { freshRedis, log, type RedisDatabase, until } from './support/stores.js'
import { eventsOf, ownRedis, type Store, type StoreServer, turn } from './support/streams.js'

let redis: RedisDatabase
beforeEach(async () => {
  redis = await freshRedis()
})
afterEach(() => redis.drop())

type Json = Record<string, unknown>

interface Reply {
  status: number
  headers: Headers
  body: Json
}

/** Every answer of these routes is JSON, whatever it says. */
async function ask(ingest: Ingest, path: string, init: RequestInit = {}): Promise<Reply> {
  const response = await fetch(ingest.url + path, init)
  expect(response.headers.get('content-type')).toBe('application/json; charset=utf-8')
  return { status: response.status, headers: response.headers, body: (await response.json()) as Json }
}

function post(ingest: Ingest, body: string | Uint8Array, type = 'application/json', headers = {}): Promise<Reply> {
  return ask(ingest, '/v1/events', { method: 'POST', body, headers: { 'Content-Type': type, ...headers } })
}

const codeOf = (reply: Pick<Reply, 'body'>) => (reply.body.error as Json | undefined)?.code
const messageOf = (reply: Pick<Reply, 'body'>) => (reply.body.error as Json | undefined)?.message

/** @returns all that the server sends until it closes or is silent: for `firstMs` at first, then for `quietMs` */
async function raw(ingest: Ingest, text: string | Buffer, firstMs = 5000, quietMs = 50): Promise<string> {
  const { hostname, port } = new URL(ingest.url)
  const socket = connect(Number(port), hostname)
  let said = ''
  socket.on('data', (data) => {
    said += data.toString('latin1')
    socket.setTimeout(quietMs)
  })
  socket.on('error', () => undefined)
  socket.setTimeout(firstMs).on('timeout', () => socket.destroy())
  socket.write(text)
  await once(socket, 'close')
  return said
}

/** All events of all calls. */
async function countStored({ client }: { client: Redis }): Promise<number> {
  const keys = await client.keys('ct:*:call:*')
  return (await Promise.all(keys.map((key) => client.xlen(key)))).reduce((sum, length) => sum + length, 0)
}

const NDJSON = 'application/x-ndjson'

describe('POST /v1/events', () => {
  let ingest: Ingest
  beforeEach(async () => {
    ingest = await testIngest({ REDIS_URL: redis.url })
  })

  test('one_object_an_array_and_NDJSON_are_in_Redis_when_the_answer_comes', async () => {
    const bodies = [
      [JSON.stringify(turn('one', 0)), 'application/json', 1],
      [JSON.stringify([turn('one', 1), turn('one', 2), turn('two', 0)]), 'Application/JSON; charset=utf-8', 3],
      [`${JSON.stringify(turn('one', 3))}\n${JSON.stringify(turn('two', 1))}`, NDJSON, 2],
      [
        `\n${JSON.stringify(turn('one', 4))}\r\n \r\n${JSON.stringify(turn('two', 2))}\n\n`,
        `${NDJSON};charset=utf-8`,
        2,
      ],
    ] as const
    let stored = 0
    for (const [body, type, count] of bodies) {
      const reply = await post(ingest, body, type)
      expect(reply).toMatchObject({ status: 200, body: { accepted: count, rejected: [] } })
      stored += count
      expect(await countStored(redis)).toBe(stored)
    }
    expect(await eventsOf(redis, 'one')).toEqual([0, 1, 2, 3, 4].map((seq) => turn('one', seq)))
    expect(await eventsOf(redis, 'two')).toEqual([0, 1, 2].map((seq) => turn('two', seq)))
  })

  test('every_event_of_a_batch_is_judged_by_itself', async () => {
    const given = [
      turn('CA1', 0),
      5,
      { ...turn('CA1', 1), text: 7 },
      turn('CA1', 2),
      { ...turn('CA1', 3), type: 'shout' },
      null,
      { type: 'turn', call_sid: 'CA1', text: 'x' },
      [],
      { ...turn('CA1', 4), call_sid: 'no good' },
      { type: 'call.disconnected', call_sid: 'CA1' },
      turn('CA1', 5),
    ]
    const reply = await post(ingest, JSON.stringify(given))
    expect(reply.status).toBe(200)
    expect(reply.body).toEqual({
      accepted: 3,
      rejected: [
        { index: 1, code: 'not_an_object', message: expect.stringContaining('got 5') },
        {
          index: 2,
          code: 'invalid_field',
          path: 'text',
          message: expect.stringMatching(/^text wants a string.*got 7/),
        },
        { index: 4, code: 'unknown_type', path: 'type', message: expect.stringContaining('"shout"') },
        { index: 5, code: 'not_an_object', message: expect.stringContaining('null') },
        { index: 6, code: 'missing_field', path: 'speaker', message: expect.stringMatching(/^speaker is required/) },
        { index: 7, code: 'not_an_object', message: expect.stringContaining('an array') },
        { index: 8, code: 'invalid_field', path: 'call_sid', message: expect.stringContaining('"no good"') },
        { index: 9, code: 'unknown_type', path: 'type', message: expect.any(String) },
      ],
    })
    expect(await eventsOf(redis, 'CA1')).toEqual([turn('CA1', 0), turn('CA1', 2), turn('CA1', 5)])
  })

  test('what_Redis_refuses_is_named_among_the_good_neighbours', async () => {
    await redis.client.set(`${redis.partitions.of('CA2').streamPrefix}CA2`, 'somebody else’s')
    const reply = await post(ingest, JSON.stringify([turn('CA1', 0), turn('CA2', 0), 'x', turn('CA1', 1)]))
    expect(reply.body).toMatchObject({
      accepted: 2,
      rejected: [
        { index: 1, code: 'not_stored', message: expect.stringContaining('WRONGTYPE') },
        { index: 2, code: 'not_an_object' },
      ],
    })
    expect(await eventsOf(redis, 'CA1')).toEqual([turn('CA1', 0), turn('CA1', 1)])
  })

  test('NDJSON_with_a_broken_line_refuses_only_that_line', async () => {
    const lines = [turn('CA1', 0), turn('CA1', 1), turn('CA1', 2)].map((event) => JSON.stringify(event))
    lines.splice(1, 0, '{"type":"turn",')
    lines.splice(3, 0, '', 'null', ']')
    const reply = await post(ingest, lines.join('\n'), NDJSON)
    expect(reply.body).toEqual({
      accepted: 3,
      rejected: [
        { index: 1, code: 'invalid_json', message: expect.any(String) },
        { index: 3, code: 'not_an_object', message: expect.any(String) },
        { index: 4, code: 'invalid_json', message: expect.any(String) },
      ],
    })
    expect(await eventsOf(redis, 'CA1')).toEqual([0, 1, 2].map((seq) => turn('CA1', seq)))
  })

  test('a_body_that_is_not_JSON_is_400_as_a_whole', async () => {
    const good = JSON.stringify(turn('CA1', 0))
    for (const body of [
      '',
      ' \n',
      '{',
      `[${good},`,
      `${good}\n${good}`,
      "{'a':1}",
      'NaN',
      '[1,]',
      '"\n"',
      '\ufeff{}',
    ]) {
      const reply = await post(ingest, body)
      expect([reply.status, codeOf(reply)], body).toEqual([400, 'invalid_json'])
      expect(messageOf(reply)).toMatch(/JSON|token/)
    }
    expect(await countStored(redis)).toBe(0)
  })

  test('bytes_that_are_not_UTF_8_are_400_and_nothing_is_stored_of_them', async () => {
    const json = Buffer.from(JSON.stringify([turn('CA1', 0), turn('CA1', 1, 'naïve')]))
    const latin1 = Buffer.from(json.toString(), 'latin1')
    const truncated = Buffer.concat([json.subarray(0, -2), Buffer.from([0xf0, 0x9f, 0x98]), json.subarray(-2)])
    const surrogate = Buffer.from([...Buffer.from('["'), 0xed, 0xa0, 0x80, ...Buffer.from('"]')])
    for (const body of [latin1, truncated, surrogate, Buffer.from([0xff, 0xfe])]) {
      for (const type of ['application/json', NDJSON]) {
        const reply = await post(ingest, body, type)
        expect([reply.status, codeOf(reply)]).toEqual([400, 'invalid_utf8'])
      }
    }
    expect(await countStored(redis)).toBe(0)
  })

  test('nothing_and_things_that_are_no_events_are_answered_not_broken', async () => {
    expect((await post(ingest, '[]')).body).toEqual({ accepted: 0, rejected: [] })
    expect((await post(ingest, '', NDJSON)).body).toEqual({ accepted: 0, rejected: [] })
    expect((await post(ingest, '\n\r\n  \n', NDJSON)).body).toEqual({ accepted: 0, rejected: [] })
    for (const body of ['5', 'null', 'true', '"turn"', '1e999', '{}', '[[]]']) {
      const reply = await post(ingest, body)
      expect(reply, body).toMatchObject({ status: 200, body: { accepted: 0, rejected: [{ index: 0 }] } })
    }
  })

  test('another_content_type_is_415_and_says_what_it_wants', async () => {
    const body = JSON.stringify(turn('CA1', 0))
    for (const type of ['text/plain', 'application/x-www-form-urlencoded', 'application/jsonx', 'json', ' ', ';']) {
      const reply = await post(ingest, body, type)
      expect([reply.status, codeOf(reply)], type).toEqual([415, 'unsupported_media_type'])
      expect(messageOf(reply)).toContain(`wants application/json or ${NDJSON} or application/cloudevents+json`)
      expect(messageOf(reply)).toContain(`; got ${type.trim() || 'none'}`)
    }
    const none = await raw(ingest, `POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}`)
    expect(none).toMatch(/^HTTP\/1\.1 415 [\s\S]*got none/)
    expect(await countStored(redis)).toBe(0)
  })

  test('deep_JSON_is_refused_and_harms_no_neighbour', async () => {
    const deep = '['.repeat(100_000) + ']'.repeat(100_000)
    const event = (fields: string) => `{"call_sid":"CA1",${fields}}`
    const bodies = [
      deep,
      event(`"type":"turn","speaker":"agent","text":"x","meta":${deep}`),
      event(`"type":"turn","speaker":"agent","text":"x","extra":${deep}`),
      event(`"type":"turn","speaker":"agent","text":${deep}`),
      event(`"type":${deep}`),
      event(`"type":"call.status","status":${deep}`),
      event(`"type":"call.started","direction":${deep}`),
      event(`"type":"call.data","data":{"a":${deep}}`),
    ]
    for (const body of bodies) {
      const reply = await post(ingest, `[${JSON.stringify(turn('CA1', 0))},${body}]`)
      expect(reply, body.slice(0, 80)).toMatchObject({ status: 200, body: { accepted: 1, rejected: [{ index: 1 }] } })
    }
    expect(await countStored(redis)).toBe(bodies.length)
  })

  test('__proto___and_constructor_are_data_and_pollute_nothing', async () => {
    const body =
      '{"type":"turn","call_sid":"CA1","speaker":"agent","text":"x",' +
      '"__proto__":{"polluted":1},"constructor":{"prototype":{"polluted":1}},"toString":"x"}'
    expect((await post(ingest, body)).body).toEqual({ accepted: 1, rejected: [] })
    const [stored] = await redis.client.xrange(`${redis.partitions.of('CA1').streamPrefix}CA1`, '-', '+')
    expect(stored?.[1]).toEqual([
      'e',
      '{"type":"turn","call_sid":"CA1","speaker":"agent","text":"x","meta":' +
        '{"__proto__":{"polluted":1},"constructor":{"prototype":{"polluted":1}},"toString":"x"}}',
    ])
    expect(({} as Json).polluted).toBeUndefined()
  })

  test('huge_numbers_are_data_in_meta_and_refused_elsewhere', async () => {
    const fields = ['"meta":{"n":123456789012345680000,"m":1e308}', '"seq":1e999', '"ts":1e999', '"confidence":1e-400']
    const body = fields.map((field) => `{"type":"turn","call_sid":"CA1","speaker":"agent","text":"x",${field}}`)
    const reply = await post(ingest, `[${body.join()}]`)
    expect(reply.body).toMatchObject({
      accepted: 2,
      rejected: [
        { index: 1, path: 'seq' },
        { index: 2, path: 'ts' },
      ],
    })
    expect(await eventsOf(redis, 'CA1')).toMatchObject([
      { meta: { n: 123456789012345680000, m: 1e308 } },
      { confidence: 0 },
    ])
  })

  test('a_body_of_nothing_but_bad_events_is_refused_quickly_however_many_they_are', async () => {
    const many = 8_000_000
    for (const [body, type] of [
      [`[${'0,'.repeat(many - 1)}0]`, 'application/json'],
      ['0\n'.repeat(many), NDJSON],
    ] as const) {
      const start = performance.now()
      const reply = await post(ingest, body, type)
      expect([reply.status, codeOf(reply)]).toEqual([413, 'too_many_events'])
      expect(messageOf(reply)).toMatch(/at most \d+ events/)
      expect(performance.now() - start).toBeLessThan(5000)
    }
    expect((await post(ingest, JSON.stringify(turn('CA1', 0)))).body).toEqual({ accepted: 1, rejected: [] })
  })

  test('as_many_lines_as_are_allowed_are_read_to_the_end_and_more_are_refused_not_cut_off', async () => {
    const last = JSON.stringify(turn('CA1', 0))
    const allowed = await post(ingest, `${'0\n'.repeat(99_999)}${last}\n`, NDJSON)
    expect(allowed).toMatchObject({ status: 200, body: { accepted: 1 } })
    expect(allowed.body.rejected).toHaveLength(99_999)
    for (const body of ['0\n'.repeat(100_000) + last, '\n'.repeat(150_000) + last]) {
      expect(codeOf(await post(ingest, body, NDJSON))).toBe('too_many_events')
    }
    expect(await eventsOf(redis, 'CA1')).toHaveLength(1)
  })

  test('concurrent_requests_get_their_own_answers', async () => {
    const replies = await Promise.all(
      Array.from({ length: 200 }, (_, n) => post(ingest, JSON.stringify([turn(`CA${n}`, n), ...Array(n % 7).fill(n)]))),
    )
    replies.forEach(({ body }, n) => {
      const rejected = Array.from({ length: n % 7 }, (_, i) => expect.objectContaining({ index: i + 1 }))
      expect(body).toEqual({ accepted: 1, rejected })
    })
    expect(await countStored(redis)).toBe(200)
  })
})

describe('a body that is too large', () => {
  const LIMIT = 1024
  const bodyOf = (bytes: number) => JSON.stringify(turn('CA1', 0, '')).replace('""', `"${'x'.repeat(bytes - EMPTY)}"`)
  const EMPTY = Buffer.byteLength(JSON.stringify(turn('CA1', 0, '')))

  test('is_413_and_one_at_the_limit_is_taken', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url, MAX_BODY_BYTES: String(LIMIT) })
    expect(Buffer.byteLength(bodyOf(LIMIT))).toBe(LIMIT)
    expect((await post(ingest, bodyOf(LIMIT))).body).toEqual({ accepted: 1, rejected: [] })
    const reply = await post(ingest, bodyOf(LIMIT + 1))
    expect([reply.status, codeOf(reply)]).toEqual([413, 'too_large'])
    expect(messageOf(reply)).toContain('1024 bytes')
    expect(await countStored(redis)).toBe(1)
  })

  test('is_refused_by_its_announced_length_before_it_is_sent', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url })
    const said = await raw(
      ingest,
      'POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 16777217\r\n\r\n',
    )
    expect(said).toMatch(/^HTTP\/1\.1 413 [\s\S]*"too_large"/)
  })

  test('is_refused_when_it_grows_over_the_limit_in_chunks', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url, MAX_BODY_BYTES: String(LIMIT) })
    const chunk = `200\r\n${' '.repeat(0x200)}\r\n`
    const head =
      'POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n'
    expect(await raw(ingest, `${head}${chunk}${chunk}0\r\n\r\n`), 'at the limit: read, and found to be empty').toMatch(
      /^HTTP\/1\.1 400 /,
    )
    expect(await raw(ingest, `${head}${chunk}${chunk}1\r\n \r\n`), 'refused before its end').toMatch(/^HTTP\/1\.1 413 /)
    expect(await raw(ingest, head + chunk.repeat(200)), 'refused once').toMatch(/^HTTP\/1\.1 413 ((?!HTTP\/)[\s\S])*$/)
  })

  test.each([
    ['with its length', {}],
    ['in chunks', { 'Transfer-Encoding': 'chunked' }],
  ])('and_is_sent_%s_gets_its_413_and_the_client_goes_on', async (_, headers) => {
    const ingest = await testIngest({ REDIS_URL: redis.url, MAX_BODY_BYTES: String(LIMIT) })
    const agent = new Agent({ keepAlive: true, maxSockets: 1 })
    onTestFinished(() => agent.destroy())
    for (let i = 0; i < 20; i++) {
      const refused = await nodePost(ingest, 'x'.repeat(8_000_000), agent, headers)
      expect(refused.status).toBe(413)
      const taken = await nodePost(ingest, JSON.stringify(turn('CA1', i)), agent)
      expect(taken).toMatchObject({ status: 200, body: { accepted: 1 } })
    }
    expect(await countStored(redis)).toBe(20)
  })
})

/** As a client without retries would: a connection that breaks rejects. */
async function nodePost(ingest: Ingest, body: string | Buffer, agent?: Agent, headers: Record<string, string> = {}) {
  const { status, text } = await nodeRequest(ingest, 'POST', '/v1/events', body, agent, {
    'Content-Type': 'application/json',
    ...(headers['Transfer-Encoding'] ? {} : { 'Content-Length': String(Buffer.byteLength(body)) }),
    ...headers,
  })
  return { status, body: JSON.parse(text) as Json }
}

function nodeRequest(
  ingest: Ingest,
  method: string,
  path: string,
  body: string | Buffer = '',
  agent?: Agent,
  headers: Record<string, string> = {},
): Promise<{ status: number; headers: IncomingHttpHeaders; text: string }> {
  return new Promise((resolve, reject) => {
    const request = httpRequest(ingest.url + path, { method, headers, ...(agent ? { agent } : {}) }, (response) => {
      let text = ''
      response.on('data', (data) => {
        text += data.toString()
      })
      response.on('end', () => resolve({ status: response.statusCode ?? 0, headers: response.headers, text }))
      response.on('error', reject)
    })
    request.on('error', reject)
    request.end(body)
  })
}

describe('a client that goes away', () => {
  test('in_the_middle_of_its_body_harms_nobody_and_leaves_no_memory_behind', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url })
    const { hostname, port } = new URL(ingest.url)
    setFlagsFromString('--expose-gc')
    const gc = runInNewContext('gc') as () => void
    let before = Number.POSITIVE_INFINITY
    const held = () => process.memoryUsage().arrayBuffers - before
    await until('what other tests left is gone', () => {
      gc()
      const now = process.memoryUsage().arrayBuffers
      const isStable = now === before
      before = now
      return isStable
    })
    const head = 'POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'
    for (const length of ['Content-Length: 16000000\r\n\r\n', 'Transfer-Encoding: chunked\r\n\r\nF42400\r\n']) {
      const sockets: Socket[] = []
      for (let i = 0; i < 10; i++) {
        const socket = connect(Number(port), hostname)
        socket.on('error', () => undefined)
        sockets.push(socket)
        await new Promise<void>((resolve) =>
          socket.write(`${head}${length}["${'x'.repeat(8_000_000)}`, () => resolve()),
        )
      }
      expect((await post(ingest, JSON.stringify(turn('CA1', 0)))).body, 'meanwhile').toMatchObject({ accepted: 1 })
      await until('the bodies are held', () => held() > 60_000_000)
      for (const [i, socket] of sockets.entries()) i % 2 ? socket.destroy() : socket.resetAndDestroy()
      await until('their memory is free', () => {
        gc()
        return held() < 10_000_000
      })
    }
    expect((await post(ingest, JSON.stringify(turn('CA1', 1)))).body, 'afterwards').toMatchObject({ accepted: 1 })
    expect(await countStored(redis)).toBe(3)
  })

  test('before_its_answer_has_its_events_stored', async () => {
    const relay = await Relay.start(redis.url)
    onTestFinished(() => relay.stop())
    const ingest = await testIngest({ REDIS_URL: relay.url })
    await post(ingest, JSON.stringify(turn('CA1', 0)))
    relay.holdReplies = true
    const abort = new AbortController()
    const asked = post(ingest, JSON.stringify(turn('CA1', 1)), 'application/json', {}).catch(() => undefined)
    const aborted = fetch(`${ingest.url}/v1/events`, {
      method: 'POST',
      body: JSON.stringify(turn('CA1', 2)),
      headers: { 'Content-Type': 'application/json' },
      signal: abort.signal,
    }).catch(() => undefined)
    await until('Redis has answered', () => relay.holdsReplies)
    await sleep(50)
    abort.abort()
    await aborted
    await sleep(50)
    relay.release()
    expect((await asked)?.body).toMatchObject({ accepted: 1 })
    await until('all is stored', async () => (await countStored(redis)) === 3)
  })
})

describe('tokens', () => {
  const TOKENS = ['first-token', 'second.token_~+/=', 'dritter-Schlüssel'.normalize()].slice(0, 2)
  let ingest: Ingest
  beforeEach(async () => {
    ingest = await testIngest({ REDIS_URL: redis.url, INGEST_HOST: '127.0.0.1', INGEST_TOKENS: TOKENS.join(', ') })
  })

  const routes = [
    ['POST', '/v1/events'],
    ['GET', '/v1/calls'],
    ['GET', '/v1/calls?state=ended'],
    ['GET', '/v1/calls/CA1'],
    ['GET', '/v1/stream'],
  ] as const
  const wrong = [
    undefined,
    '',
    'Bearer',
    'Bearer ',
    'Bearer wrong',
    'Bearer first-toke',
    'Bearer first-token2',
    'Bearer FIRST-TOKEN',
    'Bearer first-token second.token_~+/=',
    'Bearer first-token,second.token_~+/=',
    'first-token',
    'Basic first-token',
    `Basic ${Buffer.from('x:first-token').toString('base64')}`,
    'Bearer undefined',
    'Bearer null',
  ]
  const init = (method: string, authorization?: string): RequestInit => ({
    method,
    headers: { 'Content-Type': 'application/json', ...(authorization === undefined ? {} : { authorization }) },
    ...(method === 'POST' ? { body: JSON.stringify(turn('CA1', 0)) } : {}),
  })

  test.each(routes)('%s_%s_is_401_without_one_and_with_a_wrong_one', async (method, path) => {
    for (const authorization of wrong) {
      const reply = await ask(ingest, path, init(method, authorization))
      expect([reply.status, codeOf(reply)], authorization ?? 'none').toEqual([401, 'unauthorized'])
      expect(reply.headers.get('www-authenticate')).toBe('Bearer')
      expect(messageOf(reply)).toContain('Authorization: Bearer')
    }
    expect(await countStored(redis)).toBe(0)
  })

  test('a_WebSocket_is_not_upgraded_without_one_or_with_a_wrong_one', async () => {
    for (const authorization of wrong) {
      const headers = authorization === undefined ? {} : { authorization }
      await expect(Wire.open(ingest, '?call_sid=CA1', { headers }), authorization ?? 'none').rejects.toThrow('401')
    }
    expect(await countStored(redis)).toBe(0)
  })

  test('any_of_several_works_everywhere', async () => {
    for (const [i, token] of TOKENS.entries()) {
      for (const authorization of [`Bearer ${token}`, `bearer ${token}`, `BEARER   ${token}`]) {
        const statuses = []
        for (const [method, path] of routes)
          statuses.push((await ask(ingest, path, init(method, authorization))).status)
        expect(statuses).toEqual([200, 200, 400, 200, 426])
      }
      const wire = await Wire.open(ingest, '', { headers: { authorization: `Bearer ${token}` } })
      wire.send(turn('CA2', i))
      await wire.untilAcked(1)
    }
    expect(await eventsOf(redis, 'CA2')).toHaveLength(TOKENS.length)
  })

  test('metrics_and_probes_need_none', async () => {
    const metrics = await fetch(`${ingest.url}/metrics`)
    expect(metrics.status).toBe(200)
    expect(metrics.headers.get('content-type')).toMatch(/^text\/plain/)
    expect(await metrics.text()).toContain('calltape_ingest_events_accepted_total 0')
    expect(await ask(ingest, '/healthz')).toMatchObject({ status: 200, body: { status: 'ok' } })
    expect(await ask(ingest, '/readyz')).toMatchObject({ status: 200, body: { status: 'ready' } })
  })

  test('a_large_body_without_one_is_refused_before_it_is_sent', async () => {
    const head =
      'POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10000000\r\n\r\n'
    expect(await raw(ingest, head)).toMatch(/^HTTP\/1\.1 401 /)
  })
})

describe('routes', () => {
  let ingest: Ingest
  beforeEach(async () => {
    ingest = await testIngest({ REDIS_URL: redis.url })
  })

  test('an_unknown_one_is_404_and_is_named', async () => {
    for (const path of [
      '/',
      '/v1',
      '/v1/event',
      '/v1/events/',
      '/v1/streams',
      '/v2/events',
      '/metrics/x',
      '//',
      '/%00',
      '/é',
    ]) {
      const reply = await ask(ingest, path)
      expect([reply.status, codeOf(reply)], path).toEqual([404, 'not_found'])
      expect(messageOf(reply)).toBe(`there is no GET ${encodeURI(decodeURI(path))}`)
    }
  })

  test('another_method_is_405_and_says_which_one_it_wants', async () => {
    const paths = {
      '/v1/events': 'POST',
      '/v1/calls': 'GET',
      '/v1/calls/CA1': 'GET',
      '/v1/stream': 'GET',
      '/metrics': 'GET',
    }
    for (const [path, wants] of Object.entries(paths)) {
      for (const method of ['GET', 'POST', 'PUT', 'DELETE', 'PATCH', 'OPTIONS'].filter((each) => each !== wants)) {
        const reply = await ask(ingest, path, { method })
        expect([reply.status, codeOf(reply)], `${method} ${path}`).toEqual([405, 'method_not_allowed'])
        expect(reply.headers.get('allow')).toBe(wants === 'GET' ? 'GET, HEAD' : wants)
        expect(messageOf(reply)).toContain(wants)
      }
    }
  })

  test('HEAD_is_answered_like_GET_but_without_a_body', async () => {
    for (const path of ['/healthz', '/readyz', '/metrics', '/v1/calls', '/nowhere', '/v1/events']) {
      // Two on one connection: a body would be taken for the beginning of the second answer.
      const agent = new Agent({ keepAlive: true, maxSockets: 1 })
      onTestFinished(() => agent.destroy())
      const head = await nodeRequest(ingest, 'HEAD', path, '', agent)
      expect(head.status, path).toBe({ '/nowhere': 404, '/v1/events': 405 }[path] ?? 200)
      expect(head.text).toBe('')
      expect(Number(head.headers['content-length'])).toBeGreaterThan(0)
      const get = await nodeRequest(ingest, 'GET', '/healthz', '', agent)
      expect(get).toMatchObject({ status: 200, text: '{"status":"ok"}' })
      expect(await raw(ingest, `HEAD ${path} HTTP/1.1\r\nHost: x\r\n\r\n`)).toMatch(/^HTTP\/1\.1 [^{]*\r\n\r\n$/)
    }
  })

  test('a_stream_without_upgrade_is_426', async () => {
    const reply = await ask(ingest, '/v1/stream')
    expect([reply.status, codeOf(reply)]).toEqual([426, 'upgrade_required'])
    expect(reply.headers.get('upgrade')).toBe('websocket')
  })

  test('a_connection_serves_one_request_after_the_other', async () => {
    const agent = new Agent({ keepAlive: true, maxSockets: 1 })
    onTestFinished(() => agent.destroy())
    const replies = await Promise.all(
      Array.from({ length: 50 }, (_, seq) => nodePost(ingest, JSON.stringify(turn('CA1', seq)), agent)),
    )
    expect(replies.map(({ status, body }) => [status, body.accepted])).toEqual(replies.map(() => [200, 1]))
    const stored = (await eventsOf(redis, 'CA1')).map((event) => (event as { seq?: number }).seq)
    expect(stored).toEqual(replies.map((_, seq) => seq))
  })
})

describe('GET /v1/calls', () => {
  let ingest: Ingest
  beforeEach(async () => {
    ingest = await testIngest({ REDIS_URL: redis.url })
  })

  interface Page {
    calls: { call_sid: string; session: Json; events: number; behind: number | null; last_event_at: number }[]
    next: string | null
  }
  const page = async (query: string) => (await ask(ingest, `/v1/calls${query}`)).body as unknown as Page

  test.each([1, 64])(
    'lists_each_open_call_once_over_all_pages_and_no_ended_one_in_%i_partitions',
    async (partitions) => {
      await redis.client.flushdb()
      ingest = await testIngest({ REDIS_URL: redis.url, PARTITIONS: String(partitions) })
      const sids = Array.from({ length: 600 }, (_, n) => `CA${n}`)
      const ended = sids.filter((_, n) => n % 3 === 0)
      await post(ingest, JSON.stringify(sids.map((sid) => turn(sid, 0))))
      await post(ingest, JSON.stringify(ended.map((call_sid) => ({ type: 'call.ended', call_sid }))))
      const open = sids.filter((sid) => !ended.includes(sid)).sort()
      for (const limit of ['1', '7', '100', '1000']) {
        const pages: Page[] = []
        for (let next: string | null = ''; next !== null; next = pages.at(-1)!.next) {
          pages.push(await page(`?state=active&limit=${limit}&cursor=${next}`))
          expect(pages.length, 'the pages come to an end').toBeLessThanOrEqual(open.length + 64)
        }
        expect(pages.flatMap(({ calls }) => calls.map((call) => call.call_sid)).sort()).toEqual(open)
        if (limit === '1000') expect(pages).toHaveLength(1)
        else expect(pages.length, 'a page is a page').toBeGreaterThan(1)
      }
      const { calls, next } = await page('')
      expect(calls.length, 'by default there is a limit, too').toBeLessThan(open.length)
      expect(next).toMatch(/^\d+\.\d+$/)
    },
  )

  test('is_empty_without_calls', async () => {
    expect(await page('')).toEqual({ calls: [], next: null })
  })

  test.each([
    ['limit=0', 'limit wants an integer from 1 to 1000'],
    ['limit=1001', 'limit wants'],
    ['limit=-1', 'limit wants'],
    ['limit=1.5', 'limit wants'],
    ['limit=all', 'limit wants'],
    ['limit=', 'limit wants'],
    ['limit=Infinity', 'limit wants'],
    ['state=ended', 'state wants active'],
    ['state=', 'state wants active'],
    ['cursor=x', 'cursor wants'],
    ['cursor=0', 'cursor wants'],
    ['cursor=0.', 'cursor wants'],
    ['cursor=64.0', 'cursor wants'],
    ['cursor=-1.0', 'cursor wants'],
    ['cursor=0.0.0', 'cursor wants'],
    ['cursor=0.99999999999999999999', 'cursor wants'],
    ['cursor=99999.0', 'cursor wants'],
  ])('?%s_is_400_and_named', async (query, wants) => {
    const reply = await ask(ingest, `/v1/calls?${query}`)
    expect([reply.status, codeOf(reply)]).toEqual([400, 'invalid_query'])
    expect(messageOf(reply)).toContain(wants)
  })

  test('one_call_shows_its_session_and_how_far_behind_PostgreSQL_is', async () => {
    const events = [
      { type: 'call.started', call_sid: 'CA1', ts: 5, direction: 'inbound', from: '+1', to: '+2', provider: 'exotel' },
      { type: 'call.status', call_sid: 'CA1', status: 'in_progress' },
      turn('CA1', 0),
      { type: 'call.data', call_sid: 'CA1', stage: 'offer' },
    ]
    const before = Date.now()
    await post(ingest, JSON.stringify(events))
    const reply = await ask(ingest, '/v1/calls/CA1')
    expect(reply.status).toBe(200)
    expect(reply.body).toEqual({
      call_sid: 'CA1',
      session: {
        started_at: '5',
        direction: 'inbound',
        from: '+1',
        to: '+2',
        provider: 'exotel',
        status: 'in-progress',
        stage: 'offer',
      },
      events: 4,
      behind: 4,
      last_event_at: expect.any(Number),
    })
    expect(reply.body.last_event_at).toBeGreaterThanOrEqual(before)
    expect(reply.body.last_event_at).toBeLessThanOrEqual(Date.now())
    expect((await page('')).calls).toEqual([reply.body])
  })

  test('an_ended_call_can_still_be_looked_at', async () => {
    await post(ingest, JSON.stringify([turn('CA1', 0), { type: 'call.ended', call_sid: 'CA1', reason: 'hangup' }]))
    const reply = await ask(ingest, '/v1/calls/CA1')
    expect(reply.body).toMatchObject({ session: { ended: '1', reason: 'hangup' }, events: 2 })
  })

  test('call_sids_may_be_percent_encoded', async () => {
    const sid = 'a:b@c.d+e-f_G'
    await post(ingest, JSON.stringify(turn(sid, 0)))
    const every = [...sid].map((c) => `%${c.charCodeAt(0).toString(16)}`).join('')
    for (const spelled of [sid, encodeURIComponent(sid), every]) {
      expect((await ask(ingest, `/v1/calls/${spelled}`)).body, spelled).toMatchObject({ call_sid: sid, events: 1 })
    }
  })

  test('an_unknown_call_is_404_whatever_its_name', async () => {
    await post(ingest, JSON.stringify(turn('CA1', 0)))
    const odd = [
      'CA2',
      'CA',
      '%',
      '%zz',
      '%00',
      '%FF',
      '%E2%82%AC',
      'CA1%20',
      '*',
      '%2e%2e%2fCA1',
      'x'.repeat(2000),
      '__proto__',
    ]
    for (const name of odd) {
      const reply = await ask(ingest, `/v1/calls/${name}`)
      expect([reply.status, codeOf(reply)], name).toEqual([404, 'unknown_call'])
    }
  })
})

describe('while Redis is away', () => {
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

  const freeze = async () => {
    await server.signal('SIGSTOP')
    onTestFinished(thaw)
  }
  const thaw = () => server.signal('SIGCONT')

  /** While Redis is frozen. @param events in the queue once these are @returns the answer of a refusal; false: they were taken */
  const takenOrRefused = async (ingest: Ingest, asked: Promise<Reply>, events: number): Promise<Reply | false> => {
    const { reply } = await until('they are answered or in the queue', async () => {
      const reply = await Promise.race([asked, sleep(0, undefined)])
      return (reply || (await figure(ingest.url, 'calltape_ingest_queued_events')) >= events) && { reply }
    })
    return reply ?? false
  }

  test('an_answer_waits_for_Redis', async () => {
    const ingest = await testIngest({ REDIS_URL: server.url })
    await freeze()
    let reply: Reply | undefined
    const asked = post(ingest, JSON.stringify(turn('CA1', 0))).then((answer) => {
      reply = answer
    })
    await sleep(300)
    expect(reply).toBeUndefined()
    await thaw()
    await asked
    expect(reply).toMatchObject({ status: 200, body: { accepted: 1 } })
    expect(await eventsOf(own, 'CA1')).toEqual([turn('CA1', 0)])
  })

  test('for_longer_than_a_request_waits_everything_that_needs_it_is_503_and_it_recovers_by_itself', async () => {
    const full = await ownRedis()
    onTestFinished(() => full.stop())
    const fullClient = (await connectRedis(full.url, log)) as Redis
    onTestFinished(() => fullClient.disconnect())
    const [frozen, stopping, refused] = await Promise.all([
      testIngest({ REDIS_URL: server.url }),
      testIngest({ REDIS_URL: server.url }),
      testIngest({ REDIS_URL: full.url }),
    ])
    const ready = async (ingest: Ingest) => {
      const { status, body } = await ask(ingest, '/readyz')
      return status === 200 ? 'ready' : (body.error as { code: string; message: string })
    }
    expect(await Promise.all([frozen, refused].map(ready))).toEqual(['ready', 'ready'])
    await freeze()
    await fullClient.config('SET', 'maxmemory', '1')
    const untold = post(stopping, JSON.stringify(turn('CA3', 0)))
    await sleep(50)
    const stopped = stopping.stop()
    const replies = await Promise.all([
      post(frozen, JSON.stringify([turn('CA1', 0), 5, turn('CA1', 1)])),
      post(frozen, JSON.stringify([turn('CA2', 0)])),
      post(refused, JSON.stringify(turn('CA1', 0))),
      ask(frozen, '/v1/calls'),
      ask(frozen, '/v1/calls/CA1'),
      untold,
    ])
    for (const reply of replies) {
      expect(reply.status).toBe(503)
      expect(Number(reply.headers.get('retry-after'))).toBeGreaterThan(0)
      expect(codeOf(reply)).toBe('unavailable')
    }
    expect(messageOf(replies[0])).toMatch(/send them again with their id or seq/)
    // A connection that is silent for so long is given up, and then the new one is silent.
    await until('it says so', async () => /^Redis/.test(((await ready(frozen)) as { message: string }).message), 1500)
    const why = { code: 'no_progress', message: expect.stringMatching(/^Redis stores nothing: OOM/) }
    await until('it says why', async () => (await ready(refused)) !== 'ready', 1500)
    expect(await ready(refused)).toEqual(why)
    for (const ingest of [frozen, refused]) expect((await ask(ingest, '/healthz')).status, 'it lives').toBe(200)
    await Promise.race([stopped, sleep(5000).then(() => expect.unreachable('stop() waits for ever'))])

    await thaw()
    await fullClient.config('SET', 'maxmemory', '0')
    for (const ingest of [frozen, refused]) {
      await until('it is ready again', async () => (await ready(ingest)) === 'ready')
      expect((await post(ingest, JSON.stringify(turn('CA1', 2)))).body).toEqual({ accepted: 1, rejected: [] })
    }
    expect(await eventsOf(own, 'CA1'), 'in order and once').toEqual([0, 1, 2].map((seq) => turn('CA1', seq)))
    expect(await eventsOf(own, 'CA2')).toEqual([turn('CA2', 0)])
    expect(await eventsOf({ ...own, client: fullClient }, 'CA1')).toEqual([turn('CA1', 0), turn('CA1', 2)])
  }, 20_000)

  test('killed_what_was_taken_meanwhile_is_stored_once_when_it_is_back', async () => {
    const dying = await ownRedis()
    onTestFinished(() => dying.stop())
    const ingest = await testIngest({ REDIS_URL: dying.url })
    expect((await post(ingest, JSON.stringify(turn('CA1', 0)))).body).toMatchObject({ accepted: 1 })
    await dying.kill()
    const unready = await until('it is not ready', async () => {
      const reply = await ask(ingest, '/readyz')
      return reply.status === 503 && reply
    })
    expect([codeOf(unready), messageOf(unready)]).toEqual([
      'redis',
      expect.stringMatching(/^Redis: (close|reconnecting)/),
    ])
    const waiting = post(ingest, JSON.stringify([turn('CA1', 1), turn('CA1', 2)]))
    const look = await ask(ingest, '/v1/calls')
    expect([look.status, look.headers.get('retry-after')]).toEqual([503, '2'])
    expect((await ask(ingest, '/healthz')).status).toBe(200)
    await dying.start()
    expect(await waiting, 'a short absence is not even noticed').toMatchObject({ status: 200, body: { accepted: 2 } })
    await until('it is ready again', async () => (await ask(ingest, '/readyz')).status === 200)
    const client = (await connectRedis(dying.url, log)) as Redis
    onTestFinished(() => client.disconnect())
    expect(await eventsOf({ client, partitions: own.partitions }, 'CA1')).toEqual(
      [0, 1, 2].map((seq) => turn('CA1', seq)),
    )
  }, 15_000)

  test('its_memory_is_bounded_and_more_is_503_at_once', async () => {
    const ingest = await testIngest({ REDIS_URL: server.url, MAX_QUEUE_BYTES: String(1024 * 1024) })
    await freeze()
    const waiting: Promise<Reply>[] = []
    const refused = await until('it takes no more', async () => {
      const events = Array.from({ length: 8 }, (_, i) => turn('CA1', waiting.length * 8 + i, 'x'.repeat(16_000)))
      const asked = post(ingest, JSON.stringify(events))
      waiting.push(asked)
      return takenOrRefused(ingest, asked, waiting.length * 8)
    })
    expect(waiting.length).toBeGreaterThan(5)
    expect(waiting.length).toBeLessThan(12)
    expect([refused.status, codeOf(refused), refused.headers.get('retry-after')]).toEqual([503, 'unavailable', '2'])
    expect(messageOf(refused)).toBe('the stores cannot take more now')
    await thaw()
    const replies = await Promise.all(waiting)
    expect(replies.slice(0, -1).map(({ status }) => status)).toEqual(replies.slice(1).map(() => 200))
    expect(await countStored(own), 'all that was taken and nothing of what was refused').toBe(8 * (waiting.length - 1))
    expect((await post(ingest, JSON.stringify(turn('CA1', 999)))).status).toBe(200)
  })

  test('many_tiny_events_count_for_what_they_take', async () => {
    const ingest = await testIngest({ REDIS_URL: server.url, MAX_QUEUE_BYTES: String(1024 * 1024) })
    await freeze()
    const tiny = JSON.stringify(Array.from({ length: 1000 }, () => ({ type: 'call.ended', call_sid: 'a' })))
    let taken = 0
    const refused = await until('it takes no more', () => takenOrRefused(ingest, post(ingest, tiny), ++taken * 1000))
    expect(refused.status).toBe(503)
    expect(taken, 'thousands of events').toBeLessThan(9)
  })
})

describe('stopping', () => {
  test('ends_although_a_client_keeps_posting_and_loses_nothing_it_said_yes_to', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url })
    const agent = new Agent({ keepAlive: true, maxSockets: 4 })
    onTestFinished(() => agent.destroy())
    let accepted = 0
    let refused = 0
    let posting = true
    const poster = async (n: number) => {
      for (let seq = 0; posting; seq++) {
        const reply = await nodePost(ingest, JSON.stringify(turn(`CA${n}`, seq)), agent).catch(() => undefined)
        if (reply?.status === 200) accepted += reply.body.accepted as number
        else {
          refused++
          await sleep(2)
        }
      }
    }
    const posters = [0, 1, 2, 3].map(poster)
    await until('they post', () => accepted > 100)
    await ingest.stop()
    posting = false
    await Promise.all(posters)
    expect(await countStored(redis)).toBeGreaterThanOrEqual(accepted)
    expect(await countStored(redis)).toBeLessThanOrEqual(accepted + refused)
    await expect(fetch(`${ingest.url}/healthz`)).rejects.toThrow()
  })

  test('answers_what_it_has_taken_and_takes_no_more', async () => {
    const relay = await Relay.start(redis.url)
    onTestFinished(() => relay.stop())
    const ingest = await testIngest({ REDIS_URL: relay.url })
    const agent = new Agent({ keepAlive: true, maxSockets: 1 })
    onTestFinished(() => agent.destroy())
    await nodeRequest(ingest, 'GET', '/healthz', '', agent)
    relay.holdRequests = true
    const asked = post(ingest, JSON.stringify(turn('CA1', 0)))
    await until('it is on its way to Redis', () => relay.holdsRequests)
    const stopped = ingest.stop()
    const late = await nodePost(ingest, JSON.stringify(turn('CA1', 1)), agent)
    expect([late.status, messageOf(late)]).toEqual([503, 'the process is stopping'])
    const probe = await nodeRequest(ingest, 'GET', '/readyz', '', agent)
    expect([probe.status, codeOf({ body: JSON.parse(probe.text) as Json })]).toEqual([503, 'stopping'])
    relay.release()
    expect((await asked).body).toEqual({ accepted: 1, rejected: [] })
    await stopped
    expect(await countStored(redis)).toBe(1)
  })
})

describe('fuzz', () => {
  let seed = 20_260_101
  const random = (below: number) => {
    seed = (seed * 48_271) % 2_147_483_647
    return seed % below
  }
  const INTERESTING = [
    '"',
    '{',
    '}',
    '[',
    ']',
    ',',
    ':',
    '\\',
    '\0',
    '\n',
    'null',
    '1e999',
    '-0',
    '\\u0000',
    '\\ud800',
    'é',
    '😀',
    '__proto__',
  ]
  const mutate = (text: Buffer): Buffer => {
    let bytes = Buffer.from(text)
    for (let n = 1 + random(4); n > 0; n--) {
      const at = random(bytes.length + 1)
      const what = random(5)
      const insert = Buffer.from(INTERESTING[random(INTERESTING.length)]!)
      if (what === 0) bytes = Buffer.concat([bytes.subarray(0, at), insert, bytes.subarray(at)])
      else if (what === 1)
        bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(Math.min(bytes.length, at + random(20)))])
      else if (what === 2 && at < bytes.length) bytes[at] = random(256)
      else if (what === 3) bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(random(at + 1))])
      else
        bytes = Buffer.concat([
          bytes.subarray(0, at),
          insert,
          bytes.subarray(Math.min(bytes.length, at + insert.length)),
        ])
    }
    return bytes
  }
  const events = [
    turn('CA1', 0),
    {
      type: 'call.started',
      call_sid: 'CA1',
      direction: 'inbound',
      from: '+1',
      ts: '2026-01-01T00:00:00Z',
      meta: { a: [1] },
    },
    { type: 'call.status', call_sid: 'CA2', status: 'in_progress', duration_seconds: 3, extra: { x: null } },
    { type: 'call.data', call_sid: 'CA1', data: { a: 1 }, objections: ['price'] },
    { type: 'call.ended', call_sid: 'CA2', turn_count: 2 },
  ]

  test('thousands_of_mutated_bodies_are_all_answered_and_what_is_accepted_is_stored', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url })
    const agent = new Agent({ keepAlive: true, maxSockets: 16 })
    onTestFinished(() => agent.destroy())
    let accepted = 0
    const statuses: Record<number, number> = {}
    const bodies = Array.from({ length: 3000 }, (_, i) => {
      const isLines = i % 2 === 0
      const text = isLines ? events.map((event) => JSON.stringify(event)).join('\n') : JSON.stringify(events)
      return { body: mutate(Buffer.from(text)), headers: { 'Content-Type': isLines ? NDJSON : 'application/json' } }
    })
    await Promise.all(
      bodies.map(async ({ body, headers }) => {
        const reply = await nodePost(ingest, body, agent, headers)
        statuses[reply.status] = (statuses[reply.status] ?? 0) + 1
        if (reply.status === 200) accepted += reply.body.accepted as number
      }),
    )
    expect(Object.keys(statuses)).toEqual(['200', '400'])
    for (const count of Object.values(statuses)) expect(count).toBeGreaterThan(300)
    expect(await countStored(redis)).toBe(accepted)
    for (const key of await redis.client.keys('ct:*:call:*')) {
      for (const [, fields] of await redis.client.xrange(key, '-', '+')) {
        expect(key.endsWith(`:call:${(JSON.parse(fields[1]!) as Json).call_sid}`)).toBe(true)
      }
    }
  })

  test('thousands_of_mutated_requests_kill_nobody', async () => {
    const ingest = await testIngest({ REDIS_URL: redis.url })
    const body = JSON.stringify(events)
    const requests = [
      `POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n${body}`,
      `POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n${body.length.toString(16)}\r\n${body}\r\n0\r\n\r\n`,
      'GET /v1/calls?limit=5&cursor=0.0 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\n\r\n',
      'GET /v1/calls/CA1%20 HTTP/1.1\r\nHost: x\r\n\r\n',
      'GET /v1/stream?call_sid=CA1 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n',
    ]
    let answered = 0
    const attack = async () => {
      for (let i = 0; i < 50; i++) {
        const request = mutate(Buffer.from(requests[random(requests.length)]!))
        if (/^HTTP\/1\.1 \d+/.test(await raw(ingest, request, 40))) answered++
      }
    }
    const [, neighbour] = await Promise.all([
      Promise.all(Array.from({ length: 40 }, attack)),
      post(ingest, JSON.stringify(turn('neighbour', 0))),
    ])
    expect(neighbour.body).toEqual({ accepted: 1, rejected: [] })
    expect(answered, 'the mutations are not all nonsense').toBeGreaterThan(200)
    expect((await post(ingest, JSON.stringify(turn('neighbour', 1)))).body).toEqual({ accepted: 1, rejected: [] })
    expect(await eventsOf(redis, 'neighbour')).toEqual([turn('neighbour', 0), turn('neighbour', 1)])
  })
})
