import { expect, test } from 'vitest'
import type { Origin } from './append.js'
import { FairQueue, TURN_CHARS, TURN_EVENTS, type Waiting } from './fair-queue.js'

const origin = (): Origin => ({ settle: () => undefined, settled: () => undefined })

function push(queue: FairQueue, origin: Origin, sid: string, position: number, chars = 10): void {
  queue.push(sid, 'x'.repeat(chars), { session: [], resumes: true }, origin, position)
}

/** Takes up to `room` events. */
function take(queue: FairQueue, room: number): Waiting[] {
  const taken: Waiting[] = []
  queue.take((next) => {
    if (taken.length === room) return false
    taken.push(next)
    return true
  })
  return taken
}

test('who_comes_late_waits_for_one_turn_of_each_other_however_much_they_have', () => {
  const FLOODS = 16
  const queue = new FairQueue()
  for (let n = 0; n < FLOODS; n++) {
    const flood = origin()
    for (let i = 0; i < 4 * TURN_EVENTS; i++) push(queue, flood, `flood ${n}`, i)
  }
  take(queue, 2 * TURN_EVENTS)
  const late = origin()
  push(queue, late, 'late', 0)
  const next = take(queue, 3 * FLOODS * TURN_EVENTS).findIndex(({ origin }) => origin === late)
  expect(next).toBe(FLOODS * TURN_EVENTS)
})

test('nobody_is_passed_over_because_the_turns_before_his_fill_a_batch_exactly', () => {
  const queue = new FairQueue()
  const origins = [origin(), origin(), origin()]
  for (let i = 0; i < 7 * TURN_EVENTS; i++) for (const [n, each] of origins.entries()) push(queue, each, `${n}`, i)
  const batches = Array.from({ length: 9 }, () => take(queue, 2 * TURN_EVENTS)).flat()
  for (const each of origins) expect(batches.filter(({ origin }) => origin === each)).toHaveLength(6 * TURN_EVENTS)
})

test('large_events_make_a_turn_shorter', () => {
  const queue = new FairQueue()
  const [large, small] = [origin(), origin()]
  for (let i = 0; i < 10; i++) push(queue, large, 'large', i, TURN_CHARS / 2)
  for (let i = 0; i < 10; i++) push(queue, small, 'small', i)
  expect(take(queue, 5).map(({ origin }) => origin === small)).toEqual([false, false, true, true, true])
})

test('a_call_keeps_its_order_whoever_brings_its_events', () => {
  const queue = new FairQueue()
  const origins = [origin(), origin(), origin()]
  const given: number[][] = [[], [], [], []]
  const found: number[][] = [[], [], [], []]
  let n = 0
  let a = 1
  const random = (below: number) => {
    a = (a * 48_271) % 0x7fffffff // the same numbers at every run
    return a % below
  }
  while (n < 20_000) {
    for (let i = random(TURN_EVENTS); i > 0; i--) {
      const call = random(4)
      given[call]!.push(n)
      push(queue, origins[random(3)]!, `${call}`, n++)
    }
    for (const { call, position } of take(queue, random(TURN_EVENTS))) found[Number(call.callSid)]!.push(position)
  }
  for (const { call, position } of take(queue, n)) found[Number(call.callSid)]!.push(position)
  expect(queue.isEmpty).toBe(true)
  expect(found).toEqual(given)
})
