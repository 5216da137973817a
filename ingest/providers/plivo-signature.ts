/**
 * X-Plivo-Signature-V3: base64 of HMAC-SHA256(auth token, base + "." + nonce). The base is the URL with its query decoded and
 * sorted, and of a POST its fields sorted behind that, each name followed by its value. [sdk: plivo-node's v3Security,
 * plivo-python's signature_v3]
 *
 * There is no time in it: what is replayed repeats a callback that was, and has its key.
 */
import type { Refusal } from '../../shared/events.js'
import type { ProviderRequest } from './provider.js'
import { forbidden, isSigned } from './signature.js'

export function verifySignature(request: ProviderRequest, tokens: string[]): Refusal | undefined {
  const { header, publicUrls } = request
  const nonce = header('x-plivo-signature-v3-nonce')
  // Plivo posts forms. Any other body is not covered: it could be put to the signature of a request that had none.
  if (request.body.length > 0 && !isForm(request)) return forbidden('Plivo signs forms, and this body is none')
  // One for each active auth token; Ma is the main account's, of a call of one of its subaccounts.
  const given = [header('x-plivo-signature-v3'), header('x-plivo-signature-ma-v3')].flatMap((list) => list.split(','))
  const fits = publicUrls.some((url) => {
    const base = signedBase(url, request)
    return given.some((one) => isSigned(one.trim(), 'sha256', 'base64', tokens, `${base}.${nonce}`))
  })
  return fits
    ? undefined
    : forbidden('X-Plivo-Signature-V3 does not fit PLIVO_AUTH_TOKEN and this URL; behind a proxy, set PUBLIC_URL')
}

const isForm = ({ header }: ProviderRequest) => /^application\/x-www-form-urlencoded\b/i.test(header('content-type'))

/** @param url as Plivo called it */
function signedBase(url: string, { body }: ProviderRequest): string {
  const [address, query = ''] = splitAt(url, '?')
  const inUrl = sorted(new URLSearchParams(query)).map(([name, value]) => `${name}=${value}`)
  const fields = sorted(new URLSearchParams(body.toString('utf8')))
  const inBody = fields.map(([name, value]) => name + value).join('')
  const mark = inUrl.length > 0 || fields.length > 0 ? '?' : ''
  const dot = inUrl.length > 0 && fields.length > 0 ? '.' : ''
  return address + mark + inUrl.join('&') + dot + inBody
}

function splitAt(text: string, mark: string): [string, string?] {
  const place = text.indexOf(mark)
  return place < 0 ? [text] : [text.slice(0, place), text.slice(place + 1)]
}

/** By name, and the values of one name by value; in the order of UTF-16 units. */
function sorted(fields: URLSearchParams): [string, string][] {
  const compare = (a: string, b: string) => (a < b ? -1 : a > b ? 1 : 0)
  return [...fields].sort(([a, x], [b, y]) => compare(a, b) || compare(x, y))
}
