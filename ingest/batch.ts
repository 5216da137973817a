/** A batch: what goes to Redis in one call of append.lua, call by call. */
import type { PartitionKeys, Partitions } from '../shared/keys.js'
import type { Origin } from './append.js'
import type { Waiting, WaitingCall } from './fair-queue.js'
import type { ScriptCall } from './script-call.js'

const MAX_EVENTS = 512
const MAX_BYTES = 1024 * 1024

interface CallEvents {
  callSid: string
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

export class Batch {
  readonly calls: CallEvents[] = []
  events = 0
  bytes = 0
  /** It is in flight. */
  isSent = false
  /** When it was made up, ms epoch. */
  readonly since = Date.now()
  private readonly byCall = new Map<WaitingCall, CallEvents>()

  constructor(readonly number: number) {}

  hasRoomFor(payload: string): boolean {
    return this.events === 0 || (this.events < MAX_EVENTS && this.bytes + payload.length <= MAX_BYTES)
  }

  add({ call: waiting, payload, note, origin, position }: Waiting, partitions: Partitions): void {
    let call = this.byCall.get(waiting)
    if (!call) {
      const { callSid } = waiting
      const partition = partitions.of(callSid)
      call = { callSid, partition, bytes: 0, resumes: false, payloads: [], origins: [], positions: [], session: [] }
      this.byCall.set(waiting, call)
      this.calls.push(call)
    }
    // A UTF-16 unit takes one to three bytes; an estimate is good enough for limits, and cheaper than measuring.
    const bytes = payload.length
    call.payloads.push(payload)
    call.origins.push(origin)
    call.positions.push(position)
    call.bytes += bytes
    if (note.resumes !== undefined) call.resumes = note.resumes
    this.bytes += bytes
    this.events++
    for (const field of note.session) call.session.push(field)
  }

  /**
   * KEYS and ARGV of append.lua.
   *
   * @param knownApplied the last batch of the producer that it knows to be applied, 0 for none
   */
  encode(
    script: ScriptCall,
    producerKey: string,
    wake: string,
    knownApplied: number,
    idleTimeoutMs: number,
    disconnectGraceMs: number,
  ): void {
    script.key(producerKey)
    script.key(wake)
    const partitions = new Map<PartitionKeys, number>()
    for (const { partition } of this.calls) {
      if (partitions.has(partition)) continue
      partitions.set(partition, partitions.size + 1)
      script.key(partition.ready)
      script.key(partition.leased)
      script.key(partition.open)
      script.key(partition.ended)
    }
    for (const { partition, callSid } of this.calls) {
      script.key(partition.streamPrefix + callSid)
      script.key(partition.sessionPrefix + callSid)
    }
    for (const arg of [this.number, knownApplied, idleTimeoutMs, disconnectGraceMs, partitions.size]) script.arg(arg)
    for (const call of this.calls) {
      script.arg(call.callSid)
      script.arg(partitions.get(call.partition)!)
      script.arg(call.bytes)
      script.arg(call.resumes ? 1 : 0)
      script.arg(call.payloads.length)
      for (const payload of call.payloads) script.arg(payload)
      script.arg(call.session.length)
      for (const field of call.session) script.arg(field)
    }
  }
}
