/** Our Lua scripts, as Redis runs them. */
import { createHash } from 'node:crypto'
import type { Redis } from 'ioredis'
import { readPackageFile } from './package-root.js'
import type { RedisClient } from './redis.js'

/** A line that stands for a file: what several scripts need is written once. */
const INCLUDE = /^-- include (\S+)$/gm

/**
 * A Lua script of ours, run by its hash.
 *
 * While a slot moves to another server of a Cluster, a partition's keys are in two places. Redis lets a script run there only if
 * it finds all of the keys that it is given; what others it comes upon would seem to be missing. So a script to which that matters
 * is given the wake channel as well, which never is a key: then it is refused (TRYAGAIN) until the slot has moved.
 */
export class Script {
  private readonly source: string
  readonly sha: string

  /** @param path below the package's root */
  constructor(path: string) {
    this.source = readPackageFile(path).replaceAll(INCLUDE, (_line, included: string) => readPackageFile(included))
    this.sha = createHash('sha1').update(this.source).digest('hex')
  }

  /** Runs it; a server that does not know it yet (new, restarted, failed over) is told its source. */
  async run(client: RedisClient, keys: string[], args: (string | number)[]): Promise<unknown> {
    try {
      return await client.evalsha(this.sha, keys.length, ...keys, ...args)
    } catch (error) {
      if (!isNoScript(error)) throw error
      return await client.eval(this.source, keys.length, ...keys, ...args)
    }
  }

  /** For callers that keep several in flight, where `run`'s way out would run out of order: see ingest/script-call.ts. */
  async load(server: Redis): Promise<void> {
    await server.script('LOAD', this.source)
  }
}

export function isNoScript(error: unknown): boolean {
  return error instanceof Error && error.message.startsWith('NOSCRIPT')
}
