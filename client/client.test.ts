import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterEach, describe, expect, test, vi } from 'vitest'
import { WebSocket, WebSocketServer } from 'ws'
import { type CallEvent, type Client, ConnectionClosed, type ConnectOptions, connect, EventRefused } from './client.js'

type TestEvent = CallEvent & { n?: number; text?: string }

/** One connection as the server saw it. */
interface Session {
  socket: WebSocket
  url: string
  authorization: string | undefined
  messages: string[]
  events: TestEvent[]
  acked: number
  mostUnacked: number
  cut: boolean
  closeCode?: number
}

/** A real server of the protocol, with switches for what goes wrong. Switches are read when they matter: set them freely. */
class Server {
  readonly sessions: Session[] = []
  readonly #http = createServer()
  readonly #sockets = new WebSocketServer({ noServer: true, perMessageDeflate: false })
  hello: string | undefined = JSON.stringify({ type: 'hello', protocol: 1, window: 100, max_message_bytes: 10_000 })
  upgradeStatus = 101
  holdAcks = false
  /** Cuts a connection when it has received this many events, having acknowledged `ackedBeforeCut` of them. */
  cutAfter = Number.POSITIVE_INFINITY
  ackedBeforeCut = 0
  refuse: (event: TestEvent) => { code: string; message: string; path?: string } | undefined = () => undefined

  async listen(port = 0): Promise<this> {
    this.#http.on('upgrade', (request, socket, head) => {
      if (this.upgradeStatus !== 101) {
        socket.end(`HTTP/1.1 ${this.upgradeStatus} Because\r\nContent-Length: 0\r\nConnection: close\r\n\r\n`)
        return
      }
      this.#sockets.handleUpgrade(request, socket, head, (ws) =>
        this.#accept(ws, request.url ?? '', request.headers.authorization),
      )
    })
    this.#http.listen(port, '127.0.0.1')
    await once(this.#http, 'listening')
    return this
  }

  get port(): number {
    return (this.#http.address() as AddressInfo).port
  }

  get url(): string {
    return `ws://127.0.0.1:${this.port}`
  }

  get last(): Session {
    return this.sessions.at(-1)!
  }

  set limits({ window = 100, maxBytes = 10_000 }: { window?: number; maxBytes?: number }) {
    this.hello = JSON.stringify({ type: 'hello', protocol: 1, window, max_message_bytes: maxBytes })
  }

  #accept(socket: WebSocket, url: string, authorization: string | undefined): void {
    const session: Session = {
      socket,
      url,
      authorization,
      messages: [],
      events: [],
      acked: 0,
      mostUnacked: 0,
      cut: false,
    }
    this.sessions.push(session)
    if (this.hello !== undefined) socket.send(this.hello)
    socket.on('message', (data) => this.#receive(session, data.toString()))
    socket.on('close', (code) => {
      session.closeCode = code
    })
  }

  #receive(session: Session, text: string): void {
    if (session.cut) return
    session.messages.push(text)
    for (const event of [JSON.parse(text)].flat() as TestEvent[]) {
      session.events.push(event)
      const refusal = this.refuse(event)
      if (refusal) session.socket.send(JSON.stringify({ type: 'error', event: session.events.length, ...refusal }))
      if (session.events.length === this.cutAfter) {
        session.cut = true
        if (this.ackedBeforeCut > session.acked) this.ack(this.ackedBeforeCut, session)
        // What was written is delivered first, so that the client does see these acknowledgements.
        setImmediate(() => session.socket.terminate())
        return
      }
    }
    session.mostUnacked = Math.max(session.mostUnacked, session.events.length - session.acked)
    if (!this.holdAcks) this.ack(session.events.length, session)
  }

  ack(through: number, session = this.last): void {
    session.acked = through
    session.socket.send(JSON.stringify({ type: 'ack', through }))
  }

  async stop(): Promise<void> {
    for (const { socket } of this.sessions) socket.terminate()
    await new Promise((resolve) => this.#http.close(resolve))
  }
}

const servers: Server[] = []
const clients: Client[] = []

async function serve(port?: number): Promise<Server> {
  const server = await new Server().listen(port)
  servers.push(server)
  return server
}

