/** A look: what some keys of the legacy bot hold now, and everything of it that is new into the streams. */
import { hash as digest } from 'node:crypto'
import type { Partitions } from '../../shared/keys.js'
import type { RedisClient } from '../../shared/redis.js'
import { endOf, type KnownCall, type News, newsOf, readKnownCall, type Stream } from './calls.js'
import { MissedEnds } from './missed.js'
import type { Condition, Report } from './report.js'
import { callSidInKey, readSession, type Session, type UnreadableSession } from './session.js'
import type { Found, Source, SourceKey } from './source.js'

/** How long the ids of a call are kept once it is over. Should it go on after that, its stream is read again. */
const KEPT_MS = 10 * 60_000

/** What is remembered of a key for as long as it is there. */
interface KnownKey {
  source: SourceKey
  /** Of the value whose every event is stored; undefined: look again, whatever it holds. */
  digest: string | undefined
  condition: Condition | undefined
  unreadableTurns: number
  /** Undefined when it holds no call's session, and once the call has been over for long. */
  call: KnownCall | undefined
  /** When the call was last heard of, epoch ms. */
  lastMs: number | undefined
  /** Since when it is known to be over, epoch ms. */
  overSince: number | undefined
  /** The last scan in which it was there. */
  scan: number
}

interface Look {
  key: KnownKey
  digest: string
  session: Session | UnreadableSession
}

export interface RescueParts {
  source: Source
  target: RedisClient
  partitions: Partitions
  /** Undefined in a dry run. */
  stream: Stream | undefined
  idleTimeoutMs: number
  report: Report
}

export class Rescue {
  private readonly keys = new Map<string, KnownKey>()
  private scans = 0

  constructor(private readonly parts: RescueParts) {}

  get source(): Source {
    return this.parts.source
  }

  knows(key: string): boolean {
    return this.keys.has(key)
  }

  beginScan(): void {
    this.scans++
  }

  /** Keys that a whole scan has not met: SCAN names every key that is there all the time. */
  unmet(): SourceKey[] {
    return [...this.keys.values()].filter(({ scan }) => scan !== this.scans).map(({ source }) => source)
  }

  /**
   * Looks at keys, and has everything new of them stored when it resolves.
   *
   * @throws NotStoredError when calltape's Redis does not take it, and what the source's throws; the next look makes up for it
   */
  async look(keys: SourceKey[]): Promise<void> {
    for await (const page of this.source.read(keys)) {
      const gone: KnownKey[] = []
      const looks: Look[] = []
      for (const { source, found } of page) this.take(source, found, gone, looks)
      await this.save(looks)
      await this.end(gone.flatMap(({ call }) => call ?? []))
      for (const { source } of gone) this.keys.delete(source.key)
    }
  }

  /** Calls that went silent are over; those that have been over for long need not be remembered. */
  async endSilent(now = Date.now()): Promise<void> {
    const silent: KnownCall[] = []
    for (const key of this.keys.values()) {
      if (!key.call) continue
      if (key.call.isOver) {
        key.overSince ??= now
        if (now - key.overSince > KEPT_MS) key.call = undefined
      } else {
        key.overSince = undefined
        if (key.lastMs !== undefined && now - key.lastMs > this.parts.idleTimeoutMs) silent.push(key.call)
      }
    }
    await this.end(silent)
  }

  /**
   * After a whole scan: ends calls whose key went while no rescue was running. In steps, between which others get their turn.
   *
   * @throws as `look` does; then it is to be done again
   */
  async *endMissed(): AsyncGenerator<void> {
    const { source, target, partitions } = this.parts
    const missed = new MissedEnds(target, partitions, source)
    // By call_sid: it may be the value that says it, not the key.
    const seen = () => new Set([...this.keys.values()].map(({ call }) => call?.callSid))
    for await (const callSids of missed.find(seen)) {
      const calls = await Promise.all(callSids.map((sid) => readKnownCall(target, partitions, sid)))
      const gone = new Set(await missed.withoutKey(callSids)) // a bot may have begun it again just now
      await this.end(calls.filter(({ callSid }) => gone.has(callSid)))
      yield
    }
  }

  /** Calls that were looked at, and the ids of their turns. */
  *savedTurns(): Generator<[callSid: string, turnIds: Iterable<string>]> {
    for (const { call } of this.keys.values()) if (call) yield [call.callSid, call.seen]
  }

