/** verify: what became of each entry. */
import { compareIds, isEntryId } from '../../shared/entry-ids.js'
import { type CallEvent, isPresumedEnd, resumes } from '../../shared/events.js'
import { type CallPlace, streamKey } from '../../shared/keys.js'
import type { Pool } from '../../shared/postgres.js'
import { type Entry, type EventRow, storable } from '../../sink/decode.js'
import { type DecodedEntry, decodeAlone, leaseFromStart } from '../entries.js'
import {
  pair,
  readQuarantine,
  readRows,
  type StoredRow,
  type Table,
  wrongEventColumns,
  wrongTurnColumns,
} from './rows.js'

/** `stored`: there is its row. `misplaced`: there is a row of its key, but made from a later entry. */
export type Outcome = 'stored' | 'misplaced' | 'duplicate' | 'quarantined' | 'dropped' | 'absent'

export interface EntryFacts {
  id: string
  /** Where its row belongs; undefined when it cannot be decoded and belongs into quarantine. */
  table: Table | undefined
  key: string
  seq: number | undefined
  /** What it says of the call: that it is over (or presumed so), or that it goes on after all. */
  says: 'over' | 'presumed over' | 'goes on' | undefined
}

export interface ComparedEntry extends EntryFacts {
  outcome: Outcome
  /** Columns that differ. */
  wrong: string[]
}

export function factsOf(decoded: DecodedEntry, id: string): EntryFacts {
  if ('turn' in decoded) {
    const { turn, turnId: key } = decoded.turn
    return { id, table: 'turns', key, seq: turn.seq, says: saysOf(turn) }
  }
  if ('event' in decoded) {
    const { eventId: key, event } = decoded.event
    return { id, table: 'events', key, seq: undefined, says: saysOf(JSON.parse(event) as CallEvent) }
  }
  return { id, table: undefined, key: id, seq: undefined, says: undefined }
}

function saysOf(event: CallEvent): EntryFacts['says'] {
  if (event.type === 'call.ended') return isPresumedEnd(event) ? 'presumed over' : 'over'
  return resumes(event) ? 'goes on' : undefined
}

const wrongColumns = (decoded: DecodedEntry, row: StoredRow) =>
  'turn' in decoded
    ? wrongTurnColumns(decoded.turn, row)
    : wrongEventColumns((decoded as { event: EventRow }).event, row)

/** Reads all rows that a page of entries may have made, and says of each entry what became of it. */
export async function compareEntries<W extends CallPlace>(
  pool: Pool,
  page: { walk: W; entries: Entry[] }[],
): Promise<Map<W, ComparedEntry[]>> {
  const decoded = page.flatMap(({ walk, entries }) => {
    const lease = leaseFromStart(walk.callSid, walk.partition)
    return entries.map((entry) => {
      const its = decodeAlone(lease, entry)
      return { walk, decoded: its, facts: factsOf(its, entry[0]) }
    })
  })
  const keys = (table: Table) =>
    decoded.flatMap(({ walk, facts }): [string, string][] => (facts.table === table ? [[walk.callSid, facts.key]] : []))
  const [turns, events] = await Promise.all([
    readRows(pool, 'turns', keys('turns')),
    readRows(pool, 'events', keys('events')),
  ])
  const rowOf = ({ table, key }: EntryFacts, callSid: string) =>
    table && (table === 'turns' ? turns : events).get(pair(callSid, key))
  const isItsOwn = (row: StoredRow | undefined, id: string) =>
    row !== undefined && (row.stream_id === id || (isEntryId(row.stream_id) && compareIds(row.stream_id, id) < 0))
  const placeOf = (walk: W, { id }: EntryFacts): [string, string] => [storable(streamKey(walk)), id]
  const quarantine = await readQuarantine(
    pool,
    decoded.flatMap(({ walk, facts }): [string, string][] =>
      isItsOwn(rowOf(facts, walk.callSid), facts.id) ? [] : [placeOf(walk, facts)],
    ),
  )
  const compared = new Map<W, ComparedEntry[]>(page.map(({ walk }) => [walk, []]))
  for (const { walk, decoded: its, facts } of decoded) {
    const row = rowOf(facts, walk.callSid)
    const kept = quarantine.get(pair(...placeOf(walk, facts)))
    let outcome: Outcome = kept ?? (row ? 'misplaced' : 'absent')
    if (row && isItsOwn(row, facts.id)) outcome = row.stream_id === facts.id ? 'stored' : 'duplicate'
    const wrong = row && (outcome === 'stored' || outcome === 'misplaced') ? wrongColumns(its, row) : []
    compared.get(walk)!.push({ ...facts, outcome, wrong })
  }
  return compared
}