/** Impatient: what waits seconds in production waits milliseconds here. */
async function open(server: Server, options: ConnectOptions = {}): Promise<Client> {
  const client = await connect(server.url, { initialBackoffMs: 5, maxBackoffMs: 20, ...options })
  clients.push(client)
  return client
}

const turn = (n: number): TestEvent & { n: number } => ({ type: 'turn', call_sid: 'CA1', seq: n, n })
const turns = (count: number, from = 0) => Array.from({ length: count }, (_, i) => turn(from + i))
const numbers = (events: TestEvent[]) => events.map((event) => event.n)
const until = (condition: () => boolean) =>
  vi.waitFor(() => expect(condition()).toBe(true), { timeout: 5000, interval: 2 })
/** What a promise has come to: every promise here is watched from its start, so none rejects unhandled. */
const outcome = (promise: Promise<void>) =>
  promise.then(
    () => 'stored',
    (error: Error) => error,
  )

afterEach(async () => {
  for (const client of clients.splice(0)) client.terminate()
  for (const server of servers.splice(0)) await server.stop()
})

describe('sending', () => {
  test('events_of_one_tick_go_as_one_array_and_an_event_alone_as_a_bare_object', async () => {
    const server = await serve()
    const client = await open(server)
    await client.send(turn(0))
    await Promise.all(turns(3, 1).map((event) => client.send(event)))
    expect(server.last.messages).toEqual([JSON.stringify(turn(0)), JSON.stringify(turns(3, 1))])
  })

  test('send_resolves_when_its_event_is_acked_and_not_before', async () => {
    const server = await serve()
    server.holdAcks = true
    const client = await open(server)
    const settled: number[] = []
    for (const event of turns(4)) client.send(event).then(() => settled.push(event.n))
    await until(() => server.last.events.length === 4)
    expect(settled).toEqual([])
    server.ack(3)
    await until(() => settled.length > 0)
    expect(settled).toEqual([0, 1, 2])
    expect(client.stats).toMatchObject({ sent: 4, acked: 3, unacked: 1 })
    server.ack(4)
    await client.flush()
    expect(settled).toEqual([0, 1, 2, 3])
  })

  test('what_is_sent_is_the_event_as_it_was_when_it_was_sent', async () => {
    const server = await serve()
    const client = await open(server)
    const event = turn(1)
    client.post(event)
    event.n = 2
    await client.flush()
    expect(numbers(server.last.events)).toEqual([1])
  })

  test('never_more_than_the_window_on_the_wire', async () => {
    const server = await serve()
    server.limits = { window: 10 }
    server.holdAcks = true
    const client = await open(server)
    for (const event of turns(35)) client.post(event)
    const seen: number[] = []
    for (let acked = 0; acked < 35; acked += 5) {
      await until(() => server.last.events.length >= Math.min(35, acked + 10))
      await sleep(5)
      seen.push(server.last.events.length - server.last.acked)
      server.ack(acked + 5)
    }
    expect(seen).toEqual([10, 10, 10, 10, 10, 10, 5])
    await client.flush()
    expect(numbers(server.last.events)).toEqual(numbers(turns(35)))
  })

  test('never_more_than_the_window_on_the_wire_after_a_reconnect_to_a_smaller_one', async () => {
    const server = await serve()
    server.holdAcks = true
    const client = await open(server)
    for (const event of turns(60)) client.post(event)
    await until(() => server.last.events.length === 60)
    server.limits = { window: 7 }
    server.holdAcks = false
    client.drop()
    await client.flush()
    expect(server.last.mostUnacked).toBe(7)
    expect(numbers(server.last.events)).toEqual(numbers(turns(60)))
  })

  test('no_message_is_larger_than_the_server_takes_or_has_more_events_than_maxBatch', async () => {
    const server = await serve()
    const big = { ...turn(1), text: 'ü'.repeat(50) }
    const size = Buffer.byteLength(JSON.stringify(big))
    // Three events take two commas and two brackets more; one byte less, and the third does not fit.
    for (const [maxBytes, fit] of [[3 * size + 4, [3, 3]] as const, [3 * size + 3, [2, 2, 2]] as const]) {
      server.limits = { maxBytes }
      const client = await open(server, { maxBatch: 5 })
      for (let i = 0; i < 6; i++) client.post(big)
      await client.flush()
      for (const event of turns(12)) client.post(event)
      await client.flush()
      const batches = server.last.messages.map((text) => JSON.parse(text).length)
      expect(batches.slice(0, fit.length)).toEqual(fit)
      expect(batches.slice(fit.length)).toEqual([5, 5, 2])
    }
  })

  test('ready_waits_while_maxUnacked_events_are_unacknowledged', async () => {
    const server = await serve()
    server.holdAcks = true
    const client = await open(server, { maxUnacked: 3 })
    for (const event of turns(3)) {
      await client.ready()
      client.post(event)
    }
    let ready = false
    const waiting = client.ready().then(() => {
      ready = true
    })
    await until(() => server.last.events.length === 3)
    await sleep(10)
    expect(ready).toBe(false)
    server.ack(1)
    await waiting
  })

  test('a_producer_that_awaits_ready_has_no_more_than_the_window_unacknowledged', async () => {
    const server = await serve()
    server.limits = { window: 8 }
    const client = await open(server)
    let most = 0
    for (const event of turns(500)) {
      await client.ready()
      client.post(event)
      most = Math.max(most, client.stats.unacked)
    }
    await client.flush()
    expect(most).toBe(8)
    expect(numbers(server.last.events)).toEqual(numbers(turns(500)))
  })
})

