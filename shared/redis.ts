/**
 * The one place that constructs Redis clients, and what is asked of a Redis before it is used: its version, whether it may lose
 * anything, its partition count.
 */
import { Cluster, Redis, type RedisOptions } from 'ioredis'
import { backoffMs } from './backoff.js'
import { addressOf, everyMaster, FAILS_AT_ONCE, untilReady } from './cluster.js'
import { isBug, OperatorError } from './config.js'
import { PARTITIONS_KEY, Partitions } from './keys.js'
import { someOf } from './lanes.js'
import { type Logger, reasonOf } from './log.js'
import { connectFailure, type RedisTls, redisTls } from './redis-tls.js'

export type RedisClient = Redis | Cluster

const MIN_VERSION = '7.0'
/** A connection that owes a reply for so long is given up: TCP alone would wait a quarter of an hour for a dead machine. */
const SILENCE_MS = 5000

/**
 * Connects and waits until the server answers. Afterwards it reconnects for ever, with backoff and jitter.
 *
 * A command fails at once when the connection breaks under it or is down: whether to send it again, and in which order,
 * is for the caller to decide. (ioredis by itself sends everything again in its own order, after up to 20 reconnects.)
 *
 * @param url one URL, or several, comma-separated: the nodes of a Cluster
 * @param files for rediss://, whoever's Redis it is
 * @param minVersion of the server: calltape's own scripts want 7.0
 * @throws OperatorError when the first connection fails, the server is older, or a file cannot be used
 */
export async function connectRedis(
  url: string,
  log: Logger,
  files: RedisTls = {},
  minVersion = MIN_VERSION,
): Promise<RedisClient> {
  const urls = urlsIn(url)
  const first = new URL(urls[0] ?? '')
  const common = {
    maxRetriesPerRequest: 0,
    autoResendUnfulfilledCommands: false,
    enableOfflineQueue: false,
    lazyConnect: true,
    autoResubscribe: false, // it throws where nobody can catch it when the connection is cut once more meanwhile
    socketTimeout: SILENCE_MS,
    connectTimeout: SILENCE_MS,
    // After a failover the old primary may live on as a replica. Connecting again leads to the new one.
    reconnectOnError: (error: Error) => error.message.startsWith('READONLY'),
    ...(first.protocol === 'rediss:' ? { tls: redisTls(files, log) } : {}),
  }
  const retry = (times: number) => backoffMs(times, 100, 2000)
  const client =
    urls.length > 1
      ? new Cluster(urls, {
          lazyConnect: true,
          enableOfflineQueue: false,
          clusterRetryStrategy: retry,
          ...FAILS_AT_ONCE,
          redisOptions: {
            ...common,
            username: decodeURIComponent(first.username) || undefined,
            password: decodeURIComponent(first.password) || undefined,
          },
        })
      : new Redis(first.href, { ...common, retryStrategy: retry })
  if (client instanceof Redis) stopTimersOfClosed(client)
  // ioredis reports each failed attempt as an event; without a listener it would print them by itself.
  let lastError: Error | undefined
  client.on('error', (error: Error) => {
    if (lastError === undefined || reasonOf(error) !== reasonOf(lastError)) log.warn({ err: error }, 'redis connection')
    lastError = error
  })
  client.on('ready', () => {
    lastError = undefined
  })
  try {
    if (client instanceof Cluster) await untilReady(client)
    else await client.connect()
    await checkServer(client, minVersion)
  } catch (error) {
    client.disconnect()
    if (error instanceof OperatorError) throw error
    const failure = lastError && ofNode(lastError)
    const refusal = failure ?? (error as Error)
    if (refusal.name === 'ReplyError') throw cannotBeUsed(url, refusal)
    if (client instanceof Cluster) throw (await noServerAnswers(url, common, files)) ?? cannotBeUsed(url, refusal)
    throw new OperatorError(`REDIS_URL: no Redis answers at ${hostsOf(url)}: ${connectFailure(url, files, failure)}`)
  }
  return client
}

/**
 * Of a Cluster ioredis says that it cannot be reached, and not why: its servers are asked one by one.
 *
 * @returns undefined when one of them answers
 */
async function noServerAnswers(url: string, options: RedisOptions, files: RedisTls): Promise<Error | undefined> {
  const reasons = await Promise.all(
    [...new Set(urlsIn(url))].map(async (each) => {
      const server = new Redis(each, { ...options, retryStrategy: () => null })
      let failure: Error | undefined
      server.on('error', (error: Error) => {
        failure = error
      })
      const answers = await server.connect().then(
        () => true,
        () => false,
      )
      server.disconnect()
      return answers ? undefined : `${hostsOf(each)}: ${connectFailure(each, files, failure)}`
    }),
  )
  if (reasons.includes(undefined)) return undefined
  return new OperatorError(`REDIS_URL: no server of the Cluster answers: ${reasons.join('; ')}`)
}

/** A Cluster's error says only that none of its nodes could be used; why is in it. */
const ofNode = (error: Error & { lastNodeError?: unknown }) =>
  error.lastNodeError instanceof Error ? error.lastNodeError : error

/** ioredis 5 leaves the timer of `socketTimeout` running when a connection closes that owes a reply: it would cut the next one. */
function stopTimersOfClosed(client: Redis): void {
  const timed = client as unknown as { socketTimeoutTimer: NodeJS.Timeout | undefined }
  client.on('close', () => {
    clearTimeout(timed.socketTimeoutTimer)
    timed.socketTimeoutTimer = undefined
  })
}

