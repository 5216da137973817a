/** What an ack is worth, `DURABILITY`: how to make sure of it behind each append, and whether this Redis can do it at all. */
import { Cluster } from 'ioredis'
import { OperatorError } from '../shared/config.js'
import type { RedisClient } from '../shared/redis.js'

/** Longer than everysec's second, and than a replica's hiccup; then the append counts as failed and is sent again. */
const WAIT_MS = 3000

/**
 * @param durability `redis`, `fsync` or `replicas:N`
 * @returns what must succeed behind each append before its events are acked; undefined: the append's reply is enough
 * @throws OperatorError when this Redis cannot give it
 */
export async function durabilityCheck(
  client: RedisClient,
  durability: string,
): Promise<((client: RedisClient) => Promise<void>) | undefined> {
  if (durability === 'redis') return undefined
  if (client instanceof Cluster) {
    // WAIT and WAITAOF have no key, so a Cluster client would ask any node, not the one that executed the append.
    throw new OperatorError(
      `DURABILITY=${durability} wants a single Redis: on a Cluster only DURABILITY=redis is possible`,
    )
  }
  if (durability.startsWith('replicas:')) {
    const wanted = Number(durability.slice('replicas:'.length))
    const found = Number(/connected_slaves:(\d+)/.exec(await client.info('replication'))?.[1] ?? 0)
    if (found < wanted) throw new OperatorError(`DURABILITY=${durability}, but this Redis has ${found} replicas`)
    return async (c) => {
      const reached = await c.wait(wanted, WAIT_MS)
      if (reached < wanted) throw new Error(`only ${reached} of ${wanted} replicas have it`)
    }
  }
  const persistence = await client.info('persistence')
  if (!persistence.includes('aof_enabled:1')) {
    throw new OperatorError('DURABILITY=fsync, but this Redis keeps no append-only file: set appendonly yes')
  }
  const [, policy] = (await client.config('GET', 'appendfsync')) as string[]
  if (policy === 'always') return undefined // a reply is sent after the fsync
  if (policy === 'no') {
    // WAITAOF waits for the next sync, and does not bring it about: nothing would ever be acked.
    throw new OperatorError(
      'DURABILITY=fsync, but this Redis leaves it to the system when to sync: set appendfsync everysec or always',
    )
  }
  const commands = (await client.command('INFO', 'WAITAOF')) as unknown[]
  if (!commands[0]) {
    throw new OperatorError(
      'DURABILITY=fsync wants Redis 7.2 or newer (WAITAOF), or appendfsync always on an older one',
    )
  }
  return async (c) => {
    const [local] = (await c.call('WAITAOF', '1', '0', String(WAIT_MS))) as number[]
    if (local !== 1) throw new Error('the append-only file was not synced in time')
  }
}
