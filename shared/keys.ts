/**
 * Every Redis key. Calls hash into a fixed number of partitions, and every key of partition p carries the hash tag {p}:
 * one Redis Cluster slot, so one script can touch all of a partition's keys atomically, on one node or on many.
 *
 *     ct:partitions         how many partitions there are; written at the very first start, checked at every start
 *     ct:{p}:call:<sid>     the call's stream: one entry an event, field `e` holding its JSON; group `sink`, whose
 *                           last-delivered-id is the last entry committed to PostgreSQL
 *     ct:{p}:session:<sid>  hash, the live session: what producers said last (`status`, `direction`, `from`, `stage`, …),
 *                           `connection` (of a bound one: connected or disconnected), `connection_id` (the latest one's),
 *                           `ended` (1 once it is over; `presumed`: unless it goes on after all), `reason` (of its end),
 *                           `presumed` (it was presumed over at some time), `bytes` (of JSON appended), `lapses` (deliveries
 *                           in a row that came to nothing), `alone` (the entry that is being tried alone),
 *                           `end_quarantined` (its end could not be stored, and was said in other words)
 *     ct:{p}:ready          zset: calls with uncommitted entries that no sink works on, by when the first of them arrived (ms)
 *     ct:{p}:leased         zset: calls a sink works on, by lease deadline (ms)
 *     ct:{p}:open           zset: calls that have not ended, by when they will be presumed over (ms)
 *     ct:{p}:ended          zset: finalized calls, by when (ms); once past their retention, so that they are looked at again later:
 *                           by when their claim lapses, or they are tried again, less the retention (see sink/claim.lua)
 *     ct:{p}:kept           zset: finalized calls past their retention that stay, by when they are tried again (ms)
 *     ct:{p}:wake           channel: "these partitions have news", for sleeping sinks
 *     ct:{p}:producer:<id>  the last batch applied of one ingest process, so that a retried append is not applied twice;
 *                           with `:refused` behind it: what was refused of its batches
 *     ct:sinks              zset: the sinks that share the partitions, by when their announcement lapses (ms)
 *     ct:sweep              hash, the last sweep's result: `at` (when it ended, epoch ms), `streams`, `bytes`, `orphans:<kind>`
 *     ct:sweep:claim        a sink is sweeping
 */

export const PARTITIONS_KEY = 'ct:partitions'
export const SINKS_KEY = 'ct:sinks'
export const SWEEP_KEY = 'ct:sweep'
export const SWEEP_CLAIM_KEY = 'ct:sweep:claim'
export const GROUP = 'sink'
export const EVENT_FIELD = 'e'

export interface PartitionKeys {
  readonly partition: number
  readonly ready: string
  readonly leased: string
  readonly open: string
  readonly ended: string
  readonly kept: string
  readonly wake: string
  /** Put the call_sid behind it. */
  readonly streamPrefix: string
  /** Put the call_sid behind it. */
  readonly sessionPrefix: string
  /** Put the producer's id behind it. */
  readonly producerPrefix: string
}

function partitionKeys(partition: number): PartitionKeys {
  const tag = `ct:{${partition}}:`
  return {
    partition,
    ready: `${tag}ready`,
    leased: `${tag}leased`,
    open: `${tag}open`,
    ended: `${tag}ended`,
    kept: `${tag}kept`,
    wake: `${tag}wake`,
    streamPrefix: `${tag}call:`,
    sessionPrefix: `${tag}session:`,
    producerPrefix: `${tag}producer:`,
  }
}

/** SCAN's pattern for the streams of all calls. */
export const STREAM_PATTERN = 'ct:{*}:call:*'

/** SCAN's pattern for all keys of all partitions. */
export const PARTITION_PATTERN = 'ct:{*}:*'

/** A call, and where its keys are. */
export interface CallPlace {
  callSid: string
  partition: PartitionKeys
}

export const streamKey = ({ callSid, partition }: CallPlace) => partition.streamPrefix + callSid
export const sessionKey = ({ callSid, partition }: CallPlace) => partition.sessionPrefix + callSid

/** Of a call's stream: its partition, its call_sid. Means the same in PostgreSQL. */
const STREAM_KEY = String.raw`^ct:\{(0|[1-9]\d{0,3})\}:call:(.+)$`

/** SQL for the call_sid in `column`, which holds a key; NULL when it is no call's stream. */
export const callSidInSql = (column: string) => `(regexp_match(${column}, '${STREAM_KEY}'))[2]`

/** @returns whose stream a key is; undefined when it is no call's */
export function parseStreamKey(key: string): CallPlace | undefined {
  const [, partition, callSid] = new RegExp(STREAM_KEY, 's').exec(key) ?? []
  return callSid === undefined ? undefined : { callSid, partition: partitionKeys(Number(partition)) }
}

/** @returns what a call's key is, by its name, and of which call; undefined when it is none */
export function parseCallKey(key: string): (CallPlace & { what: 'stream' | 'session' }) | undefined {
  const [, partition, what, callSid] = /^ct:\{(0|[1-9]\d{0,3})\}:(call|session):(.+)$/s.exec(key) ?? []
  if (callSid === undefined) return undefined
  return { callSid, partition: partitionKeys(Number(partition)), what: what === 'call' ? 'stream' : 'session' }
}

/** FNV-1a over the characters (a call_sid is ASCII), then murmur3's finalizer: FNV's low bits alone are uneven. */
export function hash(callSid: string): number {
  let h = 0x811c9dc5
  for (let i = 0; i < callSid.length; i++) h = Math.imul(h ^ callSid.charCodeAt(i), 0x01000193)
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b)
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35)
  return (h ^ (h >>> 16)) >>> 0
}

/** The keys of all partitions, and which partition a call is in. */
export class Partitions {
  readonly all: readonly PartitionKeys[]

  constructor(count: number) {
    this.all = Array.from({ length: count }, (_, p) => partitionKeys(p))
  }

  of(callSid: string): PartitionKeys {
    return this.at(hash(callSid) % this.all.length)
  }

  at(partition: number): PartitionKeys {
    const keys = this.all[partition]
    if (!keys) throw new RangeError(`partition ${partition} of ${this.all.length}`)
    return keys
  }
}
