/** No Redis: the WebSocket server INSERTs each turn by itself, over a pool of connections. */
import type { SentEvent } from '../../cli/compare.js'
import type { Config } from '../../shared/config.js'
import { createPool } from '../../shared/postgres.js'
import { INSERT_TURN, isTurn, storeEvents, turnValues } from './rows.js'
import type { Store } from './websocket.js'

const CONNECTIONS = 20

export async function server(config: Config): Promise<Store> {
  const pool = createPool(config, 'peer', CONNECTIONS)
  /** What is not stored yet of a call: its end waits for that. */
  const pending = new Map<string, Promise<unknown>>()
  const insert = async (event: SentEvent) => {
    if (isTurn(event)) await pool.query({ ...INSERT_TURN, values: turnValues(event) })
    else await storeEvents(pool, [event])
  }
  const take = (event: SentEvent) => {
    const { call_sid: sid, type } = event
    const before = pending.get(sid)
    if (type === 'call.ended') pending.delete(sid)
    const done = type === 'call.ended' && before ? before.then(() => insert(event)) : insert(event)
    if (type !== 'call.ended') pending.set(sid, before ? Promise.all([before, done]) : done)
    return done
  }
  return async (events) => {
    await Promise.all(events.map(take))
  }
}
