/** Which way events go, by what Redis and the disk do: here both do as they are told. */
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { type CallEvent, Refusal } from '../shared/events.js'
import { turn } from '../test/support/streams.js'
import type { Origin } from './append.js'
import { type Delivered, Deliveries } from './deliver.js'
import type { Spool, SpoolEntry } from './spool.js'

beforeEach(() => void vi.useFakeTimers())
afterEach(() => void vi.useRealTimers())

class Sender {
  isAway = false
  isFull = false
  isFullFor = () => this.isFull
  readonly waiting: ((refusal?: Refusal) => void)[] = []
  append(_event: CallEvent, _payload: string, origin: Origin, position: number): void {
    this.waiting.push((refusal) => origin.settle(position, refusal))
  }
}

let sender: Sender
/** What has been put into the spool. */
let entries: SpoolEntry[]
let spool: { isBehind: boolean; put(entry: SpoolEntry): void }
let deliveries: Deliveries
beforeEach(() => {
  sender = new Sender()
  entries = []
  spool = { isBehind: false, put: (entry) => void entries.push(entry) }
  deliveries = new Deliveries(sender)
  deliveries.spool = spool as Spool
})

function give(...seqs: number[]): { outcome: Delivered | undefined } {
  const told: { outcome: Delivered | undefined } = { outcome: undefined }
  void deliveries.deliverOrSpool(seqs.map((seq) => turn('CA1', seq))).then((outcome) => {
    told.outcome = outcome
  })
  return told
}

const pass = (ms: number) => vi.advanceTimersByTimeAsync(ms)
const seqsIn = (entry: SpoolEntry) => entry.payloads().map((payload) => (JSON.parse(payload) as { seq: number }).seq)

test('Redis_that_answers_in_time_is_all_there_is', async () => {
  const told = give(0, 1)
  sender.waiting[0]!()
  await pass(1000)
  expect(told.outcome).toBeUndefined()
  sender.waiting[1]!(new Refusal('not_stored', 'no'))
  await pass(0)
  expect(told.outcome).toMatchObject({ state: 'stored', refused: [{ index: 1, refusal: { code: 'not_stored' } }] })
  await pass(10_000)
  expect(entries).toEqual([])
})

test('what_waits_for_Redis_too_long_is_spooled_without_what_it_has_taken', async () => {
  const told = give(0, 1, 2)
  sender.waiting[1]!()
  await pass(3000)
  expect(entries.map(seqsIn)).toEqual([[0, 2]])
  entries[0]!.spooled()
  await pass(0)
  expect(told.outcome).toEqual({ state: 'spooled', refused: [] })
})

test('nothing_waits_for_Redis_when_it_is_away', async () => {
  sender.isAway = true
  give(0)
  await pass(0)
  expect([entries.length, sender.waiting.length]).toEqual([1, 0])
})

test('all_that_waits_for_Redis_goes_to_the_disk_before_the_first_one_that_goes_there_at_once', async () => {
  give(0)
  await pass(500)
  give(1)
  await pass(500)
  sender.isAway = true
  give(2)
  expect(entries.map(seqsIn)).toEqual([[0], [1], [2]])
})

test('what_passes_the_spool_by_goes_to_Redis_once', async () => {
  const first = give(0)
  await pass(2500)
  spool.isBehind = true
  const second = give(1)
  expect(entries.map(seqsIn)).toEqual([[0], [1]])
  for (const entry of entries) entry.passed()
  expect(sender.waiting).toHaveLength(2)
  for (const settle of sender.waiting) settle()
  await pass(0)
  expect([first.outcome?.state, second.outcome?.state]).toEqual(['stored', 'stored'])
})

test('a_spool_that_refuses_is_unavailable_at_once_for_what_Redis_was_not_given_and_later_for_the_rest', async () => {
  spool.put = (entry) => entry.failed('the spool is full')
  const early = give(0)
  await pass(2500)
  expect(early.outcome).toBeUndefined()
  spool.isBehind = true
  const late = give(1)
  await pass(0)
  expect(late.outcome).toEqual({ state: 'unavailable', reason: 'the spool is full', refused: [] })
  await pass(3000)
  expect(early.outcome).toMatchObject({ state: 'unavailable', reason: expect.stringMatching(/with their id or seq/) })
})

test('a_disk_that_hangs_is_unavailable_in_time', async () => {
  sender.isAway = true
  const told = give(0)
  await pass(6000)
  expect(told.outcome?.state).toBe('unavailable')
})
