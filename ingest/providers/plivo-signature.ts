/**
 * X-Plivo-Signature-V3: base64 of HMAC-SHA256(auth token, base + "." + nonce). The base is the URL with its query decoded and
 * sorted, and of a POST its fields sorted behind that, each name followed by its value. [sdk: plivo-node's v3Security,
 * plivo-python's signature_v3]
 *
 * There is no time in it: what is replayed repeats a callback that was, and has its key.
 */
import type { Refusal } from '../../shared/events.js'
import type { ProviderRequest } from './provider.js'
import { forbidden, isForm, isSigned, MAX_FORM_BYTES, splitQuery } from './signature.js'

export function verifySignature(request: ProviderRequest, tokens: string[]): Refusal | undefined {
  const { header, publicUrls } = request
  const nonce = header('x-plivo-signature-v3-nonce')
  // Plivo posts forms. Any other body is not covered: it could be put to the signature of a request that had none.
  if (request.body.length > 0 && !isForm(request)) return forbidden('Plivo signs forms, and this body is none')
  if (request.body.length > MAX_FORM_BYTES) return forbidden(`Plivo's forms have at most ${MAX_FORM_BYTES} bytes`)
  // One for each active auth token; Ma is the main account's, of a call of one of its subaccounts.
  const given = [header('x-plivo-signature-v3'), header('x-plivo-signature-ma-v3')].flatMap((list) => list.split(','))
  // Whoever it is from, the form is read once, and hashed once for each URL: the header may have thousands of signatures.
  const fields = sorted(new URLSearchParams(request.body.toString('utf8')))
  const signatures = given.map((one) => one.trim())
  const fits = publicUrls.some((url) =>
    isSigned(signatures, 'sha256', 'base64', tokens, `${signedBase(url, fields)}.${nonce}`),
  )
  return fits
    ? undefined
    : forbidden('X-Plivo-Signature-V3 does not fit PLIVO_AUTH_TOKEN and this URL; behind a proxy, set PUBLIC_URL')
}

/** @param url as Plivo called it @param fields of the body, sorted */
function signedBase(url: string, fields: [string, string][]): string {
  const [address, query] = splitQuery(url)
  const inUrl = sorted(new URLSearchParams(query)).map(([name, value]) => `${name}=${value}`)
  const inBody = fields.map(([name, value]) => name + value).join('')
  const mark = inUrl.length > 0 || fields.length > 0 ? '?' : ''
  const dot = inUrl.length > 0 && fields.length > 0 ? '.' : ''
  return address + mark + inUrl.join('&') + dot + inBody
}

/** By name, and the values of one name by value; in the order of UTF-16 units. */
function sorted(fields: URLSearchParams): [string, string][] {
  const compare = (a: string, b: string) => (a < b ? -1 : a > b ? 1 : 0)
  return [...fields].sort(([a, x], [b, y]) => compare(a, b) || compare(x, y))
}
