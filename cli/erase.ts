/** `calltape erase CALL_SID…`: removes calls everywhere, and says what it removed. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Config, givenEnvironment, OperatorError, readConfig } from '../shared/config.js'
import { createLog } from '../shared/log.js'
import { createPool } from '../shared/postgres.js'
import { askAtStart, connectRedis, everyMasterOf, type RedisClient, readPartitions } from '../shared/redis.js'
import { requireReachable, requireSchema } from '../shared/schema.js'
import { Erasure, type Outcome, type RunOptions, type Tally } from './erase/run.js'
import { table } from './live-view.js'
import { runningStack } from './stack.js'

export interface EraseOptions {
  force?: boolean
  dryRun?: boolean
  /** Files and folders. */
  archive?: string[]
  /** Seconds. */
  wait: number
  rewriteAof?: boolean
  json?: boolean
  /** The folder of the `calltape up` to ask. */
  data: string
}

const REWRITE_POLL_MS = 250
/** What no command reaches. */
const BEYOND = `Not reached: backups of Redis, PostgreSQL and archives; Redis' append-only file until it is rewritten (--rewrite-aof);
PostgreSQL's WAL and dead rows until they are recycled and vacuumed; spools and archives on other machines: run it there, too. Metrics name no calls; logs have no text, and numbers masked.`

/**
 * Sets the process's exit code: 0 only if nothing of any of the calls is left, 1 if a call is unknown, live, or could not be removed
 * everywhere. Run again after it was killed, it finishes.
 *
 * @throws OperatorError when a store cannot be reached, before anything is removed
 */
export async function erase(callSids: string[], options: EraseOptions): Promise<void> {
  const config = readConfig({ ...runningStack(options.data), ...givenEnvironment() })
  const run: RunOptions = {
    force: options.force ?? false,
    dryRun: options.dryRun ?? false,
    waitMs: options.wait * 1000,
  }
  let notRewritten: unknown
  const outcomes = await eraseCalls(
    callSids,
    config,
    run,
    options.archive,
    spoolOf(config, options.data),
    async (redis) => {
      if (!options.rewriteAof || run.dryRun) return
      await rewriteAof(redis, run.waitMs).catch((error: unknown) => {
        notRewritten = error // what was removed is to be said first
      })
    },
  )
  if (options.json) console.log(JSON.stringify({ calls: outcomes.map(asJson) }, null, 2))
  else print(outcomes, run)
  const isDone = outcomes.every(({ state }) => state === 'erased' || (run.dryRun && state === 'found'))
  process.exitCode = isDone ? 0 : 1
  if (notRewritten) throw notRewritten
}

/** @param afterwards once nothing more is to be removed */
export async function eraseCalls(
  callSids: string[],
  config: Config,
  options: RunOptions,
  archives: string[] = [],
  spoolDir: string | undefined = config.SPOOL_DIR,
  afterwards: (redis: RedisClient) => Promise<void> = async () => undefined,
): Promise<Outcome[]> {
  const redis = await connectRedis(config.REDIS_URL, createLog('erase', 'silent'), config)
  const pool = createPool(config, 'erase', 2)
  try {
    await requireReachable(pool, config)
    await requireSchema(pool, config)
    const partitions = await askAtStart(config.REDIS_URL, () => readPartitions(redis, config.PARTITIONS))
    const stores = {
      ...{ redis, partitions, pool, spoolDir },
      archives: { given: archives, dir: config.ARCHIVE_DIR },
      legacy: config.LEGACY_CALL_SESSIONS,
    }
    const outcomes = await new Erasure(stores, callSids, options).run()
    await afterwards(redis)
    return outcomes
  } finally {
    redis.disconnect()
    await pool.end()
  }
}

/** `calltape up` gives its ingest a spool of its own. */
function spoolOf(config: Config, data: string): string | undefined {
  if (config.SPOOL_DIR !== undefined) return config.SPOOL_DIR
  const ofStack = join(data, 'spool')
  return existsSync(ofStack) ? ofStack : undefined
}

/** It goes on in the background. One that is going on already may have begun too early: its end is waited for. */
async function rewriteAof(redis: RedisClient, waitMs: number): Promise<void> {
  const deadline = Date.now() + waitMs
  for (const node of everyMasterOf(redis)) {
    for (let isBegun = false; !isBegun; ) {
      const refusal = await node.bgrewriteaof().then(
        () => undefined,
        (error: Error) => error.message,
      )
      isBegun = refusal === undefined
      if (isBegun) continue
      if (!/in progress/.test(refusal!) || Date.now() > deadline)
        throw new OperatorError(`Redis does not rewrite its append-only file: ${refusal}`)
      await sleep(REWRITE_POLL_MS)
    }
  }
}

const asJson = ({ callSid, state, tally, left, notes }: Outcome) => ({
  call_sid: callSid,
  state,
  [state === 'erased' || state === 'left' ? 'removed' : 'found']: tally.rows,
  left: left.rows,
  notes,
})

function print(outcomes: Outcome[], { dryRun }: RunOptions): void {
  for (const { callSid, state, tally, left, notes } of outcomes) {
    console.log(`${HEADLINES[state](callSid, dryRun)}\n`)
    if (!tally.isEmpty) console.log(`${tableOf(tally)}\n`)
    if (!left.isEmpty) console.log(`left:\n\n${tableOf(left)}\n`)
    for (const note of notes) console.log(`  ${note}\n`)
  }
  if (outcomes.some(({ state }) => state === 'erased' || state === 'left')) console.log(BEYOND)
}

const HEADLINES: Record<Outcome['state'], (callSid: string, dryRun: boolean) => string> = {
  erased: (callSid) => `call ${callSid} is erased. Removed:`,
  found: (callSid) => `call ${callSid}: would be removed:`,
  unknown: (callSid) => `nothing is known of call ${callSid}`,
  live: (callSid, dryRun) =>
    `call ${callSid} is live: it is open, or something of it is on its way to PostgreSQL. ` +
    `${dryRun ? 'It would be' : 'It is'} left as it is; end it first, wait a moment, or say --force. There is:`,
  left: (callSid) =>
    `call ${callSid} is not erased everywhere: more of it comes, or cannot be removed. End it first, and run erase again. Removed:`,
}

const tableOf = (tally: Tally) =>
  table(
    ['where', 'what', 'how many'],
    tally.rows.map(({ where, what, count }) => [where, what, count]),
  )
