import { describe, expect, test } from 'vitest'
import { divide } from './share.js'

const sinks = (count: number) => Array.from({ length: count }, (_, i) => `sink-${i}`)
const sizes = (owners: string[], all: string[]) => all.map((sink) => owners.filter((owner) => owner === sink).length)

describe('divide', () => {
  test.each([
    [64, 1],
    [64, 2],
    [64, 3],
    [64, 7],
    [4096, 16],
    [1, 2],
    [3, 5],
  ])(
    'gives_every_one_of_%i_partitions_to_one_of_%i_sinks_and_none_more_than_one_above_another',
    (partitions, count) => {
      const all = sinks(count)
      const owners = divide(partitions, all)
      expect(owners).toHaveLength(partitions)
      const each = sizes(owners, all)
      expect(each.reduce((a, b) => a + b)).toBe(partitions)
      expect(Math.max(...each) - Math.min(...each)).toBeLessThanOrEqual(1)
    },
  )

  test('leaves_most_partitions_where_they_were_when_a_sink_comes_or_goes', () => {
    const four = divide(64, sinks(4))
    const three = divide(64, sinks(3))
    const stayed = four.filter((owner, p) => owner !== 'sink-3' && three[p] === owner).length
    expect(stayed).toBeGreaterThan(48 * 0.6) // by a modulus it would be a third
  })
})
