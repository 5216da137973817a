/**
 * What a provider's adapter is: one file that knows the formats of one provider, and nothing of servers and stores.
 *
 * An adapter turns requests and messages into events as `POST /v1/events` takes them. It may be generous with them: what is
 * not as it should be is moved to `meta` (see webhooks.ts), for a provider cannot mend what it sends.
 *
 * Where a format is known from, adapters say in brackets: [doc] the provider's documentation, [sdk] its own SDK, [code] the
 * code of those who receive it.
 */
import type { Config } from '../../shared/config.js'
import type { Refusal } from '../../shared/events.js'
import type { JsonObject } from '../../shared/json.js'

/** An event before it is judged; a field that is undefined is not there. */
export interface ProviderEvent extends JsonObject {
  type: 'call.started' | 'call.status' | 'turn' | 'call.data' | 'call.ended'
  call_sid: unknown
}

/** What all events of a request or a message have. */
export type Common = JsonObject & Pick<ProviderEvent, 'call_sid'>

/** A webhook's request, or the one that opens a WebSocket. */
export interface ProviderRequest {
  method: string
  /** What follows `/webhooks/NAME/`, without a secret: `status`; empty when nothing does. */
  route: string
  /** A secret behind the route: `/webhooks/NAME/status/SECRET`. */
  pathSecret: string | undefined
  query: URLSearchParams
  /** URLs that the provider may have called, the likeliest first: signatures cover them. */
  publicUrls: string[]
  /** @param name in lower case @returns the header's value, empty when there is none */
  header(name: string): string
  /** As it came: empty for GET. */
  body: Buffer
  /** Epoch ms. */
  receivedMs: number
}

export interface ReadRequest extends ProviderRequest {
  /** A JSON body, a form (`Legs[0][Status]` nested), or the query of a GET. */
  payload: JsonObject
}

/** What a request says. */
export interface Translation {
  events: ProviderEvent[]
  /**
   * Turns out of a report at the call's end, of a provider that may have sent the same ones live without a key by which they
   * could be told to be the same: they count only if no turn of the call has been stored.
   */
  unlessSpoken?: ProviderEvent[]
  /**
   * The statuses of a leg that may be the call itself, or an attempt to reach one more party: they count only while nobody has
   * answered the call. (Who was busy later on makes no call busy that goes on without him.)
   */
  unlessAnswered?: ProviderEvent[]
}

/** Nothing that is kept: audio, a partial transcript. It is counted. */
export const IGNORED: Translation = { events: [] }

export interface ProviderAnswer {
  status: '200 OK' | '204 No Content'
  contentType: string
  body: string
}

/** Said to providers that play TwiML (or Plivo's XML): nothing to do. */
export const EMPTY_RESPONSE: ProviderAnswer = {
  status: '200 OK',
  contentType: 'text/xml; charset=utf-8',
  body: '<?xml version="1.0" encoding="UTF-8"?><Response/>',
}

export const NO_CONTENT: ProviderAnswer = { status: '204 No Content', contentType: 'text/plain', body: '' }

/** One WebSocket of a provider. */
export interface ProviderStream {
  /** @returns the events in a message, in order; undefined for audio */
  toEvents(message: JsonObject): ProviderEvent[] | undefined
  /** What its closing says, besides that the connection is gone. */
  closed?(code: number): ProviderEvent[]
}

export interface Provider {
  /** In paths: `/webhooks/NAME/…`, `/streams/NAME`. */
  readonly name: string
  /** Below `/webhooks/NAME`: `status`; empty for that itself. */
  readonly routes: readonly string[]
  /** Its paths may end with a secret. */
  readonly takesPathSecret?: boolean
  /** The variable that `verify` needs, for messages. */
  readonly secretVariable?: string
  /** `verify` needs the request's head alone: who fails is turned away before he has sent a body. */
  readonly isSecretInHead?: boolean
  /**
   * Is it from the provider, of now, and unchanged? Absent when its secret is not configured: then INGEST_TOKENS guard it.
   *
   * @returns a Refusal `unauthorized` (asks for Basic credentials) or `forbidden`
   */
  verify?(request: ProviderRequest): Refusal | undefined
  /** @returns a Refusal when nothing of it can be stored, because it does not say of which call it is */
  toEvents(request: ReadRequest): Translation | Refusal
  /** What the provider wants to hear once all is stored; else a summary as JSON. */
  answer?(request: ReadRequest): ProviderAnswer
  /** `/streams/NAME` */
  openStream?(): ProviderStream
}

/** Adding a provider: one file that exports one of these, a line in providers/index.ts, and fixtures in test/fixtures. */
export type CreateProvider = (config: Config) => Provider