describe('refusals', () => {
  test('a_refused_event_rejects_only_its_own_promise', async () => {
    const server = await serve()
    server.refuse = ({ n }) => (n === 1 ? { code: 'invalid_field', message: 'seq wants more', path: 'seq' } : undefined)
    const client = await open(server)
    const outcomes = await Promise.all(turns(3).map((event) => outcome(client.send(event))))
    expect(outcomes).toEqual(['stored', expect.any(EventRefused), 'stored'])
    expect(outcomes[1]).toMatchObject({ code: 'invalid_field', message: 'seq wants more', path: 'seq', event: turn(1) })
    expect(client.stats).toEqual({ sent: 3, acked: 2, refused: 1, reconnects: 0, resent: 0, unacked: 0 })
  })

  test('a_refusal_of_a_posted_event_is_emitted', async () => {
    const server = await serve()
    server.refuse = ({ n }) => (n === 1 ? { code: 'unknown_type', message: 'type wants …' } : undefined)
    const client = await open(server)
    const refused: EventRefused[] = []
    client.on('refused', (error) => refused.push(error))
    for (const event of turns(3)) client.post(event)
    await client.flush()
    expect(refused).toEqual([expect.any(EventRefused)])
    expect(refused[0]).toMatchObject({ code: 'unknown_type', path: undefined, event: turn(1) })
  })

  test('a_refused_event_is_not_resent_even_if_no_ack_covered_it', async () => {
    const server = await serve()
    server.holdAcks = true
    server.refuse = ({ n }) => (n === 1 ? { code: 'no', message: 'no' } : undefined)
    const client = await open(server)
    const sent = turns(3).map((event) => outcome(client.send(event)))
    await sent[1]
    server.holdAcks = false
    client.drop()
    expect(await Promise.all(sent)).toEqual(['stored', expect.any(EventRefused), 'stored'])
    expect(numbers(server.last.events)).toEqual([0, 2])
    expect(client.stats).toEqual({ sent: 3, acked: 2, refused: 1, reconnects: 1, resent: 2, unacked: 0 })
  })

  test('an_event_larger_than_a_message_may_be_is_refused_without_being_sent', async () => {
    const server = await serve()
    const envelope = JSON.stringify({ ...turn(1), text: '' }).length
    server.limits = { maxBytes: envelope + 100 }
    const client = await open(server)
    const texts = ['x'.repeat(100), 'x'.repeat(101), 'ü'.repeat(51), 'ü'.repeat(50)]
    const outcomes = await Promise.all(texts.map((text) => outcome(client.send({ ...turn(1), text }))))
    expect(outcomes).toEqual(['stored', expect.any(EventRefused), expect.any(EventRefused), 'stored'])
    expect(outcomes[1]).toMatchObject({ code: 'too_large' })
    expect(server.last.events.map((event) => event.text)).toEqual([texts[0], texts[3]])
  })

  test('what_no_longer_fits_after_a_reconnect_is_refused_and_the_rest_is_stored', async () => {
    const server = await serve()
    server.holdAcks = true
    const client = await open(server)
    const sent = [turn(0), { ...turn(1), text: 'x'.repeat(500) }, turn(2)].map((event) => outcome(client.send(event)))
    await until(() => server.last.events.length === 3)
    server.limits = { maxBytes: 200 }
    server.holdAcks = false
    client.drop()
    expect(await Promise.all(sent)).toEqual(['stored', expect.objectContaining({ code: 'too_large' }), 'stored'])
    expect(numbers(server.last.events)).toEqual([0, 2])
  })

  test('an_event_that_JSON_cannot_express_rejects_and_disturbs_nothing', async () => {
    const server = await serve()
    const client = await open(server)
    const wrong = outcome(client.send({ ...turn(0), size: 1n }))
    expect(() => client.post({ ...turn(0), size: 1n })).toThrow(TypeError)
    await client.send(turn(1))
    expect(await wrong).toBeInstanceOf(TypeError)
    expect(client.stats).toMatchObject({ sent: 1, acked: 1, unacked: 0 })
  })
})

