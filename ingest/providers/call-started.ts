/** `call.started`: who is calling whom, which a provider says again with nearly every message. */
import { contentKey, textOf } from './payload.js'
import type { Common, ProviderEvent } from './provider.js'

/** Each as the provider has it; what is undefined is not said. */
export interface Parties {
  /** Its word for it: `inbound`, `outbound-api`, `incoming`, `outboundPhoneCall`. */
  direction: unknown
  from: unknown
  to: unknown
}

/**
 * The row keeps the first word on each of them. Said again it is the same event; what says more than before is another one, so
 * that it is not lost.
 *
 * @param more `ts`, `meta`; an `id` where the parties alone are not what tells it from others
 */
export function callStarted(
  common: Common,
  provider: string,
  { direction, from, to }: Parties,
  more: { ts?: unknown; meta?: unknown; id?: string } = {},
): ProviderEvent {
  const [, way] = /^(in|out)/i.exec(textOf(direction) ?? '') ?? []
  const who = { direction: way === undefined ? direction : `${way.toLowerCase()}bound`, from, to }
  return { ...common, type: 'call.started', id: contentKey(who), provider, ...who, ...more }
}
