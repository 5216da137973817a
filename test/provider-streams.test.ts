/** `/streams/exotel` with real WebSockets: what a provider, a broken one or an enemy may send, and stores that are away. */
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Redis } from 'ioredis'
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from 'vitest'
import { WebSocket } from 'ws'
import { Deliveries } from '../ingest/deliver.js'
import type { Ingest } from '../ingest/ingest.js'
import { ProviderConnection } from '../ingest/provider-connection.js'
import { IngestRoutes } from '../ingest/routes.js'
import { listen } from '../ingest/server.js'
import { readConfig } from '../shared/config.js'
import { Partitions } from '../shared/keys.js'
import { connectRedis } from '../shared/redis.js'
import { testIngest } from './support/ingest.js'
import { KillableStore } from './support/killable-stores.js'
import { figure } from './support/metrics.js'
import { freshRedis, log, startTestStack, type TestStack, until } from './support/stores.js'
import { eventsOf, Producer, type Store } from './support/streams.js'

type Message = Record<string, unknown>

/** One call's messages, numbered as Exotel numbers them. */
class Talk {
  private sequence = 0
  readonly streamSid: string

  constructor(readonly callSid: string) {
    this.streamSid = `MZ-${callSid}`
  }

  start = () => this.message('start', { call_sid: this.callSid, from: '+911', to: '+912' })
  stop = (reason = 'callended') => this.message('stop', { call_sid: this.callSid, reason })
  mark = (name: string) => this.message('mark', { name })
  media = () => this.message('media', { chunk: '2', timestamp: '200', payload: 'A'.repeat(4268) })

  private message(event: string, body: Message): Message {
    return { event, sequence_number: String(++this.sequence), stream_sid: this.streamSid, [event]: body }
  }
}

async function open(url: string): Promise<WebSocket> {
  const socket = new WebSocket(`${url.replace('http', 'ws')}/streams/exotel`, { perMessageDeflate: false })
  onTestFinished(() => socket.terminate())
  socket.on('error', () => undefined) // its 'close' follows
  await once(socket, 'open')
  return socket
}

const send = (socket: WebSocket, ...messages: (Message | string | Buffer)[]) => {
  for (const each of messages) {
    socket.send(typeof each === 'string' || Buffer.isBuffer(each) ? each : JSON.stringify(each))
  }
}

async function close(socket: WebSocket, code = 1000): Promise<void> {
  const closed = once(socket, 'close')
  socket.close(code)
  await closed
}

/** type, and what tells it from others of its type */
async function storyOf(store: Store, sid: string): Promise<string[]> {
  return (await eventsOf(store, sid)).map((event) => {
    const { mark } = (event.meta ?? {}) as { mark?: { name: string } }
    const detail = mark?.name ?? ('reason' in event ? event.reason : undefined)
    return detail === undefined ? event.type : `${event.type} ${detail}`
  })
}
const BEGIN = ['call.started', 'call.connected', 'call.status']

async function untilStored(store: Store, sid: string, count: number): Promise<string[]> {
  return await until(`${sid} has ${count} events`, async () => {
    const story = await storyOf(store, sid)
    return story.length >= count && story
  })
}

