import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmod, mkdir, mkdtemp, realpath, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Redis } from 'ioredis'
import pg from 'pg'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { startPostgres } from './local-postgres.js'
import { findRedis, startRedis } from './local-redis.js'
import { type LocalServer, processInfo } from './local-server.js'

const stores = [
  { name: 'PostgreSQL', start: startPostgres, module: 'local-postgres.ts', save: saveRow, load: loadRow },
  { name: 'Redis', start: startRedis, module: 'local-redis.ts', save: saveKey, load: loadKey },
]

let folder: string
let dataDir: string
let servers: LocalServer[]

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'calltape-local-'))
  await chmod(folder, 0o711) // under root, PostgreSQL's own user must get in
  dataDir = join(folder, 'data')
  servers = []
})
afterEach(async () => {
  await Promise.all(servers.map((server) => server.stop()))
  await rm(folder, { recursive: true })
})
const keep = <S extends LocalServer>(server: S) => {
  servers.push(server)
  return server
}

describe.each(stores)('a local $name', ({ name, start, module, save, load }) => {
  test('finds its data at the second start, on the same port', async () => {
    const first = await start({ dataDir })
    await save(first.url)
    await first.stop()
    const port = Number(new URL(first.url).port)
    const second = keep(await start({ dataDir, port }))
    expect(second.url).toBe(first.url)
    expect(second.describe).toMatch(new RegExp(`^${name} [\\d.]+ on 127.0.0.1:${port}, data in ${dataDir}`))
    expect(await load(second.url)).toBe('kept')
  })

  test('says when it was killed, and starts again with its data', async () => {
    const first = await start({ dataDir })
    await save(first.url)
    process.kill(first.pid, 'SIGKILL')
    expect(await first.exited).toContain('killed by SIGKILL')
    const second = keep(await start({ dataDir }))
    expect(await load(second.url)).toBe('kept')
  })

  test('takes over from an orphan that a killed calltape left running', async () => {
    const orphan = await startAndLeave(module)
    await save(orphan.url)
    expect(processInfo(orphan.pid).args).toContain(dataDir)
    const said: string[] = []
    const second = keep(await start({ dataDir, say: (line) => said.push(line) }))
    expect(said.join()).toContain(`(pid ${orphan.pid}), which a killed calltape left running`)
    expect(processInfo(orphan.pid).args).toBe('')
    expect(await load(second.url)).toBe('kept')
  })

  test('leaves a server alone whose calltape still lives', async () => {
    const first = keep(await start({ dataDir }))
    await expect(start({ dataDir })).rejects.toThrow(`in use by another calltape (pid ${process.pid})`)
    await save(first.url)
  })

  test('leaves a stranger alone that has the pid of a dead server', async () => {
    const first = await start({ dataDir })
    await first.stop()
    const stranger = spawn('sleep', ['60'])
    await writeFile(`${dataDir}.pid`, `${stranger.pid} 1\n`)
    if (name === 'PostgreSQL') await writeFile(join(dataDir, 'postmaster.pid'), `${stranger.pid}\n`)
    keep(await start({ dataDir }))
    expect(stranger.exitCode ?? stranger.signalCode).toBe(null)
    stranger.kill()
  })

  test('takes another port if its own is taken', async () => {
    const other = createServer().listen(0, '127.0.0.1')
    await once(other, 'listening')
    const { port } = other.address() as { port: number }
    const said: string[] = []
    const server = keep(await start({ dataDir, port, say: (line) => said.push(line) }))
    expect(server.url).not.toContain(`:${port}`)
    expect(said.join()).toContain(`port ${port} is taken`)
    await save(server.url)
    other.close()
  })

  test('says what its log says when it does not start', async () => {
    const start =
      name === 'Redis'
        ? startRedis({ dataDir, args: ['--nonsense', '1'] })
        : startPostgres({ dataDir, settings: { nonsense: '1' } })
    await expect(start).rejects.toThrow(/did not start \(exit code 1\).*data.log ends:.*nonsense/s)
  })

  async function startAndLeave(module: string): Promise<{ url: string; pid: number }> {
    const call = `(await runnerImport(${JSON.stringify(join(import.meta.dirname, module))})).module.${start.name}`
    const code = `import { runnerImport } from 'vite'
      const { url, pid } = await ${call}({ dataDir: ${JSON.stringify(dataDir)} })
      console.log(JSON.stringify({ url, pid }))`
    const stdio = ['ignore', 'pipe', 'inherit'] as const
    const calltape = spawn(process.execPath, ['--input-type=module', '-e', code], { detached: true, stdio: [...stdio] })
    const [line] = await once(calltape.stdout!, 'data')
    process.kill(-calltape.pid!, 'SIGKILL') // its whole process group, as a closing terminal does
    await once(calltape, 'exit')
    return JSON.parse(line)
  }
})

