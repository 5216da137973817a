/** The legacy bot's Redis. Only ever read from: SCAN, GET, and asked how it is set. */
import { setImmediate as breathe } from 'node:timers/promises'
import type { Redis } from 'ioredis'
import { OperatorError } from '../../shared/config.js'
import type { Logger } from '../../shared/log.js'
import { connectRedis, everyMasterOf, type RedisClient } from '../../shared/redis.js'
import type { RedisTls } from '../../shared/redis-tls.js'

/** How many keys SCAN looks at in one go. */
const SCAN_COUNT = 500
/** What is asked for at once: so many keys, or about so many bytes, for a blob may hold minutes of audio. */
const PAGE_KEYS = 100
const PAGE_BYTES = 8 * 1024 * 1024
/** Of SCAN, as it was when bots like this began; nothing newer is asked of it. */
const MIN_VERSION = '2.8'
/** What a blob is taken to have before any was seen. */
const FIRST_BLOB_BYTES = 256 * 1024

/** A key, and the node that has it. */
export interface SourceKey {
  key: string
  node: Redis
}

/** What a key holds: text; nothing any more; or why that cannot be read. */
export type Found = { text: string } | { gone: true } | { reason: string }

/** @param files for rediss:// @throws OperatorError when no Redis answers there, or it is too old */
export async function connectSource(url: string, log: Logger, files: RedisTls): Promise<RedisClient> {
  const isUrl = (u: string) => /^rediss?:\/\/\S+$/.test(u) && URL.canParse(u)
  if (!url.split(',').every((u) => isUrl(u.trim()))) {
    throw new OperatorError('--source wants redis://[user:password@]host:port[/db] or rediss://…; several: a Cluster')
  }
  try {
    return await connectRedis(url, log, files, MIN_VERSION)
  } catch (error) {
    if (!(error instanceof OperatorError)) throw error
    throw new OperatorError(error.message.replace('REDIS_URL', '--source'), { cause: error })
  }
}

export class Source {
  private bytesABlob = FIRST_BLOB_BYTES

  constructor(
    readonly client: RedisClient,
    readonly pattern: string,
  ) {}

  /** Every key that is there from the beginning to the end; others perhaps; any more than once. In pages. */
  async *scan(): AsyncGenerator<SourceKey[]> {
    for (const node of everyMasterOf(this.client)) {
      let cursor = '0'
      do {
        const [next, keys] = await node.scan(cursor, 'MATCH', this.pattern, 'COUNT', SCAN_COUNT)
        cursor = next
        const theirs = keys.filter((key) => !key.startsWith('ct:')) // ours, whatever the pattern
        if (theirs.length > 0) yield theirs.map((key) => ({ key, node }))
      } while (cursor !== '0')
    }
  }

  /** Reads keys, a page at a time. @throws when the server cannot say what a key holds */
  async *read(keys: SourceKey[]): AsyncGenerator<{ source: SourceKey; found: Found }[]> {
    for (let i = 0; i < keys.length; ) {
      const room = Math.floor(PAGE_BYTES / this.bytesABlob)
      const page = keys.slice(i, i + Math.min(PAGE_KEYS, Math.max(1, room)))
      i += page.length
      yield await this.readPage(page)
      await breathe() // parsing is work: signals and the appender get their turn
    }
  }

  private async readPage(page: SourceKey[]): Promise<{ source: SourceKey; found: Found }[]> {
    const byNode = new Map<Redis, SourceKey[]>()
    for (const source of page) byNode.set(source.node, [...(byNode.get(source.node) ?? []), source])
    const found = await Promise.all(
      [...byNode].map(async ([node, sources]) => {
        const replies = await node.pipeline(sources.map(({ key }) => ['get', key])).exec()
        return sources.map((source, i) => ({ source, found: asFound(source.key, replies![i]!) }))
      }),
    )
    const all = found.flat()
    const sizes = all.flatMap((each) => ('text' in each.found ? [each.found.text.length] : []))
    if (sizes.length > 0) this.bytesABlob = Math.max(1024, ...sizes)
    return all
  }
}

/** Errors of a key: it is another type, or not ours to read. Any other says something of the server. */
const OF_THE_KEY = /^(WRONGTYPE|NOPERM)/

function asFound(key: string, [error, value]: [Error | null, unknown]): Found {
  if (error) {
    if (OF_THE_KEY.test(error.message)) return { reason: error.message }
    throw error
  }
  if (value !== null) return { text: value as string }
  return key.includes('\uFFFD') ? { reason: 'the key is not UTF-8' } : { gone: true }
}