describe('with the stores well', () => {
  let stack: TestStack
  let store: Store
  beforeAll(async () => {
    stack = await startTestStack({ DISCONNECT_GRACE: '60', MAX_MESSAGE_BYTES: '65536' })
    store = stack.redis
  })
  afterAll(async () => await stack.end())

  const refused = () => figure(stack.ingest.url, 'calltape_ingest_events_refused_total')
  const ignored = () => figure(stack.ingest.url, 'calltape_ingest_ignored_messages_total')
  const connections = () => figure(stack.ingest.url, 'calltape_ingest_connections')

  test('audio_is_counted_and_nothing_of_it_is_stored', async () => {
    const [talk, before] = [new Talk('audio'), await ignored()]
    const socket = await open(stack.ingest.url)
    send(socket, { event: 'connected' }, talk.start())
    for (let i = 0; i < 2000; i++) send(socket, talk.media())
    const { event, ...others } = talk.media()
    send(socket, JSON.stringify({ ...others, event }), '  { "event" : "media" , it is not even JSON', talk.stop())
    expect(await untilStored(store, 'audio', 4)).toEqual([...BEGIN, 'call.ended callended'])
    expect((await eventsOf(store, 'audio')).at(-1)!.meta).toMatchObject({ audio_messages: 2002 })
    expect((await ignored()) - before, 'with the `connected` message').toBe(2003)
    await close(socket)
    expect(await storyOf(store, 'audio'), 'it had ended').toHaveLength(4)
  })

  test('what_is_no_message_is_counted_and_the_connection_lives_on', async () => {
    const [talk, before] = [new Talk('garbage'), await refused()]
    const socket = await open(stack.ingest.url)
    const deep = `${'{"a":'.repeat(10_000)}1${'}'.repeat(10_000)}`
    send(socket, '', '{', '[]', '5', 'null', '"start"', Buffer.from(JSON.stringify(talk.start())), '{"event":"mark"}')
    send(socket, '{"event":{"event":"start"}}', `{"event":"start","start":${deep}}`, '{"event":"start","start":{}}')
    send(socket, { ...talk.start(), start: { call_sid: 'not a sid' } })
    send(socket, talk.start(), talk.mark('one'), `{"event":"dtmf","sequence_number":1,"dtmf":{"digit":${deep}}}`)
    expect(await untilStored(store, 'garbage', 5)).toEqual([...BEGIN, 'call.data one', 'call.data'])
    const { meta } = (await eventsOf(store, 'garbage')).at(-1)!
    expect(JSON.stringify(meta).slice(0, 100_000)).toContain('dtmf') // kept as text
    expect((await refused()) - before).toBeGreaterThanOrEqual(12)
    expect(socket.readyState).toBe(WebSocket.OPEN)
  })

  test('a_message_larger_than_allowed_ends_the_connection_and_that_is_known', async () => {
    const socket = await open(stack.ingest.url)
    send(socket, new Talk('huge').start(), `{"event":"mark","mark":{"name":"${'x'.repeat(70_000)}"}}`)
    await once(socket, 'close')
    expect(await untilStored(store, 'huge', 4)).toEqual([
      ...BEGIN,
      expect.stringMatching(/^call\.disconnected closed with/),
    ])
  })

  test('closing_without_a_stop_is_a_disconnect', async () => {
    const before = await connections()
    const socket = await open(stack.ingest.url)
    expect(await connections()).toBe(before + 1)
    send(socket, new Talk('lost').start())
    await untilStored(store, 'lost', 3)
    socket.terminate()
    expect(await untilStored(store, 'lost', 4)).toEqual([...BEGIN, 'call.disconnected closed with 1006'])
    expect(await connections()).toBe(before)
    await close(await open(stack.ingest.url)) // of no call: there is nothing to say
  })

  test('a_stop_before_the_start_ends_the_call', async () => {
    const socket = await open(stack.ingest.url)
    send(socket, new Talk('stopped').stop('stopped'))
    await untilStored(store, 'stopped', 1)
    await close(socket)
    expect(await storyOf(store, 'stopped')).toEqual(['call.ended stopped'])
  })

  test('another_call_on_the_same_connection_leaves_the_first_one', async () => {
    const [first, second] = [new Talk('first'), new Talk('second')]
    const socket = await open(stack.ingest.url)
    send(socket, first.start(), first.media(), second.start(), second.media(), second.media(), second.stop())
    expect(await untilStored(store, 'second', 4)).toEqual([...BEGIN, 'call.ended callended'])
    expect((await eventsOf(store, 'second')).at(-1)!.meta).toMatchObject({ audio_messages: 2 })
    expect(await storyOf(store, 'first')).toEqual([...BEGIN, 'call.disconnected went on with another call'])
    send(socket, first.stop())
    expect(await untilStored(store, 'first', 5)).toContain('call.ended callended')
    await close(socket)
    expect([await storyOf(store, 'first'), await storyOf(store, 'second')].map(({ length }) => length)).toEqual([5, 4])
  })

  test('two_connections_of_one_call_are_one_call_and_the_older_one_may_go', async () => {
    const talk = new Talk('twice')
    const messages = [talk.start(), talk.mark('one'), talk.mark('two')]
    const [older, newer] = [await open(stack.ingest.url), await open(stack.ingest.url)]
    send(older, ...messages)
    await untilStored(store, 'twice', 5)
    send(newer, ...messages)
    await untilStored(store, 'twice', 10)
    await close(older)
    await untilStored(store, 'twice', 11)
    const { session } = (await (await fetch(`${stack.ingest.url}/v1/calls/twice`)).json()) as { session: Message }
    expect(session.connection).toBe('connected')
    const rows = await until('its events are committed', async () => {
      const { rows } = await stack.database.pool.query('SELECT type FROM call_events WHERE call_sid = $1', ['twice'])
      return rows.length >= 7 && rows
    })
    const types = rows.map(({ type }) => type as string).sort()
    const connected = ['call.connected', 'call.connected']
    expect(types).toEqual([...connected, 'call.data', 'call.data', 'call.disconnected', 'call.started', 'call.status'])
  })
})

