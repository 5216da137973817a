/** `calltape orphans`: what looks like a call in Redis and is nobody's; and making it somebody's again. */
import { type Config, givenEnvironment, isBug, OperatorError, readConfig } from '../shared/config.js'
import { sessionKey } from '../shared/keys.js'
import { createLog, reasonOf } from '../shared/log.js'
import { connectRedis, type RedisClient, readPartitions } from '../shared/redis.js'
import { isAdoptable, type Orphan, OrphanSearch } from '../sink/orphans.js'
import { Overdue } from '../sink/overdue.js'
import { createLiveView, keepDrawing, number, table } from './live-view.js'
import { runningStack } from './stack.js'

export interface OrphansOptions {
  json?: boolean
  /** Make them somebody's again. */
  adopt?: boolean
  /** The folder of the `calltape up` to ask. */
  data: string
}

const MOST_SHOWN = 100

interface Listed {
  kind: string
  key: string
  entries: number
  /** Since its last entry, seconds; null where it has none. */
  age_seconds: number | null
  bytes: number
  adopted: boolean
}

/**
 * Prints them, and sets the process's exit code: 1 if there are any (with `adopt`: any that are left).
 *
 * @throws OperatorError when Redis cannot be asked to the end
 */
export async function orphans(options: OrphansOptions): Promise<void> {
  const config = readConfig({ ...runningStack(options.data), ...givenEnvironment() })
  const { listed, streams } = await findAll(config, options.adopt ?? false)
  if (options.json) console.log(JSON.stringify({ streams, orphans: listed }, null, 2))
  else console.log(describe(listed, streams, options.adopt ?? false))
  if (listed.some(({ adopted }) => !adopted)) process.exitCode = 1
}

async function findAll(config: Config, isAdopting: boolean): Promise<{ listed: Listed[]; streams: number }> {
  let redis: RedisClient | undefined
  try {
    redis = await connectRedis(config.REDIS_URL, createLog('orphans', 'silent'), config)
    const partitions = await readPartitions(redis, config.PARTITIONS)
    const search = new OrphanSearch(redis, partitions)
    const overdue = new Overdue(redis, partitions)
    const idleMs = config.IDLE_TIMEOUT * 1000
    const listed: Listed[] = []
    const stopShowing = showProgress(search, listed)
    try {
      for await (const orphan of search.run()) {
        const facts = await factsOf(redis, orphan)
        const adopted = isAdopting && (await adopt(search, overdue, orphan, idleMs))
        listed.push({ kind: orphan.kind, key: orphan.key, ...facts, adopted })
      }
    } finally {
      stopShowing()
    }
    return { listed, streams: search.census.streams }
  } catch (error) {
    // Exit code 1 says that there are some; that Redis went away says nothing of the kind.
    if (error instanceof OperatorError || isBug(error)) throw error
    throw new OperatorError(`could not look to the end: ${reasonOf(error as Error)}`, { cause: error })
  } finally {
    redis?.disconnect()
  }
}

async function adopt(search: OrphanSearch, overdue: Overdue, orphan: Orphan, idleMs: number): Promise<boolean> {
  if (!isAdoptable(orphan)) return false
  // Its end is said in a stream made anew, on the way of all strays; one that was presumed over only waits for its retention.
  const { kind, place } = orphan
  if (kind === 'lost_stream' && (await overdue.end(place.callSid))) return true
  return search.adopt(orphan, idleMs)
}

async function factsOf(redis: RedisClient, { key, place }: Orphan) {
  const bytes = (await redis.memory('USAGE', key)) ?? 0
  if (place.what !== 'stream' || (await redis.type(key)) !== 'stream') return { entries: 0, age_seconds: null, bytes }
  const [entries, [last]] = await Promise.all([redis.xlen(key), redis.xrevrange(key, '+', '-', 'COUNT', 1)])
  const session = (await redis.memory('USAGE', sessionKey(place))) ?? 0
  const age = last && Math.max(0, Math.round((Date.now() - Number.parseInt(last[0], 10)) / 1000))
  return { entries, age_seconds: age ?? null, bytes: bytes + session }
}

function describe(listed: Listed[], streams: number, isAdopting: boolean): string {
  if (listed.length === 0) return `No orphans: ${number(streams)} streams, each of them somebody's.`
  const shown = listed.slice(0, MOST_SHOWN).map(({ kind, key, entries, age_seconds: age, bytes, adopted }) => {
    const cells = [kind.replaceAll('_', ' '), printable(key), entries, age === null ? '–' : inWords(age), bytes]
    return isAdopting ? [...cells, adopted ? 'yes' : 'no'] : cells
  })
  const head = ['what', 'key', 'entries', 'last entry', 'bytes', ...(isAdopting ? ['adopted'] : [])]
  const lines = [table(head, shown)]
  if (listed.length > shown.length) lines.push(`  … and ${number(listed.length - shown.length)} more (--json has all)`)
  const left = listed.filter(({ adopted }) => !adopted).length
  const adopted = isAdopting ? `, ${number(listed.length - left)} adopted` : ''
  lines.push('', `${number(listed.length)} orphans among ${number(streams)} streams${adopted}.`)
  if (!isAdopting)
    lines.push('`calltape orphans --adopt` gives the sinks those that are calls; what is foreign stays as it is.')
  return lines.join('\n')
}

/** A foreign name may hold anything. */
const printable = (key: string) => JSON.stringify(key).slice(1, -1)

function inWords(seconds: number): string {
  if (seconds < 120) return `${seconds} s ago`
  if (seconds < 7200) return `${Math.round(seconds / 60)} min ago`
  return seconds < 172_800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86_400)} d ago`
}

/** @returns stops it */
function showProgress(search: OrphanSearch, listed: Listed[]): () => void {
  return keepDrawing(createLiveView(process.stderr), () => {
    const { keys, streams } = search.census
    return `${number(keys)} keys, ${number(streams)} streams, ${number(listed.length)} orphans`
  })
}
