/** A call whose retention is over, claimed by one sink, and what is in its stream. */
import { type CallPlace, streamKey } from '../shared/keys.js'
import type { RedisClient } from '../shared/redis.js'
import type { ArchivedEntry } from './archive.js'

/** Of one XRANGE: Redis must not be kept from others for more than about a millisecond. */
const READ_ENTRIES = 500
const READ_BYTES = 1024 * 1024
/** What an entry has beside the event. */
const ENTRY_OVERHEAD_BYTES = 100

export interface Claimed extends CallPlace {
  /** Proves the claim. */
  token: number
  /** The stream's first entry; '' when it has none. */
  first: string
  /** The stream's last entry; '' when there is no stream any more. */
  last: string
  entries: number
  /** Of their JSON; 0 where the session is gone. */
  bytes: number
}

/** Its stream, page by page, up to the entry that was its last one when it was claimed. @throws Redis' errors */
export async function* readClaimed(client: RedisClient, call: Claimed): AsyncGenerator<ArchivedEntry[]> {
  const bytesAnEntry = ENTRY_OVERHEAD_BYTES + call.bytes / Math.max(1, call.entries)
  const count = Math.max(1, Math.min(READ_ENTRIES, Math.floor(READ_BYTES / bytesAnEntry)))
  for (let from = '-'; ; ) {
    const page = await client.xrangeBuffer(streamKey(call), from, call.last, 'COUNT', count)
    if (page.length > 0) yield page.map(([id, fields]) => ({ id: id.toString(), fields }))
    if (page.length < count) return
    from = `(${page.at(-1)![0]}`
  }
}
