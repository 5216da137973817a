/** What goes to Redis as bytes of our own making has to be what a client library would send. */
import { afterAll, beforeAll, expect, test } from 'vitest'
import { ScriptCall } from '../ingest/script-call.js'
import { freshRedis, type RedisDatabase } from './support/stores.js'

let redis: RedisDatabase
let sha: string
beforeAll(async () => {
  redis = await freshRedis()
  sha = (await redis.client.script('LOAD', 'return {KEYS, ARGV}')) as string
})
afterAll(() => redis.drop())

async function echo(call: ScriptCall, keys: string[], args: (string | number)[]): Promise<unknown> {
  for (const key of keys) call.key(key)
  for (const arg of args) call.arg(arg)
  const answer = await call.run(redis.client, { sha })
  call.reset()
  return answer
}

// Around the lengths at which a length has one digit more, in bytes and in characters, and those at which it is written otherwise.
const LENGTHS = [
  0, 1, 3, 4, 5, 9, 10, 11, 33, 34, 39, 40, 41, 49, 50, 51, 99, 100, 101, 333, 334, 999, 1000, 1001, 70_000,
]

test('every_argument_arrives_as_it_is_whatever_its_length_and_its_characters', async () => {
  const call = new ScriptCall()
  for (const character of ['a', 'é', '漢', '😀', 'a漢']) {
    const args = LENGTHS.map((length) => character.repeat(length))
    expect(await echo(call, ['ct:{0}:a', 'ct:{0}:é'], args)).toEqual([['ct:{0}:a', 'ct:{0}:é'], args])
  }
})

test('a_call_can_be_used_again_after_its_reply_and_says_nothing_of_the_one_before', async () => {
  const call = new ScriptCall()
  const keys = Array.from({ length: 150 }, (_, i) => `ct:{0}:${i}`)
  expect(await echo(call, keys, ['x'.repeat(3_000_000), 7, 0, 1_700_000_000_000])).toEqual([
    keys,
    ['x'.repeat(3_000_000), '7', '0', '1700000000000'],
  ])
  expect(await echo(call, ['ct:{0}:k'], ['v'])).toEqual([['ct:{0}:k'], ['v']])
})

test('calls_in_flight_at_once_do_not_touch_each_other', async () => {
  const calls = Array.from({ length: 20 }, () => new ScriptCall())
  const answers = await Promise.all(calls.map((call, i) => echo(call, [`ct:{0}:${i}`], [`${i} `.repeat(40_000)])))
  expect(answers).toEqual(calls.map((_, i) => [[`ct:{0}:${i}`], [`${i} `.repeat(40_000)]]))
})