describe('reconnecting', () => {
  test('a_dropped_connection_resends_what_was_not_acked_and_nothing_else', async () => {
    const server = await serve()
    server.holdAcks = true
    const client = await open(server)
    const reconnects: number[] = []
    client.on('reconnect', (unacked) => reconnects.push(unacked))
    const sent = turns(10).map((event) => client.send(event))
    await until(() => server.last.events.length === 10)
    server.ack(4)
    await sent[3]
    server.holdAcks = false
    client.drop()
    await Promise.all(sent)
    expect(server.sessions.map(({ events }) => numbers(events))).toEqual([numbers(turns(10)), numbers(turns(6, 4))])
    expect(client.stats).toEqual({ sent: 10, acked: 10, refused: 0, reconnects: 1, resent: 6, unacked: 0 })
    expect(reconnects).toEqual([6])
  })

  test('connections_cut_at_every_event_lose_nothing_and_keep_the_order', async () => {
    const server = await serve()
    server.limits = { window: 20 }
    const client = await open(server, { maxBatch: 6 })
    server.cutAfter = 1
    client.on('disconnect', () => {
      // Every attempt gets a little further than the last; of that, a part is acknowledged.
      server.cutAfter = (server.cutAfter % 17) + 1
      server.ackedBeforeCut = Math.ceil(server.cutAfter / 2)
    })
    const sent = turns(300).map((event) => outcome(client.send(event)))
    expect(new Set(await Promise.all(sent))).toEqual(new Set(['stored']))
    const seen = server.sessions.flatMap(({ events }) => numbers(events) as number[])
    expect([...new Set(seen)]).toEqual(numbers(turns(300))) // first arrivals, in order
    for (const { events } of server.sessions) {
      expect(numbers(events)).toEqual(numbers(turns(events.length, events[0]?.n)))
    }
    expect(client.stats.reconnects).toBeGreaterThan(20)
    expect(seen.length).toBeGreaterThan(300)
  })

  test('events_without_key_keep_their_stamped_id_when_resent', async () => {
    const server = await serve()
    server.holdAcks = true
    const client = await open(server)
    const keyless = { type: 'turn', call_sid: 'CA1' } as const
    const events: TestEvent[] = [
      keyless,
      keyless,
      { ...keyless, id: null, seq: null },
      { type: 'call.status', call_sid: 'CA1', seq: 5 }, // only a turn's seq is a key
      { ...keyless, seq: 0 },
      { type: 'call.ended', call_sid: 'CA1', id: 'mine' },
    ]
    for (const event of events) client.post(event)
    await until(() => server.last.events.length === 6)
    server.holdAcks = false
    client.drop()
    await client.flush()
    const [first, second] = server.sessions.map((session) => session.events.map((event) => event.id))
    expect(second).toEqual(first)
    expect(new Set(first).size).toBe(6)
    expect(first?.slice(0, 4)).toEqual(Array(4).fill(expect.stringMatching(/^[\w-]{8,}-\d+$/)))
    expect(first?.slice(4)).toEqual([undefined, 'mine'])
    expect(keyless).toEqual({ type: 'turn', call_sid: 'CA1' }) // the caller's object is left alone
  })

  test('two_clients_never_stamp_the_same_id', async () => {
    const server = await serve()
    for (const client of [await open(server), await open(server)])
      await client.send({ type: 'call.data', call_sid: 'CA1' })
    const ids = server.sessions.map(({ events }) => events[0]?.id)
    expect(new Set(ids).size).toBe(2)
  })

  test('events_sent_during_an_outage_are_stored_when_the_server_is_back', async () => {
    const first = await serve()
    const { port } = first
    const client = await open(first)
    await client.send(turn(0))
    const failures: number[] = []
    client.on('disconnect', (_reason, retryMs) => failures.push(retryMs))
    await first.stop()
    await until(() => failures.length > 0)
    const sent = turns(5, 1).map((event) => client.send(event))
    await until(() => failures.length >= 4)
    const second = await serve(port)
    await Promise.all(sent)
    expect(numbers(second.last.events)).toEqual([1, 2, 3, 4, 5])
    expect(client.stats).toMatchObject({ reconnects: 1, resent: 0 })
  })

  test('the_wait_before_reconnecting_doubles_up_to_its_maximum_with_jitter', async () => {
    const server = await serve()
    const client = await open(server, { initialBackoffMs: 4, maxBackoffMs: 30 })
    const waits: number[] = []
    client.on('disconnect', (_reason, retryMs) => waits.push(retryMs))
    await server.stop()
    await until(() => waits.length >= 7)
    const longest = [4, 8, 16, 30, 30, 30, 30]
    for (const [i, most] of longest.entries()) {
      expect(waits[i]).toBeLessThanOrEqual(most)
      expect(waits[i]).toBeGreaterThanOrEqual(most / 2)
    }
    expect(new Set(waits.slice(3)).size).toBeGreaterThan(1)
  })

  test('the_wait_grows_while_the_server_falls_over_what_is_resent_and_starts_anew_after_an_ack', async () => {
    const server = await serve()
    const client = await open(server, { initialBackoffMs: 4, maxBackoffMs: 1000 })
    const waits: number[] = []
    client.on('disconnect', (_reason, retryMs) => waits.push(retryMs))
    server.cutAfter = 1
    client.post(turn(0))
    await until(() => waits.length === 4)
    expect(waits[3]).toBeGreaterThanOrEqual(16)
    server.cutAfter = Number.POSITIVE_INFINITY
    await client.flush()
    client.drop()
    expect(waits[4]).toBeLessThanOrEqual(4)
  })

  test('a_401_on_reconnect_ends_the_client_and_other_answers_do_not', async () => {
    const server = await serve()
    const client = await open(server)
    const failures: string[] = []
    client.on('disconnect', ({ message }) => failures.push(message))
    const ended = once(client, 'close')
    server.holdAcks = true
    const sent = outcome(client.send(turn(0)))
    await until(() => server.last.events.length === 1)
    server.upgradeStatus = 503
    client.drop()
    await until(() => failures.includes('the server answered 503 Because'))
    const waiting = outcome(client.flush())
    server.upgradeStatus = 401
    for (const error of [await sent, await waiting, (await ended)[0]]) {
      expect(error).toBeInstanceOf(ConnectionClosed)
      expect(error).toHaveProperty('message', expect.stringContaining('401'))
    }
    expect(await outcome(client.send(turn(1)))).toBeInstanceOf(ConnectionClosed)
    expect(await outcome(client.ready())).toBeInstanceOf(ConnectionClosed)
    expect(() => client.post(turn(1))).toThrow(ConnectionClosed)
  })
})

