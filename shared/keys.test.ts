import { expect, test } from 'vitest'
import { Partitions } from './keys.js'

/** How many calls each partition gets, as a share of what it would get if they were spread evenly. */
function shares(count: number, sids: string[]): number[] {
  const partitions = new Partitions(count)
  const calls = new Array<number>(count).fill(0)
  for (const sid of sids) calls[partitions.of(sid).partition]!++
  return calls.map((n) => (n * count) / sids.length)
}

const hex = (i: number) => ((i * 2654435761) % 2 ** 32).toString(16).padStart(8, '0')

test.each<[string, (i: number) => string]>([
  ['counted', (i) => `call-${i}`],
  ['counted with zeros', (i) => `CA${String(i).padStart(12, '0')}`],
  ['random', (i) => `CA${hex(i)}${hex(i + 7)}${hex(i * 3)}`],
  ['times', (i) => `${1_760_000_000_000 + i * 100}.${i % 10}`],
  ['numbers twice', (i) => `${i}-${i}`], // FNV's lowest bit is the same for all of them
  ['phone numbers', (i) => `+4915${100_000_000 + i * 17}`],
])('calls_spread_evenly_over_partitions: %s', (_kind, sidOf) => {
  const sids = Array.from({ length: 64_000 }, (_, i) => sidOf(i))
  for (const count of [2, 16, 60, 64]) {
    // With 1,000 calls in each of 64 partitions, 3 % is what chance alone makes of it.
    for (const share of shares(count, sids)) expect(Math.abs(share - 1)).toBeLessThan(0.2)
  }
})

test('a_call_has_its_partition_for_good', () => {
  // What is in Redis lies where this hash put it: with another one, it would not be found again.
  const partitions = new Partitions(64)
  const found = ['CA1', 'call-42', '+4915112345678', 'x'.repeat(128)].map((sid) => partitions.of(sid).partition)
  expect(found).toEqual([53, 58, 12, 28])
})

test('every_key_of_a_partition_carries_its_tag', () => {
  const partitions = new Partitions(64)
  for (const { partition, ...keys } of partitions.all) {
    for (const key of Object.values(keys)) expect(/^[^{]*\{([^}]+)\}/.exec(key)?.[1]).toBe(String(partition))
    expect(new Set(Object.values(keys)).size).toBe(Object.keys(keys).length)
  }
})

test('there_is_no_partition_beyond_the_count', () => {
  expect(() => new Partitions(8).at(8)).toThrow(RangeError)
})
