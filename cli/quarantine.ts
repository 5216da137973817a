/** `calltape quarantine`: what could not be stored, and why; trying it again, giving it up. */
import { type Config, givenEnvironment, OperatorError, readConfig } from '../shared/config.js'
import { type CallPlace, parseStreamKey } from '../shared/keys.js'
import { createLog } from '../shared/log.js'
import { createPool, type Pool } from '../shared/postgres.js'
import { connectRedis } from '../shared/redis.js'
import { requireReachable, requireSchema } from '../shared/schema.js'
import { entryMs } from '../sink/decode.js'
import { Legacy } from '../sink/legacy.js'
import { table } from './live-view.js'
import {
  type Choice,
  dropQuarantined,
  findQuarantined,
  type Listed,
  listQuarantine,
  RETRY_SETTINGS,
  type Retried,
  readFields,
  retryQuarantined,
  WRITE_TIMEOUT_MS,
} from './quarantined-entries.js'
import { runningStack } from './stack.js'

export interface StackOptions {
  /** The folder of the `calltape up` to ask. */
  data: string
}

export interface ListOptions extends StackOptions {
  call?: string
  /** Most entries to list. */
  limit: number
  json?: boolean
}

export interface ChoiceOptions extends StackOptions {
  call?: string
  all?: boolean
}

const REASON_CHARS = 100
const MAX_ID = 9_223_372_036_854_775_807n

/** Prints the newest entries and how many there are. */
export async function list(options: ListOptions): Promise<void> {
  const choice: Choice = options.call === undefined ? { all: true } : { callSid: options.call }
  const { total, entries } = await withPool(options, {}, (pool) => listQuarantine(pool, choice, options.limit))
  if (options.json) {
    const listed = entries.map((entry) => ({ call_sid: callOf(entry.streamKey), ...columnsOf(entry) }))
    console.log(JSON.stringify({ total, entries: listed }, null, 2))
    return
  }
  if (total === 0) {
    console.log(`Nothing is in quarantine${options.call === undefined ? '' : ` of call ${options.call}`}.`)
    return
  }
  const rows = entries.map(({ id, quarantinedAt, streamKey, entryId, reason }) => {
    return [id, quarantinedAt.toISOString(), callOf(streamKey), entryId, oneLine(reason)]
  })
  console.log(table(['id', 'since', 'call', 'entry', 'reason'], rows))
  console.log(`
${total} in quarantine${total > entries.length ? `, the newest ${entries.length} shown (--limit)` : ''}. Next:

  calltape quarantine show ID     what an entry holds
  calltape quarantine retry ID…   store it, once its cause is mended (or --call SID, or --all)
  calltape quarantine drop ID…    give it up`)
}

/** Prints all there is of an entry. @throws OperatorError when there is none of this id */
export async function show(id: string, options: StackOptions & { json?: boolean }): Promise<void> {
  const ids = readIds([id])
  const [entry] = await withPool(options, {}, (pool) => findQuarantined(pool, ids))
  const { streamKey, entryId, reason, raw, quarantinedAt, droppedAt } = entry!
  const fields = droppedAt ? undefined : readFields(raw)
  if (options.json) {
    const kept = fields?.map((field) => (typeof field === 'string' ? field : { base64: field.toString('base64') }))
    const columns = { call_sid: callOf(streamKey), ...columnsOf(entry!), dropped_at: droppedAt, fields: kept ?? null }
    console.log(JSON.stringify(columns, null, 2))
    return
  }
  const facts = {
    call: callOf(streamKey),
    stream: streamKey,
    entry: `${entryId}, arrived ${new Date(entryMs(entryId)).toISOString()}`,
    quarantined: quarantinedAt.toISOString(),
    reason,
    ...(droppedAt ? { dropped: `${droppedAt.toISOString()}: its data is gone` } : {}),
  }
  console.log(`quarantined event ${id}\n`)
  for (const [name, value] of Object.entries(facts)) console.log(`  ${name.padEnd(12)}  ${value}`)
  if (!droppedAt) console.log(`\n${fields ? describeFields(fields) : `  ${raw.toString()}`}`)
}

/**
 * Tries entries again, and says of each that stays why. Sets the process's exit code: 1 if any does.
 *
 * @throws OperatorError when it is not said which, an id is unknown, or a store cannot be reached
 */
