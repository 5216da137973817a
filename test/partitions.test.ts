/** The partition count: fixed at the first start of ingest or sink, and only read by everybody else. */
import { afterEach, beforeEach, expect, onTestFinished, test } from 'vitest'
import { OperatorError } from '../shared/config.js'
import { PARTITIONS_KEY, Partitions } from '../shared/keys.js'
import { openPartitions, readPartitions } from '../shared/redis.js'
import { calltape } from './support/program.js'
import { freshDatabase, freshRedis, type RedisDatabase } from './support/stores.js'

let redis: RedisDatabase
beforeEach(async () => {
  redis = await freshRedis()
})
afterEach(() => redis.drop())

test('the_first_start_fixes_the_count_and_the_same_count_is_taken_from_then_on', async () => {
  for (let start = 0; start < 3; start++) expect((await openPartitions(redis.client, 16)).all).toHaveLength(16)
  expect(await redis.client.get(PARTITIONS_KEY)).toBe('16')
  expect(await redis.client.ttl(PARTITIONS_KEY)).toBe(-1)
})

test('another_count_is_refused_with_an_error_that_names_PARTITIONS_and_both_numbers', async () => {
  await openPartitions(redis.client, 16)
  const refused = openPartitions(redis.client, 32)
  await expect(refused).rejects.toBeInstanceOf(OperatorError)
  await expect(refused).rejects.toThrow(/PARTITIONS is 32.*16.*Set PARTITIONS=16/)
  expect(await redis.client.get(PARTITIONS_KEY)).toBe('16')
})

test('of_processes_that_start_at_once_with_different_counts_one_count_wins', async () => {
  const starts = await Promise.allSettled([8, 16, 32, 8, 16, 32].map((count) => openPartitions(redis.client, count)))
  const won = starts.flatMap((start) => (start.status === 'fulfilled' ? [start.value.all.length] : []))
  const fixed = Number(await redis.client.get(PARTITIONS_KEY))
  expect(won).toEqual([fixed, fixed])
})

test('a_count_that_is_no_number_is_refused', async () => {
  await redis.client.set(PARTITIONS_KEY, 'many')
  await expect(openPartitions(redis.client, 16)).rejects.toThrow(/PARTITIONS/)
})

test('who_only_looks_fixes_nothing', async () => {
  expect((await readPartitions(redis.client, 16)).all).toHaveLength(16)
  expect(await redis.client.dbsize()).toBe(0)
  await openPartitions(redis.client, 32)
  expect((await readPartitions(redis.client, 16)).all, 'as Redis has it').toHaveLength(32)
  await redis.client.set(PARTITIONS_KEY, 'many')
  await expect(readPartitions(redis.client, 16)).rejects.toThrow(OperatorError)
})

test('show_and_verify_leave_an_empty_Redis_empty', async () => {
  const database = await freshDatabase()
  onTestFinished(() => database.drop())
  const environment = { REDIS_URL: redis.url, DATABASE_URL: database.url, PARTITIONS: '16' }
  for (const args of [
    ['show', 'CA1'],
    ['verify', '--call', 'CA1'],
  ]) {
    const { code, err } = await calltape(args, environment)
    expect(code, err).toBe(2)
    expect(err).toContain(`${new Partitions(16).of('CA1').streamPrefix}CA1`)
  }
  expect(await redis.client.dbsize()).toBe(0)
})
