/**
 * Whatever comes, and however it fails, no log line has what was said in a call, nor a phone number: all of it is marked, and looked
 * for in what real processes write at LOG_LEVEL=trace. Needs a built dist/.
 */
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { WebSocket } from 'ws'
import {
  type Fixture,
  fixturesOf,
  playStream,
  providersWithFixtures,
  type RequestFixture,
  sendRequest,
} from './support/fixtures.js'
import { Service } from './support/processes.js'
import { calltape } from './support/program.js'
import { type Database, freshDatabase, freshRedis, type RedisDatabase, until } from './support/stores.js'
import { streamOf } from './support/streams.js'

const CANARY = 'kanarienvogel'
const NUMBERS = ['+4915112345678', '+442079460958', '02079460111', '919876543210']
/** By itself a call_sid; never one of the numbers. */
const SID = 'CAcanary-0001'
/** A call_sid that is a number. */
const NUMBER_SID = '+33142685300'

/**
 * Words of the database's owner, with what was said in them, in each class of SQLSTATE: to be tried again, to be mended, unclear, and
 * of the data. (What stops all others is raised a few times only.)
 */
const TRIGGERS = `
  CREATE SEQUENCE raised_retry; CREATE SEQUENCE raised_stop; CREATE SEQUENCE raised_unclear;
  CREATE FUNCTION canary() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.text LIKE 'retry%' AND nextval('raised_retry') <= 2 THEN RAISE EXCEPTION '%', NEW.text USING ERRCODE = '40001'; END IF;
    IF NEW.text LIKE 'stop%' AND nextval('raised_stop') <= 2 THEN RAISE EXCEPTION '%', NEW.text USING ERRCODE = '42P01'; END IF;
    IF NEW.text LIKE 'unclear%' AND nextval('raised_unclear') <= 2 THEN RAISE EXCEPTION '%', NEW.text USING ERRCODE = 'ZZ001'; END IF;
    IF NEW.text LIKE 'data%' THEN RAISE EXCEPTION '%', NEW.text; END IF;
    IF NEW.text LIKE 'cast%' THEN PERFORM NEW.text::integer; END IF;
    RETURN NEW;
  END $$;
  CREATE TRIGGER canary BEFORE INSERT ON call_transcript_turns FOR EACH ROW EXECUTE FUNCTION canary();
  CREATE TABLE legacy_calls (call_sid text PRIMARY KEY, full_transcript jsonb);
  CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    EXECUTE format('SELECT %L::integer', NEW.full_transcript); RETURN NEW; END $$;
  CREATE TRIGGER refuse BEFORE UPDATE ON legacy_calls FOR EACH ROW EXECUTE FUNCTION refuse();
  INSERT INTO legacy_calls VALUES ('${SID}'), ('${NUMBER_SID}')`

const words = (of: string) => `${of} ${CANARY}, call me at ${NUMBERS.join(' or ')}`

function eventsOf(callSid: string): object[] {
  const turns = ['retry', 'stop', 'unclear', 'data', 'cast', 'plain', 'nul \0'].map((of, seq) => {
    const more = { language: CANARY, speaker: CANARY, meta: { [CANARY]: words('meta') } }
    return { type: 'turn', call_sid: callSid, seq, text: words(of), ...more }
  })
  return [
    { type: 'call.started', call_sid: callSid, from: NUMBERS[0], to: `sip:${CANARY}@example.com`, provider: CANARY },
    ...turns,
    {
      type: 'call.data',
      call_sid: callSid,
      data: { number: NUMBERS[1] },
      stage: CANARY,
      objections: [words('objection')],
    },
    { type: 'call.status', call_sid: callSid, status: CANARY, recording_url: `https://example.com/${CANARY}` },
    { type: CANARY, call_sid: callSid, text: CANARY },
    { type: 'turn', call_sid: callSid, text: { [CANARY]: CANARY }, speaker: 7 },
    { type: 'call.ended', call_sid: callSid, reason: CANARY, outcome: words('outcome') },
  ]
}

/** All that people might have said in a fixture is marked; numbers stay as they are. @param numbers is added to */
function marked(value: unknown, numbers: Set<string>): unknown {
  if (typeof value === 'string') {
    if (/^\+\d{8,15}$/.test(value)) numbers.add(value.slice(1))
    return /\p{L} \p{L}/u.test(value) ? `${value} ${CANARY}` : value
  }
  if (Array.isArray(value)) return value.map((each) => marked(each, numbers))
  if (typeof value !== 'object' || value === null) return value
  return Object.fromEntries(
    Object.entries(value).map(([key, inner]) => [key, key === 'headers' ? inner : marked(inner, numbers)]),
  )
}

async function playFixtures(url: string, numbers: Set<string>): Promise<void> {
  const play = async (each: Fixture) => {
    for (const sent of marked(each.send, numbers) as typeof each.send) {
      if ('stream' in sent) await playStream(url, sent)
      else await playBroken(url, sent)
    }
  }
  await Promise.all(providersWithFixtures().flatMap((provider) => fixturesOf(provider).map(play)))
}

