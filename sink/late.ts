/**
 * Late events of calls that are past their retention: the stream begins anew, and Redis does not know any more that the call
 * has ended. PostgreSQL does. So before calls are presumed over it is asked whether they are final there: another end, in words
 * of ours, could change the outcome of a call that has long been told.
 */
import { isCallSid } from '../shared/event-rules.js'
import { type CallPlace, type Partitions, sessionKey, streamKey } from '../shared/keys.js'
import { lanesOf, someOf } from '../shared/lanes.js'
import type { Pool } from '../shared/postgres.js'
import type { RedisClient } from '../shared/redis.js'
import { Script } from '../shared/script.js'
import { AwayServers } from './away.js'

const script = new Script('sink/due.lua')

/** What came late is not committed yet: the call is looked at again after this time. */
const PUT_OFF_MS = 3000
/** The answer costs PostgreSQL a few ms; a connection that is dead without a word must not hold up the reaper for hours. */
const ANSWER_MS = 10_000

const FINAL_CALLS = {
  name: 'final-calls',
  text: 'SELECT call_sid FROM call_sessions WHERE call_sid = ANY($1::text[]) AND finalized_at IS NOT NULL',
}

/** A call that is due, as due.lua knows it. */
interface Due {
  call: CallPlace
  index: number
  last: string | null
}

/**
 * Closes calls that are due to be presumed over, and are final in PostgreSQL.
 *
 * @param most calls to ask about, of each lane
 * @returns those that may be presumed over now, and of how many calls they are all
 * @throws Redis' and PostgreSQL's errors, also when there is no answer in time: then none should be presumed over
 */
export async function closeFinal(
  redis: RedisClient,
  pool: Pool,
  partitions: Partitions,
  most: number,
): Promise<{ calls: CallPlace[]; due: number }> {
  const servers = AwayServers.of(redis)
  const reachable = lanesOf(redis, partitions).filter((lane) => !servers.isAway(lane))
  const lanes = reachable.map(({ wake, partitions }) => {
    const keys = [wake, ...partitions.flatMap((p) => [p.ready, p.leased, p.open, p.ended])]
    return { wake, partitions, keys }
  })
  const results = await Promise.allSettled(
    lanes.map(async ({ wake, keys, partitions }): Promise<Due[]> => {
      const args = ['look', most, ...partitions.map((p) => p.streamPrefix)]
      const found = (await servers.inTime({ wake }, script.run(redis, keys, args))) as [number, string, string | null][]
      return found.map(([index, callSid, last]) => ({
        call: { callSid, partition: partitions[index - 1]! },
        index,
        last,
      }))
    }),
  )
  const due = someOf(results).flat() // one shard of a Cluster that cannot be reached does not stop the others
  const final = await finalOf(pool, due)
  const isFinal = ({ call, last }: Due) => last !== null && final.has(call.callSid)
  await Promise.all(
    lanes.map(async ({ keys, partitions }) => {
      const its = due.filter((each) => isFinal(each) && partitions.includes(each.call.partition))
      const args = its.flatMap(({ call, index, last }) => [
        index,
        call.callSid,
        streamKey(call),
        sessionKey(call),
        last!,
      ])
      if (args.length > 0) await script.run(redis, keys, ['close', PUT_OFF_MS, ...args])
    }),
  )
  return { calls: due.filter((each) => !isFinal(each)).map(({ call }) => call), due: due.length }
}

async function finalOf(pool: Pool, due: Due[]): Promise<Set<string>> {
  const sids = due.map(({ call }) => call.callSid).filter(isCallSid) // another's member might be refused, and all with it
  if (sids.length === 0) return new Set()
  const question = { ...FINAL_CALLS, values: [sids], query_timeout: ANSWER_MS }
  const { rows } = await pool.query<{ call_sid: string }>(question)
  return new Set(rows.map((row) => row.call_sid))
}
