/** Who may come in: secrets compared so that neither the time nor the length tells how much of one was right. */
import { createHash, timingSafeEqual } from 'node:crypto'

const digest = (secret: string) => createHash('sha256').update(secret).digest()

/** @returns whether what is given is one of `secrets`, in a time that does not depend on which, or how nearly */
export function secretCheck(secrets: string[]): (given: string) => boolean {
  const digests = secrets.map(digest)
  return (given) => {
    const its = digest(given)
    return digests.filter((each) => timingSafeEqual(each, its)).length > 0
  }
}

/** The token of an `Authorization: Bearer` header; undefined when it is none. */
export function bearerToken(authorization: string): string | undefined {
  return /^Bearer +(\S+) *$/i.exec(authorization)?.[1]
}

/** @returns whether an `Authorization` header has one of these tokens; without tokens, always */
export function tokenCheck(tokens: string[]): (authorization: string) => boolean {
  if (tokens.length === 0) return () => true
  const isToken = secretCheck(tokens)
  return (authorization) => {
    const token = bearerToken(authorization)
    return token !== undefined && isToken(token)
  }
}

/** User name and password of an `Authorization: Basic` header (RFC 7617); undefined when it is none. */
export function basicCredentials(authorization: string): { user: string; password: string } | undefined {
  const [, encoded] = /^Basic +([A-Za-z0-9+/]+=*) *$/i.exec(authorization) ?? []
  if (encoded === undefined) return undefined
  const text = Buffer.from(encoded, 'base64').toString('utf8')
  const colon = text.indexOf(':')
  return colon < 0 ? undefined : { user: text.slice(0, colon), password: text.slice(colon + 1) }
}
