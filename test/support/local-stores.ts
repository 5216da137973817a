/** Stores as processes of this machine. */
import { chmod, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import getPort from 'get-port'
import { startPostgres } from '../../cli/local-postgres.js'
import { startRedis } from '../../cli/local-redis.js'
import type { LocalServer, LocalServerOptions } from '../../cli/local-server.js'
import { lastingPort } from './processes.js'
import type { PostgresOptions, RedisOptions, StoreServer } from './store-server.js'
import { endWithUs } from './watchdog.js'

export async function localRedis({ args = [], cluster, ...options }: RedisOptions): Promise<StoreServer> {
  const node = cluster ? ['--cluster-enabled', 'yes', '--cluster-announce-ip', '127.0.0.1', '--cluster-port'] : []
  const all = [...node, ...(cluster ? [String(await getPort())] : []), ...args]
  return localStore('redis', (at) => startRedis({ ...options, ...at, args: all }))
}

export function localPostgres(options: PostgresOptions): Promise<StoreServer> {
  return localStore('postgres', (at) => startPostgres({ ...options, ...at }))
}

async function localStore(
  name: 'redis' | 'postgres',
  launch: (at: LocalServerOptions) => Promise<LocalServer>,
): Promise<StoreServer> {
  const folder = await mkdtemp(join(tmpdir(), `calltape-test-${name}-`))
  await chmod(folder, 0o711) // as root, PostgreSQL runs as another user, who has to get through
  const at = { dataDir: join(folder, name), port: await lastingPort() }
  const launchWatched = async (where: LocalServerOptions) => {
    const launched = await launch(where)
    const ended = endWithUs(launched.pid, name === 'redis' ? 'KILL' : 'QUIT')
    void launched.exited.then(ended)
    return { ...launched, stop: () => launched.stop().then(ended) }
  }
  let server = await launchWatched(at)
  const { url } = server
  let isFrozen = false
  return {
    url,
    peer: { host: '127.0.0.1', port: Number(new URL(url).port) },
    async signal(signal) {
      process.kill(server.pid, signal)
      if (signal === 'SIGSTOP' || signal === 'SIGCONT') isFrozen = signal === 'SIGSTOP'
    },
    async kill(signal = 'SIGKILL') {
      process.kill(server.pid, signal)
      await server.exited
    },
    async start() {
      server = await launchWatched({ ...at, port: Number(new URL(url).port) })
      if (server.url !== url) throw new Error(`${url} has come back as ${server.url}`)
    },
    async stop() {
      if (isFrozen) process.kill(server.pid, 'SIGCONT') // frozen, it would not hear that it is to stop
      await server.stop()
      await rm(folder, { recursive: true, force: true })
    },
  }
}
