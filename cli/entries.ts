/** Stream entries outside of a lease: what was stored of them long ago (verify), what is to be tried again (quarantine). */
import type { PartitionKeys } from '../shared/keys.js'
import { decodeCall, type Entry, type EventRow, emptyBatch, type QuarantineRow, type TurnRow } from '../sink/decode.js'
import type { Lease } from '../sink/lease.js'

/** A call as a worker that is to read it from its beginning would lease it. For decoding only: no such lease is in Redis. */
export function leaseFromStart(callSid: string, partition: PartitionKeys): Lease {
  return {
    callSid,
    partition,
    deadline: 0,
    cursor: '0-0',
    waiting: 0,
    counted: 0,
    read: 0,
    finalized: false,
    lapses: 0,
    oldestMs: 0,
    bytesAnEntry: 0,
    presumed: false,
  }
}

/** What a worker makes of an entry: the row of a turn, of another event, or of the quarantine. */
export type DecodedEntry = { turn: TurnRow } | { event: EventRow } | { refused: QuarantineRow }

/** Decodes one entry exactly as a worker does. */
export function decodeAlone(lease: Lease, entry: Entry): DecodedEntry {
  const batch = emptyBatch<TurnRow[]>([])
  decodeCall(lease, [entry], batch)
  const [turn, event, refused] = [batch.turns[0], batch.events[0], batch.quarantine[0]]
  if (turn) return { turn }
  if (event) return { event }
  return { refused: refused! }
}
