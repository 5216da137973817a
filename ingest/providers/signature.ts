/** What providers' signatures have in common. */
import { createHmac } from 'node:crypto'
import { Refusal } from '../../shared/events.js'
import { secretCheck } from '../auth.js'

export const forbidden = (message: string) => new Refusal('forbidden', message)

/**
 * @param data what is signed, in pieces
 * @param secrets any of them may have signed it, so that one can be replaced by the next without a gap
 */
export function isSigned(
  given: string,
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
  return secretCheck(signatures)(encoding === 'hex' ? given.toLowerCase() : given)
}

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

/** Who has seen a signed request must not be able to send it again for ever. */
export function isFresh(sentMs: number, receivedMs: number, toleranceMs: number): boolean {
  return Math.abs(receivedMs - sentMs) <= toleranceMs // NaN is not
}
