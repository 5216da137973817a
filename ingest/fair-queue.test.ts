import { expect, test } from 'vitest'
import type { Origin } from './append.js'
import { FairQueue, type Waiting } from './fair-queue.js'

const origin = (): Origin => ({ settle: () => undefined, settled: () => undefined })
const waiting = (origin: Origin, sid: string, position: number, chars = 10): Waiting => ({
  event: { type: 'turn', call_sid: sid, speaker: 'agent', text: '' },
  payload: 'x'.repeat(chars),
  origin,
  position,
})

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
  const queue = new FairQueue()
  const floods = Array.from({ length: 16 }, origin)
  for (const [n, flood] of floods.entries()) for (let i = 0; i < 4096; i++) queue.push(waiting(flood, `flood ${n}`, i))
  take(queue, 512)
  const late = origin()
  queue.push(waiting(late, 'late', 0))
  const next = [...take(queue, 512), ...take(queue, 512)].findIndex(({ origin }) => origin === late)
  expect(next).toBeGreaterThanOrEqual(0)
  expect(next).toBeLessThanOrEqual(16 * 32)
})

test('nobody_is_passed_over_because_the_turns_before_his_fill_a_batch_exactly', () => {
  const queue = new FairQueue()
  const [first, second, third] = [origin(), origin(), origin()]
  for (let i = 0; i < 1000; i++) {
    queue.push(waiting(first, 'first', i))
    queue.push(waiting(second, 'second', i))
    queue.push(waiting(third, 'third', i))
  }
  const batches = Array.from({ length: 9 }, () => take(queue, 64)).flat()
  for (const each of [first, second, third]) expect(batches.filter(({ origin }) => origin === each)).toHaveLength(192)
})

test('large_events_make_a_turn_shorter', () => {
  const queue = new FairQueue()
  const [large, small] = [origin(), origin()]
  for (let i = 0; i < 10; i++) queue.push(waiting(large, 'large', i, 60_000))
  for (let i = 0; i < 10; i++) queue.push(waiting(small, 'small', i))
  expect(take(queue, 4).map(({ origin }) => origin === small)).toEqual([false, true, true, true])
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
    for (let i = random(80); i > 0; i--) {
      const call = random(4)
      given[call]!.push(n)
      queue.push(waiting(origins[random(3)]!, `${call}`, n++))
    }
    for (const { event, position } of take(queue, random(70))) found[Number(event.call_sid)]!.push(position)
  }
  for (const { event, position } of take(queue, n)) found[Number(event.call_sid)]!.push(position)
  expect(queue.isEmpty).toBe(true)
  expect(found).toEqual(given)
})
