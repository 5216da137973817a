/** A process of a peer: `peer.js NAME server|worker`. Tells its URL over IPC once it serves, and ends when its parent does. */
import { type Config, readConfig } from '../../shared/config.js'
import { type Store, serve } from './websocket.js'

interface Peer {
  /** What its WebSocket server does with events. */
  server(config: Config): Promise<Store>
  /** Its other process, if it has one. */
  worker?(config: Config): Promise<void>
}

const PEERS: Record<string, () => Promise<Peer>> = {
  legacy: () => import('./legacy.js'),
  insert: () => import('./insert.js'),
  'batched-insert': () => import('./batched-insert.js'),
  'plain-loop': () => import('./plain-loop.js'),
  bullmq: () => import('./bullmq.js'),
}

const [name = '', role] = process.argv.slice(2)
const peer = await PEERS[name]?.()
if (!peer) throw new Error(`there is no peer ${name}`)
process.once('disconnect', () => process.exit())
const config = readConfig()
if (role === 'worker') await peer.worker?.(config)
const url = role === 'worker' ? '' : await serve(config, await peer.server(config))
process.send?.({ url })
