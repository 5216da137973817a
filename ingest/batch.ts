/** A batch: what goes to Redis in one call of append.lua, call by call. */
import { type CallEvent, isPresumedEnd, resumes } from '../shared/events.js'
import type { PartitionKeys, Partitions } from '../shared/keys.js'
import type { Origin } from './append.js'
import { sessionFields } from './session.js'

const MAX_EVENTS = 512
const MAX_BYTES = 1024 * 1024

interface CallEvents {
  partition: PartitionKeys
  bytes: number
  /** It goes on, had it been presumed over before or here: with an event that is not followed by another such end. */
  resumes: boolean
  payloads: string[]
  origins: Origin[]
  positions: number[]
  /** Field, value, field, value … */
  session: string[]
}

/** KEYS and ARGV of append.lua. */
export interface ScriptInput {
  keys: string[]
  args: (string | number)[]
}

export class Batch {
  readonly calls = new Map<string, CallEvents>()
  events = 0
  bytes = 0
  /** It is in flight. */
  isSent = false
  /** When it was made up, ms epoch. */
  readonly since = Date.now()

  constructor(readonly number: number) {}

  hasRoomFor(payload: string): boolean {
    return this.events === 0 || (this.events < MAX_EVENTS && this.bytes + payload.length <= MAX_BYTES)
  }

  add(event: CallEvent, payload: string, origin: Origin, position: number, partitions: Partitions): void {
    const sid = event.call_sid
    let call = this.calls.get(sid)
    if (!call) {
      const partition = partitions.of(sid)
      call = { partition, bytes: 0, resumes: false, payloads: [], origins: [], positions: [], session: [] }
      this.calls.set(sid, call)
    }
    // A UTF-16 unit takes one to three bytes; an estimate is good enough for limits, and cheaper than measuring.
    const bytes = payload.length
    call.payloads.push(payload)
    call.origins.push(origin)
    call.positions.push(position)
    call.bytes += bytes
    if (resumes(event)) call.resumes = true
    else if (isPresumedEnd(event)) call.resumes = false
    this.bytes += bytes
    this.events++
    for (const field of sessionFields(event)) call.session.push(field)
  }

  /** @param knownApplied the last batch of the producer that it knows to be applied, 0 for none */
  encode(
    producerKey: string,
    wake: string,
    knownApplied: number,
    idleTimeoutMs: number,
    disconnectGraceMs: number,
  ): ScriptInput {
    const keys = [producerKey, wake]
    const callKeys: string[] = []
    const calls: (string | number)[] = []
    const partitions = new Map<PartitionKeys, number>()
    for (const [sid, call] of this.calls) {
      let index = partitions.get(call.partition)
      if (index === undefined) {
        index = partitions.size + 1
        partitions.set(call.partition, index)
        keys.push(call.partition.ready, call.partition.leased, call.partition.open, call.partition.ended)
      }
      callKeys.push(call.partition.streamPrefix + sid, call.partition.sessionPrefix + sid)
      calls.push(sid, index, call.bytes, call.resumes ? 1 : 0, call.payloads.length)
      for (const payload of call.payloads) calls.push(payload)
      calls.push(call.session.length)
      for (const field of call.session) calls.push(field)
    }
    for (const key of callKeys) keys.push(key)
    const args: (string | number)[] = [this.number, knownApplied, idleTimeoutMs, disconnectGraceMs, partitions.size]
    for (const arg of calls) args.push(arg)
    return { keys, args }
  }
}
