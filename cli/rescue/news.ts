/** Keyspace notifications: the source's word that a key was written or is gone. Fire and forget: what is missed, a scan finds. */
import { Cluster, type Redis } from 'ioredis'
import { OperatorError } from '../../shared/config.js'
import { type Logger, reasonOf } from '../../shared/log.js'
import type { RedisTls } from '../../shared/redis-tls.js'
import { connectSource, type Source, type SourceKey } from './source.js'

/** Notifications of string commands, of DEL and RENAME, of expired keys: what a session meets. (`A` has them all.) */
const NEEDED_CLASSES = ['$', 'g', 'x']
const REMOVALS = new Set(['del', 'unlink', 'expired', 'evicted', 'rename_from', 'move_from'])

export interface KeyNews {
  source: SourceKey
  /** Nothing but that it is gone. */
  isRemoval: boolean
}

export interface News {
  /** Takes away what has come since the last time, each key once. */
  take(): KeyNews[]
  readonly hasSome: boolean
  /** True once after the connection was lost: what was missed meanwhile is for a scan to find. */
  takeGap(): boolean
  close(): void
}

/**
 * Subscribes, if the server sends what is needed. Its settings are not changed.
 *
 * @returns why not, for people, with what to do about it
 * @throws OperatorError when it cannot be asked at all
 */
export async function subscribe(source: Source, url: string, log: Logger, files: RedisTls): Promise<News | string> {
  const { client, pattern } = source
  // Each node tells only of its own keys, and which nodes there are may change.
  if (client instanceof Cluster) return 'on a Cluster they are not used'
  const missing = await missingFlags(client)
  if (missing !== undefined) return missing
  // A connection of its own: one that is subscribed takes no other commands.
  const subscriber = (await connectSource(url, log, files)) as Redis
  const keys = new Map<string, boolean>()
  let hasGap = false
  const prefix = `__keyspace@${client.options.db ?? 0}__:`
  subscriber.on('pmessage', (_pattern: string, channel: string, event: string) => {
    const key = channel.slice(prefix.length)
    keys.set(key, (keys.get(key) ?? true) && REMOVALS.has(event))
  })
  subscriber.on('ready', () => {
    // Cut off once more: the next `ready` comes.
    subscriber.psubscribe(prefix + pattern).then(
      () => (hasGap = true),
      () => undefined,
    )
  })
  try {
    await subscriber.psubscribe(prefix + pattern)
  } catch (error) {
    subscriber.disconnect()
    return `this user may not subscribe to them (${reasonOf(error as Error)})`
  }
  return {
    take() {
      const taken = [...keys].map(([key, isRemoval]) => ({ source: { key, node: client }, isRemoval }))
      keys.clear()
      return taken
    },
    get hasSome() {
      return keys.size > 0
    },
    takeGap() {
      const had = hasGap
      hasGap = false
      return had
    },
    close: () => subscriber.disconnect(),
  }
}

/** @returns undefined when the server sends all that is needed, per key */
async function missingFlags(client: Redis): Promise<string | undefined> {
  const { host, port } = client.options
  const command = (flags: string) =>
    `switch them on with: redis-cli -h ${host} -p ${port} CONFIG SET notify-keyspace-events '${flags}'`
  let flags: string
  try {
    flags = String(((await client.config('GET', 'notify-keyspace-events')) as string[])[1] ?? '')
  } catch (error) {
    const reason = reasonOf(error as Error)
    if (!/^(NOPERM|ERR)/.test(reason)) throw new OperatorError(`--source: ${reason}`, { cause: error })
    return `whether this server sends them cannot be asked (${reason}); if not, ${command('K$gxe')}`
  }
  const has = (flag: string) => flags.includes(flag) || (flag !== 'K' && flags.includes('A'))
  const missing = ['K', ...NEEDED_CLASSES].filter((flag) => !has(flag))
  if (missing.length === 0) return undefined
  return `this server does not send them; ${command(flags + missing.join(''))}`
}
