/** No Redis: the WebSocket server INSERTs what has arrived meanwhile, many rows a statement. */
import type { SentEvent } from '../../cli/compare.js'
import type { Config } from '../../shared/config.js'
import { hash } from '../../shared/keys.js'
import { createPool } from '../../shared/postgres.js'
import { Batcher } from './batcher.js'
import { storeEvents } from './rows.js'
import type { Store } from './websocket.js'

const ROWS = 2000
const CONNECTIONS = 2

export async function server(config: Config): Promise<Store> {
  const pool = createPool(config, 'peer', CONNECTIONS)
  // A call is always with the same one: its end must not overtake its turns.
  const batchers = Array.from(
    { length: CONNECTIONS },
    () => new Batcher<SentEvent>((events) => storeEvents(pool, events), ROWS),
  )
  return async (events) => {
    await Promise.all(events.map((event) => batchers[hash(event.call_sid) % CONNECTIONS]!.add(event)))
  }
}