/** As it is, and cut off in the middle. */
async function playBroken(url: string, request: RequestFixture): Promise<void> {
  await sendRequest(url, request)
  if (request.json === undefined) return
  const text = JSON.stringify(request.json)
  const headers = { 'Content-Type': 'application/json', ...request.headers }
  await sendRequest(url, { ...request, json: undefined, text: `${text.slice(0, text.length >> 1)}${CANARY}`, headers })
}

/** Of this suite alone: the server is shared. */
async function cutConnections({ client, url }: RedisDatabase): Promise<void> {
  const database = new URL(url).pathname.slice(1)
  const own = await client.client('ID')
  for (const line of ((await client.client('LIST')) as string).split('\n')) {
    const [, id] = /^id=(\d+) /.exec(line) ?? []
    if (id === undefined || Number(id) === own || !line.includes(` db=${database} `)) continue
    await client.client('KILL', 'ID', id).catch(() => undefined) // it has gone by itself
  }
}

async function playWebSocket(url: string): Promise<void> {
  const socket = new WebSocket(`${url.replace('http', 'ws')}/v1/stream`)
  let isAcked = false
  const all = [...eventsOf(SID), ...eventsOf(NUMBER_SID)]
  socket.on('message', (data) => {
    const message = JSON.parse(data.toString()) as { type: string; through?: number }
    isAcked ||= message.type === 'ack' && message.through === all.length + 1
  })
  socket.on('open', () => {
    socket.send(`{"${CANARY}": ${NUMBERS[0]}`)
    for (const event of all) socket.send(JSON.stringify(event))
  })
  await until('all is acked', () => isAcked)
  socket.close()
}

/** What somebody else has put into the stream: poison. */
async function addPoison(redis: RedisDatabase): Promise<void> {
  const { client, partitions } = redis
  for (const fields of [
    ['e', `{"${CANARY}`],
    ['e', `["${CANARY}"]`],
    [CANARY, NUMBERS[0]!],
    ['e', Buffer.from(`\xff${CANARY}`, 'latin1')],
  ]) {
    await client.xadd(streamOf(redis, SID), '*', ...fields)
  }
  await client.zadd(partitions.of(SID).ready, Date.now(), SID)
}

async function start(redis: RedisDatabase, database: Database) {
  const folder = await mkdtemp(join(tmpdir(), 'calltape-test-log-'))
  const environment = {
    REDIS_URL: redis.url,
    DATABASE_URL: database.url,
    LOG_LEVEL: 'trace',
    INGEST_PORT: '0',
    SINK_METRICS_PORT: '0',
    SPOOL_DIR: join(folder, 'spool'),
    LEGACY_CALL_SESSIONS: 'legacy_calls',
    LEASE_SECONDS: '1',
  }
  const logs = ['ingest', 'sink'].map((name) => join(folder, `${name}.log`))
  const services = (['ingest', 'sink'] as const).map((name, i) => new Service({ name, environment, logFile: logs[i]! }))
  onTestFinished(async () => {
    await Promise.all(services.map((service) => service.end()))
    await rm(folder, { recursive: true, force: true })
  })
  const [url] = await Promise.all(services.map((service) => service.serves()))
  return { url: url!, services, logs, environment, folder }
}

test('no_log_line_has_what_was_said_nor_a_phone_number_and_calls_are_named', async () => {
  const [redis, database] = await Promise.all([freshRedis(), freshDatabase()])
  onTestFinished(() => Promise.all([redis.drop(), database.drop()]).then(() => undefined))
  await database.pool.query(TRIGGERS)
  const { url, services, logs, environment, folder } = await start(redis, database)
  const numbers = new Set(NUMBERS.map((number) => number.replace('+', '')).concat(NUMBER_SID.slice(1)))

  await playWebSocket(url)
  await fetch(`${url}/v1/events`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: `[{"text":"${CANARY}`,
  })
  await playFixtures(url, numbers)
  await addPoison(redis)
  await until(
    'all is stored',
    async () => (await redis.client.exists(...redis.partitions.all.flatMap((p) => [p.ready, p.leased]))) === 0,
    60_000,
  )
  await cutConnections(redis)
  const commands = await Promise.all([
    calltape(['verify'], environment),
    calltape(['quarantine', 'retry', '--all'], environment),
    calltape(['export', SID, '--format', 'vcon', '--out', join(folder, 'out.vcon')], environment),
    calltape(['erase', NUMBER_SID, '--dry-run'], environment),
  ])
  await Promise.all(services.map((service) => service.stop()))

  const { rows } = await database.pool.query(`SELECT text FROM call_transcript_turns WHERE text LIKE '%${CANARY}%'`)
  expect(rows.length).toBeGreaterThan(10) // it was all there to be said
  const written = (await Promise.all(logs.map((log) => readFile(log, 'utf8')))).join('')
  const lines = [...written.split('\n'), ...commands.map(({ err }) => err)]
  const telling = lines.filter((line) => line.includes(CANARY) || [...numbers].some((number) => line.includes(number)))
  expect(telling).toEqual([])
  for (const said of [
    'PostgreSQL cannot store',
    'raised in canary',
    'tried by themselves',
    'refuses what it is to be filled with',
    `"callSid":"${SID}"`,
    '"callSid":"+33•',
  ]) {
    expect(written).toContain(said)
  }
}, 150_000)
