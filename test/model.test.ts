/**
 * The model check: whatever producers say, in whatever order, over whatever connections, and whoever dies meanwhile,
 * PostgreSQL holds what a plain fold over the stream's entries says (test/support/model.ts).
 *
 * `npm run test:faults` runs 2,000 cases, `MODEL_RUNS` as many as it says, instead of as many as fit into some seconds. A failure
 * names its seed and path; `MODEL_SEED` and `MODEL_PATH` run that case again.
 */
import fc from 'fast-check'
import { afterAll, beforeAll, expect, inject, test } from 'vitest'
import { childEnvironment } from '../shared/config.js'
import type { CallEvent } from '../shared/events.js'
import { call, type Said } from './support/arbitrary-calls.js'
import { LINK_FAULTS } from './support/link.js'
import { expectedEvents, expectedRow, expectedTurns, type Heard, keyOf } from './support/model.js'
import { entriesOf, sessionOf } from './support/streams.js'
import { type Delivery, type IngestFault, TRANSPORTS, World } from './support/world.js'

const { MODEL_RUNS, MODEL_SEED: SEED, MODEL_PATH } = childEnvironment()
const RUNS = Number(MODEL_RUNS ?? inject('longFaults')?.modelRuns ?? 0)
const DEFAULT_MS = 15_000
const SHRINK_MS = 60_000

interface Case {
  calls: Said[][]
  /** Into how many parts the calls are cut; each is delivered when the one before has been. */
  parts: number
  lanes: { transport: Delivery['transport']; ingest: 0 | 1; sizes: number[]; share: number }[]
  /** After each part: nothing, all of it is committed first, or the calls are presumed over. */
  between: ('go on' | 'settle' | 'presume over')[]
  faults: { who: 'sink' | 'ingest'; part: number; nth: number; fault: IngestFault }[]
}

const cases: fc.Arbitrary<Case> = fc.record({
  calls: fc.array(call, { minLength: 1, maxLength: 3 }),
  parts: fc.integer({ min: 1, max: 3 }),
  lanes: fc.array(
    fc.record({
      transport: fc.constantFrom(...TRANSPORTS),
      ingest: fc.constantFrom(0 as const, 1 as const),
      sizes: fc.array(fc.integer({ min: 1, max: 7 }), { minLength: 1, maxLength: 3 }),
      share: fc.integer({ min: 1, max: 5 }),
    }),
    { minLength: 1, maxLength: 3 },
  ),
  between: fc.array(fc.constantFrom('go on', 'settle', 'presume over'), { minLength: 3, maxLength: 3 }),
  faults: fc.array(
    fc.record({
      who: fc.constantFrom('sink', 'ingest'),
      part: fc.nat(2),
      nth: fc.integer({ min: 1, max: 30 }),
      fault: fc.constantFrom<IngestFault[]>(...LINK_FAULTS, 'stops'),
    }),
    { maxLength: 2 },
  ),
})

interface Sent {
  call_sid: string
  meta: { n: number }
}

let world: World
beforeAll(async () => {
  world = await World.begin()
})
afterAll(() => world.end())

let calls = 0

/** Every event carries a number of its own in `meta`, by which it is known wherever it ends up. */
function numbered(given: Said[][]): { sids: string[]; events: Sent[] } {
  const sids = given.map(() => `call-${++calls}`)
  const events: Sent[] = []
  const longest = Math.max(...given.map(({ length }) => length))
  for (let i = 0; i < longest; i++) {
    given.forEach((said, c) => {
      if (said[i]) events.push({ ...said[i], call_sid: sids[c]!, meta: { n: events.length } })
    })
  }
  return { sids, events }
}

/** Deals events out among the lanes, a few at a time. */
function deal(events: Sent[], lanes: Case['lanes']): (Delivery & { events: Sent[] })[] {
  const hands = lanes.map((lane): Delivery & { events: Sent[] } => ({ ...lane, events: [] }))
  for (let at = 0, i = 0; at < events.length; i++) {
    const { share } = lanes[i % lanes.length]!
    hands[i % lanes.length]!.events.push(...events.slice(at, at + share))
    at += share
  }
  return hands
}

/** An ingest that fails is that of the first lane: it has something to do. */
function arm({ who, nth, fault }: Case['faults'][number], [lane]: Case['lanes']): void {
  if (who === 'sink') world.failSink(nth, fault === 'stops' ? 'dies' : fault)
  else world.failIngest(lane!.ingest, 1 + (nth % 6), fault) // it has fewer messages to fail at
}

async function play({ calls: given, parts, lanes, between, faults }: Case): Promise<void> {
  const { sids, events } = numbered(given)
  const size = Math.ceil(events.length / parts)
  const delivered: Sent[][] = []
  for (let part = 0; part < parts; part++) {
    const pending = faults.filter((fault) => fault.part === part)
    for (const fault of pending) arm(fault, lanes)
    const hands = deal(events.slice(part * size, (part + 1) * size), lanes)
    await Promise.all(hands.map((hand) => world.deliver(hand)))
    delivered.push(...hands.map((hand) => hand.events))
    if (between[part] === 'presume over') await world.presumeOver(sids)
    if (between[part] !== 'go on' || pending.length > 0) await world.settled(sids)
    await world.disarm()
  }
  for (const sid of sids) await compareSettled(sid, delivered)
}

