/**
 * Orphans: keys that look like calls and that nobody works on. calltape leaves none behind; a Redis that has lost some of its
 * keys, or somebody else's hand, may. Found by walking through all keys, slowly: SCAN in small pages with pauses between them.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { isCallSid } from '../shared/event-rules.js'
import {
  type CallPlace,
  hash,
  PARTITION_PATTERN,
  type Partitions,
  parseCallKey,
  sessionKey,
  streamKey,
} from '../shared/keys.js'
import { type Lane, lanesOf } from '../shared/lanes.js'
import { everyMasterOf, type RedisClient } from '../shared/redis.js'
import { Script } from '../shared/script.js'

/** The label `kind` of calltape_sink_orphan_streams. */
export const ORPHAN_KINDS = [
  'unread', // entries that are not committed, and no sink is told of them
  'unended', // all is committed, but the call never became final, and nobody waits for its end
  'no_group', // the stream has lost its consumer group: how far it was read is not known, and no sink is told of it
  'lost_stream', // a session whose stream is gone
  'foreign', // a key of another type where a call's stream or session would be
  'misplaced', // in another partition than its call_sid's: no sink looks for it there
  'invalid_call_sid', // named by something that is no call_sid
] as const
export type OrphanKind = (typeof ORPHAN_KINDS)[number]

/** Those that a sink can take care of again. */
const ADOPTABLE: ReadonlySet<OrphanKind> = new Set(['unread', 'unended', 'no_group', 'lost_stream'])
export const isAdoptable = ({ kind }: Orphan) => ADOPTABLE.has(kind)

export interface Orphan {
  kind: OrphanKind
  key: string
  /** Where it is; its partition need not be the one where it belongs. */
  place: FoundKey
}

type FoundKey = NonNullable<ReturnType<typeof parseCallKey>>

/** What a walk has seen so far. */
export interface Census {
  keys: number
  /** SCAN may give a key twice while the table grows or shrinks: about. */
  streams: number
  /** Of streams and sessions; where there are very many, of every nth, times n. */
  bytes: number
}

export interface Pace {
  /** Keys that SCAN passes in one go. */
  pageKeys: number
  /** Between two pages. */
  pauseMs: number
  /** Between the two looks that make an orphan. */
  lookAgainMs: number
}

/** A page takes Redis half a millisecond (19 µs a key): with the pauses, a fiftieth of its time, and 1,000 keys a second. */
export const SLOWLY: Pace = { pageKeys: 25, pauseMs: 25, lookAgainMs: 3000 }
/** Beyond so many suspects they are looked at again before the walk goes on. */
const MOST_SUSPECTS = 10_000
/** From so many keys on, the memory of only some is asked for. */
const MEASURED_KEYS = 200_000

const script = new Script('sink/orphans.lua')

export class OrphanSearch {
  readonly census: Census = { keys: 0, streams: 0, bytes: 0 }
  private readonly lanes: Lane[]
  private measureEvery = 1

  constructor(
    private readonly redis: RedisClient,
    private readonly partitions: Partitions,
    private readonly pace: Pace = SLOWLY,
  ) {
    this.lanes = lanesOf(redis, partitions)
  }

  /**
   * Walks through all keys of all masters. What is an orphan at two looks is one.
   *
   * @throws Redis' errors
   */
  async *run(signal?: AbortSignal): AsyncGenerator<Orphan> {
    const masters = everyMasterOf(this.redis)
    const sizes = await Promise.all(masters.map((node) => node.dbsize()))
    this.measureEvery = Math.ceil(sizes.reduce((sum, n) => sum + n, 1) / MEASURED_KEYS)
    const suspects = new Map<string, FoundKey>()
    for (const node of masters) {
      let cursor = '0'
      do {
        const [next, keys] = await node.scan(cursor, 'MATCH', PARTITION_PATTERN, 'COUNT', this.pace.pageKeys)
        cursor = next
        for (const { key, place } of await this.lookAt(keys)) suspects.set(key, place)
        if (suspects.size >= MOST_SUSPECTS) yield* this.lookAgain(suspects)
        await sleep(this.pace.pauseMs)
      } while (cursor !== '0' && !signal?.aborted)
    }
    if (!signal?.aborted) yield* this.lookAgain(suspects)
  }

