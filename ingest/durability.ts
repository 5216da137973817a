/** What an ack is worth, `DURABILITY`: how to make sure of it behind each append, and whether this Redis can do it at all. */
import { Cluster, type Redis } from 'ioredis'
import { OperatorError } from '../shared/config.js'
import { someOf } from '../shared/lanes.js'
import type { Logger } from '../shared/log.js'
import { mastersOf, type RedisClient } from '../shared/redis.js'

/** Longer than everysec's second, and than a replica's hiccup; then the append counts as failed and is sent again. */
const WAIT_MS = 3000

/** @param connection by which the append went: WAIT and WAITAOF wait for what their own connection has written */
export type Confirm = (connection: Redis) => Promise<void>

/**
 * @param durability `redis`, `fsync` or `replicas:N`
 * @returns what must succeed behind each append before its events are acked; undefined: the append's reply is enough
 * @throws OperatorError when this Redis cannot give it; of a Cluster, when none of its masters can (what one cannot is logged)
 */
export async function durabilityCheck(
  client: RedisClient,
  durability: string,
  log: Logger,
): Promise<Confirm | undefined> {
  if (durability === 'redis') return undefined
  if (durability === 'fsync') {
    if (client instanceof Cluster) {
      log.warn(
        'DURABILITY=fsync on a Cluster: what only a dead master has on its disk is lost when a replica takes over',
      )
    }
    const needs = await eachMaster(client, durability, log, fsyncNeeds)
    // One that could not be asked may need it.
    const nobodyNeeds = needs.length === mastersOf(client).length && needs.every((need) => need === 'nothing')
    return nobodyNeeds ? undefined : together(waitForDisk)
  }
  const wanted = Number(durability.slice('replicas:'.length))
  await eachMaster(client, durability, log, async (master) => {
    const found = Number(/connected_slaves:(\d+)/.exec(await master.info('replication'))?.[1] ?? 0)
    if (found < wanted) throw new OperatorError(`DURABILITY=${durability}, but this Redis has ${found} replicas`)
  })
  return together(async (connection) => {
    const reached = await connection.wait(wanted, WAIT_MS)
    if (reached < wanted) throw new Error(`only ${reached} of ${wanted} replicas have it`)
  })
}

/** A master of a Cluster that has just taken over has no replica yet: then its events wait, and the others' do not. */
async function eachMaster<T>(
  client: RedisClient,
  durability: string,
  log: Logger,
  check: (master: Redis) => Promise<T>,
): Promise<T[]> {
  const results = await Promise.allSettled(mastersOf(client).map(check))
  const able = someOf(results)
  for (const result of results) {
    if (result.status === 'fulfilled') continue
    log.warn({ err: result.reason, durability }, 'a master of the Cluster cannot give this now: its events wait')
  }
  return able
}

async function fsyncNeeds(server: Redis): Promise<'nothing' | 'WAITAOF'> {
  const persistence = await server.info('persistence')
  if (!persistence.includes('aof_enabled:1')) {
    throw new OperatorError('DURABILITY=fsync, but this Redis keeps no append-only file: set appendonly yes')
  }
  const [, policy] = (await server.config('GET', 'appendfsync')) as string[]
  if (policy === 'always') return 'nothing' // a reply is sent after the fsync
  if (policy === 'no') {
    // WAITAOF waits for the next sync, and does not bring it about: nothing would ever be acked.
    throw new OperatorError(
      'DURABILITY=fsync, but this Redis leaves it to the system when to sync: set appendfsync everysec or always',
    )
  }
  const commands = (await server.command('INFO', 'WAITAOF')) as unknown[]
  if (!commands[0]) {
    throw new OperatorError(
      'DURABILITY=fsync wants Redis 7.2 or newer (WAITAOF), or appendfsync always on an older one',
    )
  }
  return 'WAITAOF'
}

async function waitForDisk(connection: Redis): Promise<void> {
  const [local] = (await connection.call('WAITAOF', '1', '0', String(WAIT_MS))) as number[]
  if (local !== 1) throw new Error('the append-only file was not synced in time')
}

/**
 * One WAIT for all that a connection was given in the same turn: it blocks the connection, and a server of a Cluster has a
 * script call for each of its partitions. What is given to the connection before `confirm` is written before the WAIT.
 */
function together(confirm: Confirm): Confirm {
  const waiting = new WeakMap<Redis, Promise<void>>()
  return (connection) => {
    const begun = waiting.get(connection)
    if (begun) return begun
    const confirmed = Promise.resolve().then(() => {
      waiting.delete(connection)
      return confirm(connection)
    })
    waiting.set(connection, confirmed)
    return confirmed
  }
}