describe('with Redis away', () => {
  async function prepare(environment: Record<string, string> = {}): Promise<[KillableStore, Ingest]> {
    const redis = await KillableStore.redis()
    onTestFinished(() => redis.end())
    return [redis, await testIngest({ REDIS_URL: redis.url, ...environment })]
  }

  async function storeOf(redis: KillableStore): Promise<Store> {
    const client = (await connectRedis(redis.url, log)) as Redis
    onTestFinished(() => client.disconnect())
    return { client, partitions: new Partitions(64) }
  }

  test('the_spool_keeps_all_in_order', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'calltape-provider-spool-'))
    onTestFinished(() => rm(folder, { recursive: true, force: true }))
    const [redis, { url }] = await prepare({ SPOOL_DIR: folder })
    const talk = new Talk('away')
    const socket = await open(url)
    send(socket, talk.start(), talk.mark('before'))
    await untilStored(await storeOf(redis), 'away', 4)
    await redis.kill()
    send(socket, talk.mark('while 1'), talk.media(), talk.mark('while 2'))
    await until('it is spooled', async () => (await figure(url, 'calltape_ingest_spool_bytes')) > 0)
    send(socket, talk.mark('while 3'))
    await redis.start()
    const store = await storeOf(redis)
    await untilStored(store, 'away', 7)
    send(socket, talk.stop())
    const story = [
      ...BEGIN,
      'call.data before',
      'call.data while 1',
      'call.data while 2',
      'call.data while 3',
      'call.ended callended',
    ]
    await until('the end is stored', async () => (await storyOf(store, 'away')).includes('call.ended callended'))
    // What went both ways has one key.
    const events = await eventsOf(store, 'away')
    const once = [
      ...new Map(events.map((event) => [`${event.type} ${event.id ?? JSON.stringify(event)}`, event])).values(),
    ]
    expect(once.map(({ type }) => type)).toEqual(story.map((each) => each.split(' ')[0]))
    expect([...new Set(await storyOf(store, 'away'))]).toEqual(story)
    expect(await figure(url, 'calltape_ingest_undelivered_events_total')).toBe(0)
  })

  test('a_stop_leaves_nothing_in_the_spool_while_Redis_is_well', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'calltape-provider-spool-'))
    onTestFinished(() => rm(folder, { recursive: true, force: true }))
    const redis = await freshRedis()
    onTestFinished(() => redis.drop())
    const { url, stop } = await testIngest({ REDIS_URL: redis.url, SPOOL_DIR: folder })
    send(await open(url), new Talk('stopped').start())
    await untilStored(redis, 'stopped', BEGIN.length)
    await stop()
    expect(await storyOf(redis, 'stopped')).toEqual([...BEGIN, 'call.disconnected closed with 1001'])
  })

  test('without_a_spool_what_may_be_lost_is_counted', async () => {
    const [redis, { url }] = await prepare()
    const talk = new Talk('lost')
    const socket = await open(url)
    send(socket, talk.start())
    await untilStored(await storeOf(redis), 'lost', 3)
    await redis.freeze()
    send(socket, talk.mark('one'), talk.mark('two'))
    await until('it is given up', async () => (await figure(url, 'calltape_ingest_undelivered_events_total')) === 2)
    await redis.thaw()
    expect(socket.readyState).toBe(WebSocket.OPEN)
    send(socket, talk.mark('three'))
    const story = await untilStored(await storeOf(redis), 'lost', 6)
    expect(story.at(-1)).toBe('call.data three')
  })
})

