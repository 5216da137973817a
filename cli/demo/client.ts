/** The demo's connections to ingest. */
import { type Client, ConnectionClosed, type ConnectOptions, connect } from '../../client/client.js'
import { OperatorError } from '../../shared/config.js'
import type { Patience } from '../patience.js'

/** Where the demo plays. */
export interface Ingest {
  /** http://host:port */
  url: string
  token: string | undefined
  patience: Patience
}

/**
 * A client reconnects by itself once it has been open; until then patience does.
 *
 * @throws (rejects) OperatorError when ingest wants another token; ConnectionClosed
 */
export function open({ url, token, patience }: Ingest, options: Omit<ConnectOptions, 'token'>): Promise<Client> {
  return patience.insist('ingest', async () => {
    try {
      return await connect(url, { ...options, token })
    } catch (error) {
      if (!(error instanceof ConnectionClosed) || !error.message.includes('answered 401')) throw error
      throw new OperatorError(`INGEST_TOKENS: ${error.message}`, { cause: error })
    }
  })
}

/**
 * How many events of a call have come to Redis; undefined where the call is not there any more, because its retention has ended.
 *
 * @throws (rejects) when ingest answers anything else
 */
export function countEvents({ url, token, patience }: Ingest, callSid: string): Promise<number | undefined> {
  const headers = token === undefined ? {} : { Authorization: `Bearer ${token}` }
  return patience.insist('ingest', async () => {
    const response = await fetch(`${url}/v1/calls/${callSid}`, { headers })
    if (response.status === 404) return undefined
    if (!response.ok) throw new Error(`GET ${response.url}: ${response.status} ${await response.text()}`)
    return ((await response.json()) as { events: number }).events
  })
}