describe('a local PostgreSQL', () => {
  test('syncs every commit, is in UTF-8 and UTC, and takes settings', async () => {
    const { url } = keep(await startPostgres({ dataDir, settings: { work_mem: '8MB' } }))
    const show = (name: string) => query(url, `SELECT current_setting('${name}') AS value`)
    for (const [name, value] of Object.entries({
      fsync: 'on',
      synchronous_commit: 'on',
      work_mem: '8MB',
      TimeZone: 'UTC',
    })) {
      expect([name, await show(name)]).toEqual([name, value])
    }
    expect([await show('server_encoding'), await show('listen_addresses')]).toEqual(['UTF8', '127.0.0.1'])
  })

  test.runIf(process.getuid?.() === 0)(
    'under root, keeps its data elsewhere if its user may not enter the folder',
    async () => {
      await mkdir(join(folder, 'closed'), { mode: 0o700 })
      const dataDir = join(folder, 'closed', 'data')
      const first = await startPostgres({ dataDir })
      const elsewhere = await realpath(dataDir)
      try {
        await saveRow(first.url)
        await first.stop()
        const second = keep(await startPostgres({ dataDir }))
        expect(await loadRow(second.url)).toBe('kept')
        expect(elsewhere).toMatch(/^\/var\/lib\/calltape\/postgres-/)
        await servers.pop()?.stop()
      } finally {
        for (const path of [elsewhere, `${elsewhere}.bin`]) await rm(path, { recursive: true, force: true })
      }
    },
  )
})

describe('without a Redis', () => {
  test.each([
    ['apt-get', 'run: sudo apt-get install redis-server'],
    ['dnf', 'run: sudo dnf install valkey'],
    ['brew', 'run: brew install redis'],
  ])('a system with %s is told to %s', async (tool, advice) => {
    await fakeProgram(tool, '')
    await expect(findRedis({ path: folder, isRoot: false })).rejects.toThrow(advice)
  })

  test('an older one is named as too old', async () => {
    await fakeProgram('redis-server', 'Redis server v=6.0.16 sha=00000000:0')
    await expect(findRedis({ path: folder, isRoot: false })).rejects.toThrow('Redis 6.0.16')
  })

  test('a Valkey will do', async () => {
    await fakeProgram('redis-server', 'Redis server v=6.0.16 sha=00000000:0')
    await fakeProgram('valkey-server', 'Valkey server v=8.1.1 sha=00000000:0')
    expect(await findRedis({ path: folder, isRoot: false })).toMatchObject({ version: 'Valkey 8.1.1' })
  })

  const fakeProgram = (name: string, says: string) =>
    writeFile(join(folder, name), `#!/bin/sh\necho '${says}'\n`, { mode: 0o755 })
})

async function query(url: string, sql: string): Promise<unknown> {
  const client = new pg.Client(url)
  await client.connect()
  const { rows } = await client.query<{ value: unknown }>(sql)
  await client.end()
  return rows[0]?.value
}
async function saveRow(url: string) {
  await query(url, `CREATE TABLE saved AS SELECT 'kept' AS value`)
}
async function loadRow(url: string) {
  return query(url, 'SELECT value FROM saved')
}

async function command<T>(url: string, run: (redis: Redis) => Promise<T>): Promise<T> {
  const redis = new Redis(url)
  const result = await run(redis)
  redis.disconnect()
  return result
}
async function saveKey(url: string) {
  await command(url, (redis) => redis.set('saved', 'kept'))
}
async function loadKey(url: string) {
  return command(url, (redis) => redis.get('saved'))
}