export async function retry(ids: string[], options: ChoiceOptions): Promise<void> {
  const choice = readChoice(ids, options)
  const config = configOf(options)
  const redis = await connectRedis(config.REDIS_URL, createLog('quarantine', 'silent'), config)
  let [stored, stay] = [0, 0]
  const entry = ({ id, streamKey, entryId, reason }: Retried) => {
    if (reason === undefined) stored++
    else stay++
    const what = `${id}  call ${callOf(streamKey)}, entry ${entryId}`
    console.log(reason === undefined ? `stored      ${what}` : `still bad   ${what}: ${oneLine(reason)}`)
  }
  // So that sinks fold the call again when something late comes of it.
  const finalized = async ({ callSid, partition }: CallPlace) => {
    await redis.zadd(partition.ended, 'NX', Date.now(), callSid)
  }
  try {
    await withPool(options, RETRY_SETTINGS, async (pool) => {
      const legacy = await openLegacy(pool, config)
      await retryQuarantined(pool, choice, { entry, finalized }, legacy)
    })
  } finally {
    redis.disconnect()
  }
  console.log(`${stored + stay > 0 ? '\n' : ''}${stored} stored, ${stay} still in quarantine`)
  if (stay > 0) process.exitCode = 1
}

/** @throws OperatorError when it is not said which, an id is unknown, or all are meant without `yes` */
export async function drop(ids: string[], options: ChoiceOptions & { yes?: boolean }): Promise<void> {
  const choice = readChoice(ids, options)
  if (options.all && !options.yes) {
    throw new OperatorError('drop --all gives up everything that is in quarantine: say --yes if that is meant')
  }
  const dropped = await withPool(options, {}, async (pool) => {
    if ('ids' in choice) await findQuarantined(pool, choice.ids)
    return dropQuarantined(pool, choice)
  })
  console.log(`${dropped} dropped: the data is gone, that it was there is kept`)
}

/** So that calls which come to their end only now are filled in the table of LEGACY_CALL_SESSIONS, too. */
export async function openLegacy(pool: Pool, config: Config): Promise<Legacy | undefined> {
  if (!config.LEGACY_CALL_SESSIONS) return undefined
  const { legacy } = await Legacy.open(pool, config.LEGACY_CALL_SESSIONS, config, WRITE_TIMEOUT_MS, {
    filled: () => undefined,
    failed: (callSid, reason) =>
      console.error(`call ${callSid}: its row in LEGACY_CALL_SESSIONS stays as it is: ${reason}`),
    held(callSids) {
      for (const callSid of callSids) {
        console.error(`call ${callSid}: its row in LEGACY_CALL_SESSIONS is locked: a sink fills it once it is not`)
      }
    },
  })
  return legacy
}

const configOf = ({ data }: StackOptions) => readConfig({ ...runningStack(data), ...givenEnvironment() })

async function withPool<T>(
  options: StackOptions,
  settings: Record<string, string>,
  work: (pool: Pool) => Promise<T>,
): Promise<T> {
  const config = configOf(options)
  const pool = createPool(config, 'quarantine', 2, undefined, settings)
  try {
    await requireReachable(pool, config)
    await requireSchema(pool, config)
    return await work(pool)
  } finally {
    await pool.end()
  }
}

function readIds(ids: string[]): string[] {
  for (const id of ids) {
    if (/^[1-9]\d{0,18}$/.test(id) && BigInt(id) <= MAX_ID) continue
    throw new OperatorError(`an id is a whole number, as \`calltape quarantine list\` shows it; got ${id}`)
  }
  return [...new Set(ids)]
}

function readChoice(ids: string[], { call, all }: ChoiceOptions): Choice {
  const said = [ids.length > 0, call !== undefined, all === true].filter(Boolean).length
  if (said !== 1) throw new OperatorError('say which: ids, or --call SID, or --all')
  if (all) return { all: true }
  return call === undefined ? { ids: readIds(ids) } : { callSid: call }
}

const callOf = (streamKey: string) => parseStreamKey(streamKey)?.callSid ?? streamKey

function columnsOf({ id, streamKey, entryId, reason, quarantinedAt }: Listed) {
  return { id, stream_key: streamKey, entry_id: entryId, reason, quarantined_at: quarantinedAt }
}

function oneLine(text: string): string {
  const line = text.replace(/\s+/g, ' ')
  return line.length > REASON_CHARS ? `${line.slice(0, REASON_CHARS)}…` : line
}

/** Each field's value as JSON with its lines if it is JSON; bytes that are no text as they are. */
function describeFields(fields: (string | Buffer)[]): string {
  const lines: string[] = []
  for (let i = 0; i < fields.length; i += 2)
    lines.push(`  ${printable(fields[i]!)} = ${printable(fields[i + 1] ?? '')}`)
  return lines.join('\n')
}

function printable(value: string | Buffer): string {
  if (typeof value !== 'string') return `${value.length} bytes, not UTF-8: ${JSON.stringify(value.toString('latin1'))}`
  try {
    return JSON.stringify(JSON.parse(value), null, 2).replaceAll('\n', '\n  ')
  } catch {
    return /^[\w.:-]+$/.test(value) ? value : JSON.stringify(value)
  }
}