/** That a bound connection was closed may be recorded when all else is settled: then it is compared once more. */
async function compareSettled(sid: string, delivered: Sent[][]): Promise<void> {
  for (;;) {
    const entries = await entriesOf(world.redis, sid)
    await world.settled([sid])
    try {
      await compare(sid, entries, delivered)
      return
    } catch (error) {
      if ((await entriesOf(world.redis, sid)).length === entries.length) throw error
    }
  }
}

async function compare(sid: string, given: Awaited<ReturnType<typeof entriesOf>>, delivered: Sent[][]): Promise<void> {
  const entries = given.map(([id, fields]): Heard => ({ id, event: JSON.parse(fields[1]!) as CallEvent }))
  expectAllInOrder(sid, entries, delivered)
  const { pool } = world.database
  const rowsOf = async (table: string) => (await pool.query(`SELECT * FROM ${table} WHERE call_sid = $1`, [sid])).rows

  const turns = (await rowsOf('call_transcript_turns')).map((row) => [row.turn_id, row.stream_id, row.seq, row.meta.n])
  const expected = expectedTurns(entries)
  const turnRow = (heard: (typeof expected)[number]) => [
    keyOf(heard),
    heard.id,
    heard.event.seq ?? null,
    heard.event.meta?.n,
  ]
  expect(turns.sort(), 'call_transcript_turns').toEqual(expected.map(turnRow).sort())

  const stored = (await rowsOf('call_events')).map((row) => [row.event_id, row.stream_id, row.event])
  const events = expectedEvents(entries).map((heard) => [keyOf(heard), heard.id, heard.event])
  expect(stored.sort(), 'call_events').toEqual(events.sort())

  const rows = await rowsOf('call_sessions')
  if (entries.length === 0) {
    expect(rows).toEqual([])
    return
  }
  expect(rows).toHaveLength(1)
  const row = expectedRow(entries)
  expect(
    comparable(rows[0]),
    `call_sessions, folded from\n${entries.map((e) => JSON.stringify(e)).join('\n')}`,
  ).toMatchObject(row)
  await expectCounted(sid, row.finalized as boolean)
}

function comparable({ finalized_at, full_transcript, ...row }: Record<string, unknown>): Record<string, unknown> {
  const transcript = (full_transcript as { timestamp: string }[] | null)?.map((said) => ({
    ...said,
    timestamp: Date.parse(said.timestamp),
  }))
  return { ...row, full_transcript: transcript ?? null, finalized: finalized_at !== null }
}

/** What was acked is in the stream, in the order of its lane; and nothing else is. */
function expectAllInOrder(sid: string, entries: Heard[], delivered: Sent[][]): void {
  const places = new Map<number, number>()
  for (const [i, { event }] of entries.entries()) {
    const n = event.meta?.n as number | undefined
    if (n !== undefined && !places.has(n)) places.set(n, i)
  }
  const mine = delivered.map((lane) => lane.filter((event) => event.call_sid === sid).map(({ meta }) => meta.n))
  expect([...places.keys()].sort(), 'entries of the stream').toEqual(mine.flat().sort())
  for (const lane of mine) {
    const order = lane.map((n) => places.get(n)!)
    expect(order, 'order in the stream').toEqual(order.toSorted((a, b) => a - b))
  }
}

/** A call that is live will be looked after; one that is over is not counted as active any more. */
async function expectCounted(sid: string, isFinal: boolean): Promise<void> {
  const { client, partitions } = world.redis
  const isOpen = (await client.zscore(partitions.of(sid).open, sid)) !== null
  const isEnded = (await client.hget(sessionOf(world.redis, sid), 'ended')) !== null
  if (!isFinal) expect({ isOpen, isEnded }, 'a live call').toEqual({ isOpen: true, isEnded: false })
  else expect(isOpen, 'an ended call').toBe(!isEnded)
}

test(
  'PostgreSQL_holds_what_the_model_says_whoever_dies_meanwhile',
  async () => {
    const deadline = RUNS > 0 ? Number.POSITIVE_INFINITY : Date.now() + DEFAULT_MS
    let stopShrinking = Number.POSITIVE_INFINITY
    let played = 0
    const property = fc.asyncProperty(cases, async (given) => {
      if (Date.now() > Math.min(deadline, stopShrinking)) return
      try {
        await play(given)
        played++
      } catch (error) {
        if (stopShrinking === Number.POSITIVE_INFINITY) stopShrinking = Date.now() + SHRINK_MS
        throw error
      }
    })
    await fc.assert(property, {
      numRuns: RUNS > 0 ? RUNS : 5000,
      ...(SEED === undefined ? {} : { seed: Number(SEED) }),
      ...(MODEL_PATH === undefined ? {} : { path: MODEL_PATH }),
    })
    const faults = [...world.happened].map(([what, times]) => `${what} ${times}`).join(', ')
    process.stderr.write(`model check: ${played} cases agreed; ${faults}\n`)
  },
  Math.max(120_000, RUNS * 1000),
)