  private async lookAt(keys: string[]): Promise<Orphan[]> {
    const found = keys.flatMap((key) => parseCallKey(key) ?? [])
    this.census.keys += keys.length
    const looks = await this.look(found, this.measureEvery)
    this.census.streams += looks.filter(({ place, kind }) => place.what === 'stream' && kind !== 'foreign').length
    for (const { bytes } of looks) this.census.bytes += bytes * this.measureEvery
    return looks.flatMap(({ kind, place }) => (kind === '' ? [] : [{ kind, place, key: keyOf(place) }]))
  }

  private async *lookAgain(suspects: Map<string, FoundKey>): AsyncGenerator<Orphan> {
    if (suspects.size === 0) return
    await sleep(this.pace.lookAgainMs)
    const all = [...suspects.values()]
    suspects.clear()
    for (let from = 0; from < all.length; from += this.pace.pageKeys) {
      const looks = await this.look(all.slice(from, from + this.pace.pageKeys), undefined)
      for (const { kind, place } of looks) if (kind !== '') yield { kind, place, key: keyOf(place) }
      await sleep(this.pace.pauseMs)
    }
  }

  /**
   * Makes an orphan somebody's again, if it still is one: to be read, and to end, as any other call.
   *
   * @param idleMs after which it is presumed over if it has no end
   * @returns false when it is none any more, or not to be adopted
   */
  async adopt(orphan: Orphan, idleMs: number): Promise<boolean> {
    if (!isAdoptable(orphan)) return false
    const [kind] = (await this.ask([orphan.place], 'adopt', idleMs, undefined))[0]!
    return kind !== '' && kind !== 'none' && kind !== 'foreign'
  }

  /** @param measureEvery of every nth stream its memory, and its session's; undefined: of none */
  private async look(found: FoundKey[], measureEvery: number | undefined) {
    const looks = await Promise.all(
      this.groupsOf(found).map(async (group) => {
        const replies = await this.ask(group, 'look', 0, measureEvery)
        return group.map((place, i) => {
          const [kind, bytes] = replies[i]!
          if (isUnreadable(place)) return { place, kind: 'invalid_call_sid' as const, bytes: 0 }
          if (kind === 'none') return { place, kind: '' as const, bytes: 0 }
          return { place, kind: kind === 'foreign' ? kind : this.byName(place) || kind, bytes }
        })
      }),
    )
    return looks.flat()
  }

  /** Keys that one script may touch together. */
  private groupsOf(found: FoundKey[]): FoundKey[][] {
    if (this.lanes.length === 1) return found.length > 0 ? [found] : []
    const numbers = new Set(found.map(({ partition }) => partition.partition))
    return [...numbers].map((number) => found.filter(({ partition }) => partition.partition === number))
  }

  /** What can be told by its name alone. */
  private byName({ callSid, partition }: CallPlace): OrphanKind | '' {
    if (!isCallSid(callSid)) return 'invalid_call_sid'
    return this.partitions.of(callSid).partition === partition.partition ? '' : 'misplaced'
  }

  private async ask(places: FoundKey[], mode: 'look' | 'adopt', idleMs: number, measureEvery: number | undefined) {
    const { partition } = places[0]!.partition
    const lane = this.lanes.find(({ partitions }) => partitions.some((p) => p.partition === partition))
    const keys = places.flatMap((place) => {
      const { ready, leased, open, ended } = place.partition
      return [ready, leased, open, ended, streamKey(place), sessionKey(place)]
    })
    const isMeasured = ({ what, callSid }: FoundKey) =>
      what === 'stream' && measureEvery !== undefined && hash(callSid) % measureEvery === 0
    const args = places.flatMap((place) => [place.callSid, place.what, isMeasured(place) ? 1 : 0])
    const wake = lane?.wake ?? places[0]!.partition.wake // of a partition that no sink knows nobody is woken
    const replies = await script.run(this.redis, [wake, ...keys], [mode, idleMs, ...args])
    return replies as [OrphanKind | '' | 'none', number][]
  }
}

/** Its name does not pass through UTF-8: no command of ours finds it. */
const isUnreadable = ({ callSid }: CallPlace) => callSid.includes('\uFFFD')

const keyOf = (place: FoundKey) => (place.what === 'stream' ? streamKey(place) : sessionKey(place))
