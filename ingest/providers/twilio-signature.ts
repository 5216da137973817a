/**
 * X-Twilio-Signature: Base64 of HMAC-SHA1 over the URL and each parameter of a form's body, by name, with its value behind it
 * ([sdk] twilio-node's validateRequest and validateRequestWithBody). It has no time in it: who has seen a request can send it
 * again, which stores nothing new. But a WebSocket's is the same for every call, and says nothing of its messages: as good as a
 * password, it must be seen by nobody (wss).
 */
import { createHash } from 'node:crypto'
import * as querystring from 'node:querystring'
import type { Refusal } from '../../shared/events.js'
import type { ProviderRequest } from './provider.js'
import { forbidden, isForm, isSigned, MAX_FORM_BYTES, splitQuery } from './signature.js'

/** @param tokens auth tokens, of which any may have signed it */
export function verifySignature(request: ProviderRequest, tokens: string[]): Refusal | undefined {
  const given = request.header('x-twilio-signature')
  if (given === '') return forbidden('X-Twilio-Signature is missing')
  const { body, publicUrls } = request
  const isParams = isForm(request)
  if (isParams && body.length > MAX_FORM_BYTES) return forbidden(`Twilio's forms have at most ${MAX_FORM_BYTES} bytes`)
  // Of any other body the URL carries the digest, and so the signature covers it, too.
  if (!isParams && body.length > 0 && !hasItsDigest(request)) {
    return forbidden('bodySHA256 in the URL is not the SHA-256 of the body')
  }
  const params = isParams ? signedParams(new URLSearchParams(body.toString('utf8'))) : ''
  const isFromTwilio = spellingsOf(publicUrls).some((url) => isSigned(given, 'sha1', 'base64', tokens, url, params))
  if (isFromTwilio) return undefined
  return forbidden(
    'X-Twilio-Signature does not match: check TWILIO_AUTH_TOKEN, and that PUBLIC_URL is what Twilio calls',
  )
}

function hasItsDigest({ body, query }: ProviderRequest): boolean {
  return query.get('bodySHA256')?.toLowerCase() === createHash('sha256').update(body).digest('hex')
}

/** Of a name that comes several times each value counts once, in order. */
function signedParams(params: URLSearchParams): string {
  const values = new Map<string, Set<string>>()
  for (const [name, value] of params) values.set(name, (values.get(name) ?? new Set()).add(value))
  const names = [...values.keys()].sort()
  return names.flatMap((name) => [...values.get(name)!].sort().map((value) => name + value)).join('')
}

/** The URLs that may have been signed: Twilio is not consistent about ports and escapes, and proxies change both. */
function spellingsOf(urls: string[]): string[] {
  const spellings = urls.flatMap((url) => {
    const escaped = [url, URL.canParse(url) ? new URL(url).href : url, withNodesEscapes(url)]
    const all = [...new Set(escaped)].flatMap(withAndWithoutPort)
    return url.startsWith('ws') ? all.flatMap(handshakeTexts) : all
  })
  return [...new Set(spellings)]
}

/** The query as `node:querystring` writes it: `'` and not `%27`. */
function withNodesEscapes(url: string): string {
  const [base, query] = splitQuery(url)
  return query === '' ? url : `${base}?${querystring.stringify(querystring.parse(query, '&', '=', { maxKeys: 0 }))}`
}

function withAndWithoutPort(url: string): string[] {
  const [, scheme, host, port, rest] = /^(\w+):\/\/([^/?#]*?)(:\d+)?((?:[/?#].*)?)$/.exec(url) ?? []
  if (scheme === undefined) return [url]
  const standard = scheme === 'https' || scheme === 'wss' ? ':443' : ':80'
  return [`${scheme}://${host}${rest}`, `${scheme}://${host}${port ?? standard}${rest}`]
}

/** A WebSocket's URL may be signed with a slash at its end; and its query like a form (which only ConversationRelay has). */
function handshakeTexts(url: string): string[] {
  const [base, query] = splitQuery(url)
  const suffix = query === '' ? '' : `?${query}`
  const params = signedParams(new URLSearchParams(query))
  return [base + suffix, `${base}/${suffix}`, base + params, `${base}/${params}`]
}