describe('broken connections', () => {
  const hello = JSON.stringify({ type: 'hello', protocol: 1, window: 100, max_message_bytes: 10_000 })
  test.each([
    ['what_is_not_JSON', 'hello?'],
    ['what_is_not_an_object', 'null'],
    ['an_unknown_type', '{"type":"news"}'],
    ['a_second_hello', hello],
    ['an_ack_of_what_was_not_sent', '{"type":"ack","through":5}'],
    ['an_ack_behind_the_last', '{"type":"ack","through":0}'],
    ['an_ack_without_a_number', '{"type":"ack","through":"2"}'],
    ['an_error_about_what_was_not_sent', '{"type":"error","event":5,"code":"no","message":"no"}'],
    ['an_error_about_what_was_acked', '{"type":"error","event":1,"code":"no","message":"no"}'],
  ])('a_server_that_says_%s_is_left_and_tried_again', async (_name, message) => {
    const server = await serve()
    server.limits = { window: 3 } // so the fifth and sixth are still in the client
    server.holdAcks = true
    const client = await open(server)
    const reasons: string[] = []
    client.on('disconnect', (reason) => reasons.push(reason.message))
    for (const event of turns(6)) client.post(event)
    await until(() => server.last.events.length === 3)
    server.ack(1)
    server.holdAcks = false
    server.last.socket.send(message)
    await client.flush()
    expect(reasons).toEqual([`bad message from the server: ${message}`])
    expect(numbers(server.last.events)).toEqual([1, 2, 3, 4, 5])
    expect(client.stats).toMatchObject({ acked: 6, refused: 0, reconnects: 1 })
    await until(() => server.sessions[0]?.closeCode !== undefined)
  })

  test('a_server_silent_with_events_unacknowledged_is_left_and_tried_again', async () => {
    const server = await serve()
    server.holdAcks = true
    const client = await open(server, { silenceTimeoutMs: 40 })
    await sleep(60) // idle: this silence does not count
    const before = Date.now()
    client.post(turn(0))
    const [reason] = await once(client, 'disconnect')
    expect(reason.message).toBe('silent for 40 ms')
    expect(Date.now() - before).toBeGreaterThanOrEqual(39)
    server.holdAcks = false
    await client.flush()
    expect(server.sessions.length).toBe(2)
  })

  test('an_idle_connection_and_one_whose_server_acks_slowly_or_pings_are_kept', async () => {
    const server = await serve()
    server.holdAcks = true
    const client = await open(server, { silenceTimeoutMs: 60 })
    await sleep(100)
    for (const event of turns(6)) client.post(event)
    for (let acked = 1; acked < 6; acked++) {
      await sleep(20)
      server.ack(acked)
    }
    for (let i = 0; i < 5; i++) {
      await sleep(20)
      server.last.socket.ping()
    }
    server.ack(6)
    await client.flush()
    expect(server.sessions.length).toBe(1)
  })

  test('a_hello_that_does_not_come_is_given_up_and_tried_again', async () => {
    const server = await serve()
    const client = await open(server, { helloTimeoutMs: 40 })
    server.hello = undefined
    client.drop()
    await once(client, 'disconnect')
    server.limits = {}
    await client.send(turn(0))
    expect(server.sessions.length).toBe(3)
  })

  test('a_server_that_goes_away_is_reconnected_to', async () => {
    const server = await serve()
    const client = await open(server)
    server.last.socket.close(1001, 'going away')
    const [reason] = await once(client, 'disconnect')
    expect(reason.message).toBe('the connection was closed: 1001 going away')
    await client.send(turn(0))
    expect(client.stats.reconnects).toBe(1)
  })
})