async function checkServer(client: RedisClient, minVersion: string): Promise<void> {
  // Of a Cluster whichever answers: one that is down must not keep a process from serving the others' calls. All are waited
  // for, because a command for one whose connection is not there yet fails at once.
  const answers = await Promise.allSettled(mastersOf(client).map((node) => node.info('server')))
  const [info] = someOf(answers)
  if (info === undefined) throw new Error('there is no master')
  if (client instanceof Redis && info.includes('redis_mode:cluster')) {
    throw new OperatorError('REDIS_URL names one node of a Cluster: name several of its nodes, comma-separated')
  }
  const version = /redis_version:(\d+\.\d+)/.exec(info)?.[1] ?? 'of no known version'
  if (!(placeOf(version) >= placeOf(minVersion))) {
    throw new OperatorError(`REDIS_URL: Redis ${version} is too old, calltape needs ${minVersion} or newer`)
  }
}

function placeOf(version: string): number {
  const [major, minor] = version.split('.').map(Number)
  return major! * 1000 + minor!
}

/** Says what could make this Redis lose events: that it may evict keys, or keeps nothing on disk. */
export async function warnOfLoss(client: RedisClient, log: Logger): Promise<void> {
  for (const node of mastersOf(client)) {
    const where = addressOf(node)
    const asked = Promise.all([node.info('memory'), node.info('persistence')])
    const info = await asked.then(
      (parts) => parts.join(''),
      (error: Error) => {
        if (client instanceof Redis) throw error
        log.warn({ redis: where, err: error }, 'this server of the Cluster does not answer: its calls wait')
      },
    )
    if (info === undefined) continue
    const policy = /maxmemory_policy:(\S+)/.exec(info)?.[1]
    if (policy !== undefined && policy !== 'noeviction') {
      log.warn(
        { redis: where, policy },
        'Redis may evict calls that are not in PostgreSQL yet: set maxmemory-policy noeviction',
      )
    }
    if (/aof_enabled:0/.test(info)) {
      log.warn(
        { redis: where },
        'Redis keeps no append-only file, a restart loses what is not in PostgreSQL: set appendonly yes',
      )
    }
  }
}

/**
 * For what a process asks of Redis before it serves: a connection that breaks under it, or a user who may not ask, is for the
 * operator to mend. (Once it serves, whoever asks tries again.)
 *
 * @param url REDIS_URL
 * @throws OperatorError in place of the connection's errors and of what Redis refuses; anything else, a bug, as it is
 */
export async function askAtStart<T>(url: string, ask: () => Promise<T>): Promise<T> {
  try {
    return await ask()
  } catch (error) {
    if (error instanceof OperatorError || isBug(error)) throw error
    throw cannotBeUsed(url, error as Error)
  }
}

const cannotBeUsed = (url: string, cause: Error) =>
  new OperatorError(`REDIS_URL: Redis at ${hostsOf(url)} cannot be used: ${reasonOf(cause)}`, { cause })

const urlsIn = (url: string) => url.split(',').map((u) => u.trim())

const hostsOf = (url: string) => [...new Set(urlsIn(url))].map((u) => new URL(u).host).join(',')

/**
 * The partition count is fixed at the first start: with another one, half of all calls would be looked for in the wrong place.
 * Only ingest and sink fix it: a command that merely looks must not decide for an empty Redis, see `readPartitions`.
 *
 * @throws OperatorError when `wanted` differs from what this Redis was started with
 */
export async function openPartitions(client: RedisClient, wanted: number): Promise<Partitions> {
  await client.setnx(PARTITIONS_KEY, wanted)
  const found = Number(await client.get(PARTITIONS_KEY))
  if (found !== wanted) {
    throw new OperatorError(
      `PARTITIONS is ${wanted}, but this Redis was started with ${found} (key ${PARTITIONS_KEY}). ` +
        `Set PARTITIONS=${found}: the count decides where a call's data lies and cannot be changed later.`,
    )
  }
  return new Partitions(found)
}

/**
 * Writes nothing.
 *
 * @param fallback the count where neither ingest nor sink has ever been started on this Redis
 * @throws OperatorError when the key is not ours
 */
export async function readPartitions(client: RedisClient, fallback: number): Promise<Partitions> {
  const found = await client.get(PARTITIONS_KEY)
  if (found === null) return new Partitions(fallback)
  if (!/^[1-9]\d{0,3}$/.test(found))
    throw new OperatorError(`key ${PARTITIONS_KEY} of this Redis is no partition count`)
  return new Partitions(Number(found))
}

/** A connection of one's own to that server, to subscribe on. It does not come back by itself; `connect` begins it. */
export const subscriberTo = (server: Redis): Redis =>
  server.duplicate({ lazyConnect: true, enableReadyCheck: false, retryStrategy: () => null })

/** Those that are connected, of the nodes that have the keys: of a single server, that one. */
export const mastersOf = (client: RedisClient): Redis[] =>
  client instanceof Cluster ? client.nodes('master') : [client]

/** For whoever speaks of all keys. @throws OperatorError when a node that has some is not connected */
export const everyMasterOf = (client: RedisClient): Redis[] =>
  client instanceof Cluster ? everyMaster(client) : [client]