  private take(source: SourceKey, found: Found, gone: KnownKey[], looks: Look[]): void {
    const { report } = this.parts
    const known = this.keys.get(source.key)
    if ('gone' in found) {
      if (known) gone.push(known)
      else report.counts.expired++
      return
    }
    const key = known ?? this.meet(source)
    key.scan = this.scans
    if ('reason' in found) {
      key.digest = undefined
      this.judge(key, 'unreadable', found.reason)
      return
    }
    const itsDigest = digest('sha1', found.text, 'base64')
    if (key.digest === itsDigest) return
    const session = readSession(callSidInKey(source.key, this.source.pattern), found.text)
    looks.push({ key, digest: itsDigest, session })
  }

  private meet(source: SourceKey): KnownKey {
    const key: KnownKey = {
      source,
      digest: undefined,
      condition: undefined,
      unreadableTurns: 0,
      call: undefined,
      lastMs: undefined,
      overSince: undefined,
      scan: this.scans,
    }
    this.keys.set(source.key, key)
    this.parts.report.counts.sessions++
    return key
  }

  private async save(looks: Look[]): Promise<void> {
    const { target, partitions, stream, report } = this.parts
    const found = await Promise.all(
      looks.map(async ({ key, session }) => {
        const callSid = 'started' in session ? session.callSid : session.data?.call_sid
        if (callSid === undefined) return undefined
        if (key.call?.callSid !== callSid) key.call = await readKnownCall(target, partitions, callSid)
        return newsOf(key.call, session)
      }),
    )
    const refused = (await stream?.append(found.filter((news) => news !== undefined))) ?? new Map<KnownCall, string>()
    for (const [i, look] of looks.entries()) {
      const news = found[i]
      const refusal = news && refused.get(news.call)
      if (refusal !== undefined) {
        this.judge(look.key, 'unreadable', refusal)
        continue
      }
      if (news) this.count(news)
      this.judgeLook(look)
      // What changes under our eyes is not silent, however its bot's clock is set: that counts only for what was there before.
      const hasChanged = look.key.digest !== undefined && look.key.digest !== look.digest
      look.key.digest = look.digest
      if ('started' in look.session) look.key.lastMs = hasChanged ? Date.now() : look.session.lastMs
    }
    report.counts.turns = report.counts.new + report.counts.already_there
  }

  private count({ call, events, alreadyThere }: News & { alreadyThere: string[] }): void {
    const { counts } = this.parts.report
    const appended = events.filter(({ type }) => type === 'turn')
    for (const id of alreadyThere) {
      call.onlyInStream.delete(id)
      call.seen.add(id)
    }
    // In a dry run as well: what would be appended is counted once.
    for (const { id } of appended) call.seen.add(id!)
    counts.new += appended.length
    counts.already_there += alreadyThere.length
  }

  private judgeLook({ key, session }: Look): void {
    const { report } = this.parts
    if (!('started' in session)) {
      this.judge(key, 'unreadable', session.reason)
      return
    }
    if (session.isTruncated) this.judge(key, 'truncated', 'it breaks off: what was complete before is saved')
    else this.judge(key, 'readable')
    const { unreadable } = session
    report.counts.unreadable_turns += unreadable.length - key.unreadableTurns
    key.unreadableTurns = unreadable.length
    if (unreadable.length === 0) report.lose(key.source.key, 'turns')
    else {
      const reasons = [...new Set(unreadable)].join('; ')
      report.find(key.source.key, 'turns', `${unreadable.length} of its turns cannot be read: ${reasons}`)
    }
  }

  private judge(key: KnownKey, condition: Condition, reason?: string): void {
    const { report } = this.parts
    for (const counted of ['truncated', 'unreadable'] as const) {
      if (key.condition === counted) report.counts[counted]--
      if (condition === counted) report.counts[counted]++
    }
    key.condition = condition
    if (reason === undefined) report.lose(key.source.key, 'value')
    else report.find(key.source.key, 'value', reason)
  }

  /** Behind the turns, which are stored: a turn that came after the end would make the call live again. */
  private async end(calls: KnownCall[]): Promise<void> {
    const { stream, report } = this.parts
    const ends = calls.flatMap((call) => endOf(call) ?? [])
    const refused = await stream?.append(ends)
    for (const { call } of ends) {
      if (refused?.has(call)) continue
      call.isOver = true // a dry run, too, ends it once
      report.counts.ended++
    }
  }
}
