/** What providers' signatures have in common. */
import { createHmac } from 'node:crypto'
import { Refusal } from '../../shared/events.js'
import { secretCheck } from '../auth.js'
import { FORM, mediaTypeOf } from '../media-type.js'
import type { ProviderRequest } from './provider.js'

export const forbidden = (message: string) => new Refusal('forbidden', message)

/**
 * It is hashed once for each secret, however many are given.
 *
 * @param given a signature, or several of which one is enough
 * @param data what is signed, in pieces
 * @param secrets any of them may have signed it, so that one can be replaced by the next without a gap
 */
export function isSigned(
  given: string | string[],
  algorithm: 'sha1' | 'sha256',
  encoding: 'hex' | 'base64' | 'base64url',
  secrets: string[],
  ...data: (string | Buffer)[]
): boolean {
  const signatures = secrets.map((secret) => {
    const hmac = createHmac(algorithm, secret)
    for (const piece of data) hmac.update(piece)
    return hmac.digest(encoding)
  })
  const isSignature = secretCheck(signatures)
  return [given].flat().some((one) => isSignature(encoding === 'hex' ? one.toLowerCase() : one))
}

/** Far more than a form of any provider has: to know whether it is signed, it has to be read and hashed, whoever sends it. */
export const MAX_FORM_BYTES = 128 * 1024

/** The parts of a header such as `t=1700000000,v0=abc`. */
export function signatureParts(header: string): Record<string, string> {
  const parts = header.split(',').map((part) => part.trim())
  return Object.fromEntries(
    parts.flatMap((part) => {
      const equals = part.indexOf('=')
      return equals < 0 ? [] : [[part.slice(0, equals), part.slice(equals + 1)]]
    }),
  )
}

/**
 * Who has seen a signed request must not be able to send it again for ever.
 *
 * @param what has the time in it, for the message
 * @param sentMs epoch ms; NaN is not fresh
 */
export function notFresh(what: string, sentMs: number, receivedMs: number, minutes = 5): Refusal | undefined {
  const isFresh = Math.abs(receivedMs - sentMs) <= minutes * 60_000
  return isFresh ? undefined : forbidden(`${what} is not of the last ${minutes} minutes`)
}

export const isForm = ({ header }: ProviderRequest): boolean => mediaTypeOf(header('content-type')) === FORM

/** @param url whose query, if it has one, is what follows its `?` */
export function splitQuery(url: string): [base: string, query: string] {
  const mark = url.indexOf('?')
  return mark < 0 ? [url, ''] : [url.slice(0, mark), url.slice(mark + 1)]
}
