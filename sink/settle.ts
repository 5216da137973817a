/** What became of leases, and how settle.lua is told. */
import type { Lease } from './lease.js'

/** What became of a lease. */
export interface Settlement {
  lease: Lease
  /** The last entry committed; undefined: none, the call is given back. */
  last: string | undefined
  /** How many entries were read. */
  count: number
  finalized: boolean
  /** Finalized, and only because it is presumed over. */
  presumed?: true
  /** It is given back because it came to nothing, and perhaps that was its own doing. */
  lapsed?: boolean
  /** Something that could be read is in quarantine now: it may have been the call's end. */
  quarantined?: boolean
  /** There was progress, but not yet at what its lapses are for. */
  keepLapses?: boolean
  /** It is given back before anything was tried: what is known of it stays. */
  untried?: boolean
}

/** It was leased, and not looked at. */
export const untouched = (lease: Lease): Settlement => ({ ...givenBack(lease), untried: true })

/** Nothing of it was committed: whoever works next may have the call at once. */
export const givenBack = (lease: Lease): Settlement => ({ lease, last: undefined, count: 0, finalized: false })

export interface Settled {
  /** How many leases had lapsed. */
  lapsed: number
  /** The numbers of partitions with calls that are ready again. */
  again: number[]
  /** Entries that somebody trimmed away before they were committed. */
  lost: { callSid: string; entries: number }[]
  /** Why some of the leases are not settled; the rest is of the others. */
  failure?: Error
}

/** What settle.lua is told of a call. */
export function settleArgs(settlement: Settlement): (string | number)[] {
  const { lease, last, count } = settlement
  const read = lease.read < 0 ? -1 : lease.read + count
  const isAll = read >= 0 && count === lease.counted ? 1 : 0
  return [lease.callSid, last ?? lease.cursor, read, isAll, endOf(settlement), lapsesAfter(settlement)]
}

/** Of the call's end. */
const endOf = ({ finalized, presumed, quarantined }: Settlement) =>
  finalized ? (presumed ? 'presumed' : 'finalized') : quarantined ? 'quarantined' : 'unknown'

/** What is to be done with the call's lapses. */
function lapsesAfter({ lease, last, lapsed, keepLapses, untried }: Settlement): 'none' | 'add' | 'keep' | 'forget' {
  if (lapsed) return 'add'
  if (lease.lapses === 0 || untried) return 'none'
  return last === undefined || keepLapses ? 'keep' : 'forget'
}
