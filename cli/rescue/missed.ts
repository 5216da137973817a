/** Calls of rescue's that are still live in calltape although their key is gone: that happened while no rescue was running. */
import { type CallEvent, Refusal } from '../../shared/events.js'
import type { Partitions } from '../../shared/keys.js'
import type { RedisClient } from '../../shared/redis.js'
import { parseEntry } from '../../sink/decode.js'
import { callSidInKey, SOURCE } from './session.js'
import { Source } from './source.js'

/** Calls that are asked about at once. */
const PAGE_CALLS = 100
/** Errors of a key: it is there, and another type or not ours to read. */
const OF_THE_KEY = /^(WRONGTYPE|NOPERM)/
/** A `*`, and nothing else that stands for more than itself. */
const ONE_STAR = /^([^*?[\\]*)\*([^*?[\\]*)$/s

/** @returns the key that the pattern finds with this call_sid in it; undefined when there is none, or the pattern allows several */
export function keyOfCall(callSid: string, pattern: string): string | undefined {
  const [, beginning, end] = ONE_STAR.exec(pattern) ?? []
  if (beginning === undefined || end === undefined) return undefined
  // The call_sid may begin before the `*`, and it goes on to the key's end.
  const key = beginning.slice(0, beginning.length - callSidInKey(beginning, pattern).length) + callSid
  const isFound = key.startsWith(beginning) && key.endsWith(end) && key.length >= beginning.length + end.length
  return isFound ? key : undefined
}

export class MissedEnds {
  constructor(
    private readonly target: RedisClient,
    private readonly partitions: Partitions,
    private readonly source: Source,
  ) {}

  /**
   * Looks for calls that may be ended. In steps, between which others get their turn: only the last one has found any.
   *
   * @param seen the calls of which a key was met until now: they are looked after already
   */
  async *find(seen: () => ReadonlySet<string | undefined>): AsyncGenerator<string[]> {
    if (!ONE_STAR.test(this.source.pattern)) return
    const missed = new Set<string>()
    const seenBefore = seen()
    for await (const open of this.openCalls()) {
      const unseen = open.filter((sid) => !seenBefore.has(sid) && keyOfCall(sid, this.source.pattern) !== undefined)
      for (const sid of await this.withoutKey(await this.begunByRescue(unseen))) missed.add(sid)
      yield []
    }
    // Another rescue may have begun it, with another pattern: whatever that is, its key ends with the call_sid.
    if (missed.size > 0) yield* this.dropThoseUnderOtherKeys(missed)
    const seenNow = seen()
    const found = [...missed].filter((sid) => !seenNow.has(sid))
    for (let i = 0; i < found.length; i += PAGE_CALLS) yield found.slice(i, i + PAGE_CALLS)
  }

  /** @returns those whose key is not there now */
  async withoutKey(callSids: string[]): Promise<string[]> {
    const there = await Promise.all(callSids.map((sid) => this.hasKey(keyOfCall(sid, this.source.pattern)!)))
    return callSids.filter((_, i) => !there[i])
  }

  /** By GET, which is what rescue is allowed in any case; there is hardly one that is there. */
  private async hasKey(key: string): Promise<boolean> {
    try {
      return (await this.source.client.get(key)) !== null
    } catch (error) {
      if (OF_THE_KEY.test((error as Error).message)) return true
      throw error
    }
  }

  /** Live calls, a page at a time. */
  private async *openCalls(): AsyncGenerator<string[]> {
    for (const { open } of this.partitions.all) {
      let cursor = '0'
      do {
        const [next, members] = await this.target.zscan(open, cursor, 'COUNT', PAGE_CALLS)
        cursor = next
        const sids = members.filter((_, i) => i % 2 === 0) // behind each its score
        for (let i = 0; i < sids.length; i += PAGE_CALLS) yield sids.slice(i, i + PAGE_CALLS)
      } while (cursor !== '0')
    }
  }

  private async begunByRescue(callSids: string[]): Promise<string[]> {
    const isOurs = await Promise.all(
      callSids.map(async (sid) => {
        const event = await this.firstEvent(sid)
        return event !== undefined && !(event instanceof Refusal) && event.source === SOURCE
      }),
    )
    return callSids.filter((_, i) => isOurs[i])
  }

  private async firstEvent(callSid: string): Promise<CallEvent | Refusal | undefined> {
    const stream = this.partitions.of(callSid).streamPrefix + callSid
    const [first] = await this.target.xrange(stream, '-', '+', 'COUNT', 1).catch((error: Error) => {
      if (error.message.startsWith('WRONGTYPE')) return []
      throw error
    })
    return first && parseEntry(callSid, first[1])
  }

  private async *dropThoseUnderOtherKeys(callSids: Set<string>): AsyncGenerator<string[]> {
    const lengths = new Set([...callSids].map((sid) => sid.length))
    for await (const page of new Source(this.source.client, '*').scan()) {
      for (const { key } of page) for (const length of lengths) callSids.delete(key.slice(-length))
      yield []
    }
  }
}
