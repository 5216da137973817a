/**
 * BullMQ: a job a turn, added in bulk for each message. Its open source has no batches for workers: so many run at once, and each job
 * waits for the INSERT that takes all of them together; completing one fetches the next.
 */
import { type ConnectionOptions, Queue, Worker } from 'bullmq'
import type { SentEvent } from '../../cli/compare.js'
import type { Config } from '../../shared/config.js'
import { createPool } from '../../shared/postgres.js'
import { Batcher } from './batcher.js'
import { storeEvents } from './rows.js'
import type { Store } from './websocket.js'

const QUEUE = 'turns'
const CONCURRENCY = 500

const connectionOf = ({ REDIS_URL: url }: Config): ConnectionOptions => ({ url, maxRetriesPerRequest: null })

export async function server(config: Config): Promise<Store> {
  const queue = new Queue<SentEvent>(QUEUE, {
    connection: connectionOf(config),
    defaultJobOptions: { removeOnComplete: true, attempts: 5 },
  })
  await queue.waitUntilReady()
  return async (events) => {
    await queue.addBulk(events.map((event) => ({ name: event.type, data: event })))
  }
}

export async function worker(config: Config): Promise<void> {
  const pool = createPool(config, 'peer', 1)
  const batcher = new Batcher<SentEvent>((events) => storeEvents(pool, events), CONCURRENCY)
  const options = { connection: connectionOf(config), concurrency: CONCURRENCY }
  const working = new Worker<SentEvent>(QUEUE, (job) => batcher.add(job.data), options)
  await working.waitUntilReady()
}
