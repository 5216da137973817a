/** What becomes of a connection to Redis that breaks. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Redis } from 'ioredis'
import { expect, onTestFinished, test } from 'vitest'
import { connectRedis } from '../shared/redis.js'
import { Relay } from './support/relay.js'
import { freshRedis, log } from './support/stores.js'

const LONGER_THAN_SILENCE_MS = 6500

test('one_that_takes_the_place_of_a_broken_one_is_not_cut_for_what_that_one_owed', async () => {
  const redis = await freshRedis()
  onTestFinished(() => redis.drop())
  const relay = await Relay.start(redis.url)
  onTestFinished(() => relay.stop())
  const client = (await connectRedis(relay.url, log)) as Redis
  onTestFinished(() => client.disconnect())
  relay.onChunk = (chunk) => (chunk.includes('owed') ? 'drop' : 'pass')
  await expect(client.get('owed')).rejects.toThrow()
  let closed = 0
  client.on('close', () => closed++)
  const began = performance.now()
  while (performance.now() - began < LONGER_THAN_SILENCE_MS) {
    await client.ping().catch(() => undefined) // while it is being opened
    await sleep(50)
  }
  expect(closed).toBeLessThanOrEqual(1) // that of the broken one, if it was not noticed before
  expect(await client.ping()).toBe('PONG')
})
