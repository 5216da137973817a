/** `calltape show` while one of the stores cannot be asked. Needs a built dist/. */
import { expect, onTestFinished, test } from 'vitest'
import { newSid, seqs } from './support/calls.js'
import { calltape } from './support/program.js'
import { freshDatabase, freshRedis } from './support/stores.js'
import { Producer, turn } from './support/streams.js'

test('what_is_not_in_PostgreSQL_is_marked_and_nothing_is_where_PostgreSQL_cannot_be_asked', async () => {
  const [redis, database] = await Promise.all([freshRedis(), freshDatabase()])
  onTestFinished(() => Promise.all([redis.drop(), database.drop()]).then(() => undefined))
  const sid = newSid()
  await new Producer(redis).store(...seqs(3).map((seq) => turn(sid, seq)))
  const show = async (DATABASE_URL: string, ...options: string[]) => {
    const { code, out, err } = await calltape(['show', sid, ...options], { REDIS_URL: redis.url, DATABASE_URL })
    expect(code, err).toBe(0)
    return out
  }
  const marked = await show(database.url)
  expect(marked.match(/turn \d {2}← not in PostgreSQL yet$/gm)).toHaveLength(3)
  expect(marked).toContain('3 of 3 turns not in PostgreSQL yet: ')

  const nowhere = 'postgres://127.0.0.1:1/calltape'
  const unknown = await show(nowhere)
  expect(unknown).toMatch(/^ {2}PostgreSQL .*ECONNREFUSED/m)
  expect(unknown.match(/turn \d$/gm)).toHaveLength(3)
  expect(unknown).not.toContain('yet')
  const { turns } = JSON.parse(await show(nowhere, '--json')) as { turns: object[] }
  expect(turns).toMatchObject(seqs(3).map(() => ({ inRedis: true, inPostgres: null })))
})
