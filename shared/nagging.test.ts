import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { Nagging } from './nagging.js'

beforeEach(() => void vi.useFakeTimers())
afterEach(() => void vi.useRealTimers())

test('what_goes_wrong_is_said_once_then_every_half_minute_and_at_once_when_it_comes_back', () => {
  const nagging = new Nagging()
  const said = (what: string, seconds: number) => {
    let lines = 0
    for (let second = 0; second < seconds; second++, vi.advanceTimersByTime(1000)) if (nagging.isDue(what)) lines++
    return lines
  }
  expect(said('a', 29)).toBe(1)
  expect(said('b', 1), 'each by itself').toBe(1)
  expect(said('a', 31)).toBe(2)
  expect(nagging.said).toEqual(['a', 'b'])
  expect(nagging.isOver('a')).toBe(true)
  expect(nagging.isOver('a')).toBe(false)
  expect(said('a', 1)).toBe(1)
})
