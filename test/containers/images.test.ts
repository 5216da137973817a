/** Which suites `npm run test:containers` leaves out, and that its stores can do what suites ask of the local ones. */
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Redis } from 'ioredis'
import { expect, inject, onTestFinished, test, vi } from 'vitest'
import { PACKAGE_ROOT } from '../../shared/package-root.js'
import { connectRedis } from '../../shared/redis.js'
import { launchPostgres, launchRedis } from '../support/store-server.js'
import { log, patientPool, until } from '../support/stores.js'
import { NOT_IN_CONTAINERS } from './images.js'

vi.setConfig({ testTimeout: 120_000 }) // each starts a server or two

/** What gives a suite a store, or something that has one. */
const STORES =
  /\b(freshRedis|ownRedis|freshDatabase|startTestStack|freshLeases|testIngest|KillableStore|(start|launch)(Redis|Postgres))\b/

test('suites_that_are_not_run_in_containers_use_no_store_or_are_named_with_the_reason', () => {
  const outside = ['cli', 'client', 'ingest', 'sink', 'shared'].flatMap((folder) =>
    readdirSync(join(PACKAGE_ROOT, folder), { recursive: true, encoding: 'utf8' })
      .filter((file) => file.endsWith('.test.ts'))
      .map((file) => `${folder}/${file}`),
  )
  expect(outside.length).toBeGreaterThan(20)
  const withStores = outside.filter((file) => STORES.test(readFileSync(join(PACKAGE_ROOT, file), 'utf8')))
  expect(withStores.filter((file) => !(file in NOT_IN_CONTAINERS))).toEqual([])
})

test('a_Redis_that_is_killed_comes_back_at_its_address_with_what_it_had_synced', async () => {
  const server = await launchRedis(inject('images'), { args: ['--appendfsync', 'always'] })
  onTestFinished(() => server.stop())
  const client = (await connectRedis(server.url, log)) as Redis
  onTestFinished(() => client.disconnect())
  await client.set('key', 'value')
  for (const signal of ['SIGKILL', 'SIGTERM'] as const) {
    await server.kill(signal)
    await expect(client.get('key')).rejects.toThrow()
    await server.start()
    await until('it is connected again', () => client.status === 'ready')
    expect(await client.get('key')).toBe('value')
  }
})

test('a_frozen_Redis_keeps_its_connections_and_answers_when_it_is_thawed', async () => {
  const server = await launchRedis(inject('images'))
  onTestFinished(() => server.stop())
  const client = (await connectRedis(server.url, log)) as Redis
  onTestFinished(() => client.disconnect())
  await server.signal('SIGSTOP')
  let pong: string | undefined
  const asked = client.ping().then((answer) => {
    pong = answer
  })
  await new Promise((done) => setTimeout(done, 300))
  expect(pong).toBeUndefined()
  await server.signal('SIGCONT')
  await asked
  expect(pong).toBe('PONG')
})

test('another_Redis_reaches_it_at_its_peer_address', async () => {
  const primary = await launchRedis(inject('images'))
  onTestFinished(() => primary.stop())
  const { host, port } = primary.peer
  const replica = await launchRedis(inject('images'), { args: ['--replicaof', host, String(port)] })
  onTestFinished(() => replica.stop())
  const client = (await connectRedis(replica.url, log)) as Redis
  onTestFinished(() => client.disconnect())
  await until('they are linked', async () => (await client.info('replication')).includes('master_link_status:up'))
})

test('a_PostgreSQL_that_is_killed_comes_back_at_its_address_with_what_was_committed', async () => {
  const server = await launchPostgres(inject('images'), { settings: { shared_buffers: '64MB', work_mem: '8MB' } })
  onTestFinished(() => server.stop())
  const rowsOf = async (...queries: string[]) => {
    const pool = patientPool(server.url, 'test', 1)
    let rows: unknown[] = []
    for (const query of queries) rows = (await pool.query(query)).rows
    await pool.end()
    return rows
  }
  expect(await rowsOf('SHOW work_mem')).toEqual([{ work_mem: '8MB' }])
  expect(await rowsOf('SHOW server_encoding')).toEqual([{ server_encoding: 'UTF8' }])
  expect(await rowsOf('SHOW TimeZone')).toEqual([{ TimeZone: 'UTC' }])
  await rowsOf('CREATE TABLE kept (text text)', `INSERT INTO kept VALUES ('नमस्ते')`)
  for (const signal of ['SIGKILL', 'SIGINT'] as const) {
    await server.kill(signal)
    await expect(rowsOf('TABLE kept')).rejects.toThrow()
    await server.start()
    expect(await rowsOf('TABLE kept')).toEqual([{ text: 'नमस्ते' }])
  }
})
