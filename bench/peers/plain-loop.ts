/** The loop that everybody writes first: XADD a turn into one stream, XREADGROUP, INSERT of many rows, XACK. */
import { Redis } from 'ioredis'
import type { SentEvent } from '../../cli/compare.js'
import type { Config } from '../../shared/config.js'
import { createPool } from '../../shared/postgres.js'
import { storeEvents } from './rows.js'
import type { Store } from './websocket.js'

const STREAM = 'events'
const GROUP = 'writers'
const COUNT = 1000
const BLOCK_MS = 1000

export async function server(config: Config): Promise<Store> {
  const redis = new Redis(config.REDIS_URL, { enableAutoPipelining: true })
  return async (events) => {
    await Promise.all(events.map((event) => redis.xadd(STREAM, '*', 'e', JSON.stringify(event))))
  }
}

type Reply = [stream: string, entries: [id: string, fields: string[]][]][] | null

export async function worker(config: Config): Promise<void> {
  const redis = new Redis(config.REDIS_URL)
  const pool = createPool(config, 'peer', 1)
  await redis.xgroup('CREATE', STREAM, GROUP, '0', 'MKSTREAM')
  const read = async () =>
    (await redis.xreadgroup('GROUP', GROUP, 'one', 'COUNT', COUNT, 'BLOCK', BLOCK_MS, 'STREAMS', STREAM, '>')) as Reply
  const loop = async () => {
    for (;;) {
      const entries = (await read())?.[0]?.[1] ?? []
      if (entries.length === 0) continue
      await storeEvents(
        pool,
        entries.map(([, fields]) => JSON.parse(fields[1]!) as SentEvent),
      )
      await redis.xack(STREAM, GROUP, ...entries.map(([id]) => id))
    }
  }
  void loop() // what it throws ends the process
}