describe('connecting', () => {
  test('the_token_and_the_call_are_sent_and_http_is_a_URL_too', async () => {
    const server = await serve()
    const base = `http://127.0.0.1:${server.port}/prefix/`
    const client = await connect(base, { token: 'T0P', callSid: 'CA+1&x' })
    clients.push(client)
    expect(server.last).toMatchObject({ url: '/prefix/v1/stream?call_sid=CA%2B1%26x', authorization: 'Bearer T0P' })
    await client.send({ type: 'call.started' })
    const plain = await open(server)
    expect(server.last).toMatchObject({ url: '/v1/stream', authorization: undefined })
    await plain.close()
  })

  test('first_connection_failure_names_the_cause', async () => {
    const server = await serve()
    const { url, port } = server
    const failure = (base: string) =>
      connect(base, { helloTimeoutMs: 50 }).then(
        () => undefined,
        (error: Error) => error,
      )
    server.upgradeStatus = 401
    expect((await failure(url))?.message).toBe(`cannot connect to ${url}/v1/stream: the server answered 401 Because`)
    server.upgradeStatus = 101
    server.hello = undefined
    expect((await failure(url))?.message).toBe(`cannot connect to ${url}/v1/stream: no hello within 50 ms`)
    server.hello = '{"type":"hello","protocol":2,"window":1,"max_message_bytes":1}'
    expect((await failure(url))?.message).toContain(`bad message from the server: ${server.hello}`)
    await server.stop()
    const refused = await failure(url)
    expect(refused?.message).toContain('ECONNREFUSED')
    expect(refused?.cause).toHaveProperty('code', 'ECONNREFUSED')
    expect((await failure(`ws://localhost:${port}`))?.message).toContain('ECONNREFUSED')
    for (const bad of ['localhost:8080', '127.0.0.1:8080', 'ftp://127.0.0.1']) {
      expect((await failure(bad))?.message).toBe(
        `calltape client wants a ws://, wss://, http:// or https:// URL, got ${bad}`,
      )
    }
  })
})

