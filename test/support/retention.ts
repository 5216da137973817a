/** What the suites of retention and sweep share: a retention that does not wait, and calls that are final. */
import { createSinkMetrics } from '../../shared/metrics.js'
import type { Pool } from '../../shared/postgres.js'
import type { RedisClient } from '../../shared/redis.js'
import { Retention, type RetentionSettings } from '../../sink/retention.js'
import { type Calls, ended, newSid, seqs } from './calls.js'
import { log, until } from './stores.js'
import { placesOf, turn } from './streams.js'

export const AT_ONCE: RetentionSettings = {
  retentionMs: 0,
  archiveDir: undefined,
  callsASecond: 1e6,
  claimMs: 60_000,
  keptMs: 3600_000,
}

/** For a search that does not wait. */
export const QUICKLY = { pageKeys: 50, pauseMs: 1, lookAgainMs: 20 }

export function retentionOf(
  { stack }: Calls,
  settings: Partial<RetentionSettings> = {},
  stores: { redis?: RedisClient; pool?: Pool } = {},
) {
  const metrics = createSinkMetrics()
  const context = { redis: stack.redis.client, pool: stack.database.pool, metrics, log, ...stores }
  const retention = new Retention(context, stack.redis.partitions, { ...AT_ONCE, ...settings })
  const round = () => retention.round()
  return { round, metrics }
}

/** Plays a call to its end. @returns its call_sid */
export async function finalCall(calls: Calls, turns = 2): Promise<string> {
  const [sid] = await finalCalls(calls, 1, turns)
  return sid!
}

export async function finalCalls(calls: Calls, count: number, turns = 2): Promise<string[]> {
  const sids = Array.from({ length: count }, newSid)
  await calls.producer.store(...sids.flatMap((sid) => [...seqs(turns).map((seq) => turn(sid, seq)), ended(sid, turns)]))
  for (const sid of sids) await isFinal(calls, sid)
  return sids
}

export async function isFinal(calls: Calls, sid: string): Promise<void> {
  await until(`${sid} is final`, async () => Object.keys(await placesOf(calls.stack.redis, sid)).join() === 'ended')
}

/** As if the claims on these calls had lapsed, or the time of those that have to stay had come. */
export async function comeUpAgain({ stack }: Calls, ...sids: string[]): Promise<void> {
  for (const sid of sids) await stack.redis.client.zadd(stack.redis.partitions.of(sid).ended, 'XX', 1, sid)
}

/** All that Redis has of a call: its keys, and the lists that it is in. */
export async function tracesOf({ stack }: Calls, sid: string): Promise<string[]> {
  const { client, partitions } = stack.redis
  const p = partitions.of(sid)
  const keys = [p.streamPrefix + sid, p.sessionPrefix + sid]
  const there = await Promise.all(keys.map((key) => client.exists(key)))
  const scores = await Promise.all([p.ready, p.leased, p.open, p.ended, p.kept].map((list) => client.zscore(list, sid)))
  const lists = ['ready', 'leased', 'open', 'ended', 'kept'].filter((_, i) => scores[i] !== null)
  return [...['stream', 'session'].filter((_, i) => there[i] === 1), ...lists]
}

/** Runs `before` ahead of the purge of a single call, when all else is done. */
export function beforePurge(client: RedisClient, before: () => Promise<unknown>): RedisClient {
  const KEYS_OF_ONE_PURGE = 7
  return new Proxy(client, {
    get(target, name) {
      const value = Reflect.get(target, name) as unknown
      if (name === 'evalsha') {
        return async (...args: [string, number, ...string[]]) => {
          if (args[1] === KEYS_OF_ONE_PURGE) await before()
          return target.evalsha(...args)
        }
      }
      return typeof value === 'function' ? value.bind(target) : value
    },
  })
}
