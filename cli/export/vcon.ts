/**
 * An export as a vCon, the IETF's container for conversations: the unsigned form of draft-ietf-vcon-vcon-core-04 (7 September 2026,
 * https://datatracker.ietf.org/doc/html/draft-ietf-vcon-vcon-core-04), syntax "0.4.0", with the roles of parties from the Contact
 * Center extension (draft-ietf-vcon-cc-extension-02, extension "CC", which whoever does not know it may ignore).
 *
 * - A turn is a Dialog Object of type "text", which "contains the text from one of the parties for a segment of the conversation"
 *   (4.3.1.3). It is no Analysis Object of type "transcript": that one is of a recording in `dialog`, and calltape has none to show. The
 *   recording's URL may not be a Dialog Object either: that wants the content's hash (2.4). It is in the Analysis Object "report", with
 *   all else that is known of the call.
 * - A call that never came about is a Dialog Object of type "incomplete" with its disposition.
 * - The same call gives the same bytes: `uuid` is of version 8, made of the call_sid as RFC 9562 describes it (appendix B.2), and
 *   `created_at` is when the conversation began.
 */
import { createHash } from 'node:crypto'
import type { CallFacts, ExportedCall, ExportedTurn } from './call.js'

const VERSION = '0.4.0'
/** Of calltape's vCons, for the UUIDs: a random one, never to be changed. */
const NAMESPACE = Buffer.from('6f0d4f0c5a7e4b0f9d1be3a2c4785f16', 'hex')

interface Party {
  tel?: string
  sip?: string
  name?: string
  /** Who says that the name is right. */
  validation?: 'none'
  /** Of the extension "CC". */
  role?: string
}

type Dialog =
  | {
      type: 'text'
      start: string
      /** Seconds. */
      duration?: number
      parties: number[]
      mediatype: 'text/plain'
      body: string
      encoding: 'none'
      /** The turn's id. */
      message_id: string
      application?: string
    }
  | { type: 'incomplete'; start?: string; parties: number[]; disposition: string }

interface Analysis {
  type: 'report'
  /** Indices of all that it is about. */
  dialog: number[]
  mediatype: 'application/json'
  vendor: 'calltape'
  schema: 'calltape-call-1'
  body: object
  encoding: 'json'
}

export interface Vcon {
  vcon: typeof VERSION
  uuid: string
  extensions: ['CC']
  created_at: string
  updated_at?: string
  subject: string
  parties: Party[]
  dialog: Dialog[]
  analysis: Analysis[]
}

/** A call's status, as the draft says why a conversation did not come about (4.3.11). */
const DISPOSITIONS: Record<string, string> = {
  busy: 'busy',
  failed: 'failed',
  'no-answer': 'no-answer',
  canceled: 'no-answer',
}

export function asVcon({ call_sid, call, turns, events, quarantined }: ExportedCall): Vcon {
  const parties = new Parties(call)
  const dialog: Dialog[] = turns.map((turn) => dialogOf(turn, parties.of(turn.speaker), call?.provider))
  const disposition = DISPOSITIONS[call?.status ?? '']
  const began = call?.initiated_at ?? turns[0]?.spoken_at ?? events[0]?.occurred_at
  const start = began?.toISOString() ?? new Date(0).toISOString()
  if (turns.length === 0 && disposition !== undefined) {
    dialog.push({ type: 'incomplete', start, parties: parties.all.map((_, index) => index), disposition })
  }
  return {
    vcon: VERSION,
    uuid: uuidOf(call_sid),
    extensions: ['CC'],
    created_at: start,
    ...(call?.last_event_at ? { updated_at: call.last_event_at.toISOString() } : {}),
    subject: `call ${call_sid}`,
    parties: parties.all,
    dialog,
    analysis: [
      {
        type: 'report',
        dialog: dialog.map((_, index) => index),
        mediatype: 'application/json',
        vendor: 'calltape',
        schema: 'calltape-call-1',
        body: { call_sid, call, turns: turns.map(besideTheText), events, quarantined },
        encoding: 'json',
      },
    ],
  }
}

function dialogOf(turn: ExportedTurn, party: number, provider: string | null | undefined): Dialog {
  const { started_at, ended_at, spoken_at } = turn
  const duration = started_at && ended_at ? (ended_at.getTime() - started_at.getTime()) / 1000 : -1
  return {
    type: 'text',
    start: (started_at ?? spoken_at).toISOString(),
    ...(duration >= 0 ? { duration } : {}),
    parties: [party],
    mediatype: 'text/plain',
    body: turn.text,
    encoding: 'none',
    message_id: turn.turn_id,
    ...(provider ? { application: provider } : {}),
  }
}

/** What a Dialog Object has no place for. */
function besideTheText({ turn_id, seq, speaker, confidence, language, interrupted, meta }: ExportedTurn) {
  return { turn_id, seq, speaker, confidence, language, interrupted, meta }
}

/** Who took part: those with an address, and those who have said something. */
class Parties {
  readonly all: Party[] = []
  private readonly indices = new Map<string, number>()

  /** The originator comes first. Whoever calls an inbound call is the customer; whose number is whose is not known otherwise. */
  constructor(call: CallFacts | null) {
    if (!call) return
    const { direction, from_number: from, to_number: to } = call
    const [caller, callee] = direction === 'outbound' ? ['agent', 'customer'] : ['customer', 'agent']
    if (from !== null) this.add(direction ? caller! : undefined, addressOf(from))
    if (to !== null) this.add(direction ? callee! : undefined, addressOf(to))
  }

  /** @returns the index of whoever speaks */
  of(speaker: string): number {
    const index = this.indices.get(speaker)
    if (index !== undefined) return index
    if (speaker === 'agent' || speaker === 'customer') return this.add(speaker, {})
    // A role would say more than is known: it is no contact center's.
    this.indices.set(speaker, this.all.length)
    return this.all.push({ name: speaker, validation: 'none' }) - 1
  }

  private add(role: string | undefined, address: Party): number {
    if (role !== undefined) this.indices.set(role, this.all.length)
    return this.all.push({ ...address, ...(role === undefined ? {} : { role }) }) - 1
  }
}

const addressOf = (address: string): Party =>
  /^sips?:|@/i.test(address) ? { sip: address } : { tel: address.replace(/^tel:/i, '') }

function uuidOf(callSid: string): string {
  const bytes = createHash('sha256').update(NAMESPACE).update(callSid).digest().subarray(0, 16)
  bytes[6] = (bytes[6]! & 0x0f) | 0x80
  bytes[8] = (bytes[8]! & 0x3f) | 0x80
  return bytes.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5')
}