describe('ending', () => {
  test('close_flushes_and_then_closes_with_1000', async () => {
    const server = await serve()
    const client = await open(server)
    const sent = turns(50).map((event) => outcome(client.send(event)))
    const closing = client.close()
    expect(client.close()).toBe(closing)
    expect(await outcome(client.send(turn(50)))).toBeInstanceOf(ConnectionClosed)
    await closing
    expect(server.last.socket.readyState).not.toBe(WebSocket.OPEN)
    expect(new Set(await Promise.all(sent))).toEqual(new Set(['stored']))
    await until(() => server.last.closeCode !== undefined)
    expect(server.last.closeCode).toBe(1000)
    expect(server.last.events.length).toBe(50)
    await sleep(30)
    expect(server.sessions.length).toBe(1) // and it stays closed
  })

  test('close_reconnects_if_that_is_what_the_flush_needs', async () => {
    const server = await serve()
    server.holdAcks = true
    const client = await open(server)
    const sent = client.send(turn(0))
    await until(() => server.last.events.length === 1)
    server.holdAcks = false
    client.drop()
    await client.close()
    await sent
    expect(server.last.events.length).toBe(1)
  })

  test('close_rejects_and_closes_with_1000_when_the_flush_takes_too_long', async () => {
    const server = await serve()
    server.holdAcks = true
    const client = await open(server, { closeTimeoutMs: 40 })
    const sent = outcome(client.send(turn(0)))
    client.post(turn(1))
    const message = 'closed after 40 ms with 2 events unacknowledged'
    expect(await outcome(client.close())).toEqual(new ConnectionClosed(message))
    expect(await sent).toEqual(new ConnectionClosed(message))
    expect(client.stats).toMatchObject({ sent: 2, acked: 0, unacked: 2 })
    await until(() => server.last.closeCode === 1000)
  })

  test('close_does_not_wait_for_a_server_that_is_away_when_there_is_nothing_to_flush', async () => {
    const server = await serve()
    const client = await open(server)
    const lost = once(client, 'disconnect')
    await server.stop()
    await lost
    await client.close()
    expect(await outcome(client.flush())).toBeInstanceOf(ConnectionClosed)
  })

  test('terminate_rejects_what_is_unacked_and_closes_without_a_handshake', async () => {
    const server = await serve()
    server.holdAcks = true
    const client = await open(server, { maxUnacked: 2 })
    const sent = turns(2).map((event) => outcome(client.send(event)))
    const waiting = [outcome(client.ready()), outcome(client.flush())]
    await until(() => server.last.events.length === 2)
    client.terminate()
    for (const end of await Promise.all([...sent, ...waiting])) expect(end).toBeInstanceOf(ConnectionClosed)
    await until(() => server.last.closeCode !== undefined)
    expect(server.last.closeCode).toBe(1006)
    expect(client.stats).toMatchObject({ sent: 2, unacked: 2 })
    await client.close() // nothing is left to do
    await sleep(30)
    expect(server.sessions.length).toBe(1)
  })

  test('terminate_while_reconnecting_ends_it', async () => {
    const server = await serve()
    const client = await open(server)
    client.drop()
    client.terminate()
    await sleep(40)
    expect(server.sessions.length).toBe(1)
  })
})
