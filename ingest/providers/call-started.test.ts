import { expect, test } from 'vitest'
import { callStarted } from './call-started.js'

const COMMON = { call_sid: 'X', source: 'acme' }
const started = (direction: unknown, from?: string, to?: string, more = {}) =>
  callStarted(COMMON, 'acme', { direction, from, to }, more)

test('said_again_it_is_the_same_event_and_what_says_more_is_another', () => {
  const first = started('inbound', '+1')
  expect(first).toMatchObject({ ...COMMON, type: 'call.started', provider: 'acme', direction: 'inbound', from: '+1' })
  expect(started('inbound', '+1', undefined, { ts: 5 })).toMatchObject({ id: first.id, ts: 5 })
  const ids = [first, started('inbound', '+1', '+2'), started('outbound', '+1'), started(undefined)].map(({ id }) => id)
  expect(new Set(ids).size).toBe(ids.length)
})

test.each([
  ['inbound', 'inbound'],
  ['incoming', 'inbound'],
  ['inboundPhoneCall', 'inbound'],
  ['Outbound-API', 'outbound'],
  ['outgoing', 'outbound'],
  ['sideways', 'sideways'], // for parseEvent to keep in meta
  [undefined, undefined],
])('the_direction_%s_is_%s', (word, direction) => {
  expect(started(word).direction).toBe(direction)
})