test('what_an_adapter_cannot_cope_with_is_kept_as_it_is', async () => {
  const redis = await freshRedis()
  onTestFinished(() => redis.drop())
  const { appender, metrics } = new Producer(redis)
  const adapter = {
    toEvents({ fails }: Message) {
      if (fails) throw new Error('a bug')
      return [{ type: 'call.started' as const, call_sid: 'CA1' }]
    },
  }
  const connection = new ProviderConnection('some', adapter, new Deliveries(appender), metrics, log)
  for (const text of ['{"fails":0}', '{}', '{"fails":1}']) connection.accept(Buffer.from(text))
  expect(await untilStored(redis, 'CA1', 4)).toHaveLength(4)
  expect((await eventsOf(redis, 'CA1')).at(-1)).toMatchObject({ meta: { not_translated: '{"fails":1}' } })
})

describe('while ingest does not serve', () => {
  test('connections_are_turned_away_with_503_and_the_open_ones_are_listened_to', async () => {
    const redis = await freshRedis()
    onTestFinished(() => redis.drop())
    const { appender, metrics } = new Producer(redis)
    const config = readConfig({})
    const { client, partitions } = redis
    const deliveries = new Deliveries(appender)
    const routes = new IngestRoutes({ config, redis: client, partitions, appender, deliveries, metrics, log })
    const bodies = { maxBytes: 65_536, maxHeldBytes: 1_000_000 }
    const options = { host: '127.0.0.1', port: 0, tokens: [], maxMessageBytes: 65_536, bodies }
    const server = await listen(options, routes)
    const stop = () => {
      server.stopListening()
      server.closeConnections()
    }
    onTestFinished(stop)
    const url = `http://127.0.0.1:${server.port}`
    const status = { CallSid: 'phases', Status: 'in-progress' }
    const headers = { 'Content-Type': 'application/json' }
    const post = () => fetch(`${url}/webhooks/exotel/status`, { method: 'POST', headers, body: JSON.stringify(status) })

    const expectTurnedAway = async () => {
      await expect(open(url)).rejects.toThrow('Unexpected server response: 503')
      const response = await post()
      expect([response.status, response.headers.get('retry-after')]).toEqual([503, '2'])
    }
    await expectTurnedAway()
    routes.phase = 'serving'
    const talk = new Talk('phases')
    const socket = await open(url)
    send(socket, talk.start())
    await untilStored(redis, 'phases', 3)
    routes.phase = 'stopping'
    await expectTurnedAway()
    send(socket, talk.mark('late'))
    await untilStored(redis, 'phases', 4)
    stop()
    const story = await untilStored(redis, 'phases', 5)
    expect(story).toEqual([...BEGIN, 'call.data late', 'call.disconnected closed with 1001'])
  })
})
