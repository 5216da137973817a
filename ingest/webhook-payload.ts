/** What a webhook's request holds, in whatever its provider wrote it. */
import { isUtf8 } from 'node:buffer'
import { parse as parseNested } from 'qs'
import { parseJson, Refusal } from '../shared/events.js'
import { isObject, type JsonObject } from '../shared/json.js'
import { FORM, mediaTypeOf } from './media-type.js'
import type { ProviderRequest } from './providers/provider.js'

/** Far more fields than any webhook has. */
const MAX_FIELDS = 2000

/** A JSON body, a form, or the query of a GET, as one object. */
export async function readPayload(request: ProviderRequest): Promise<JsonObject | Refusal> {
  const { method, query, body } = request
  if (method === 'GET') return nested(query)
  const contentType = request.header('content-type')
  const given = mediaTypeOf(contentType)
  if (given === 'multipart/form-data') return readMultipart(contentType, body)
  if (!isUtf8(body)) return new Refusal('invalid_utf8', 'the body is not UTF-8')
  const text = body.toString('utf8')
  // Not every provider says what it sends, and none means that it may be refused for that.
  const mediaType = given || (text.trimStart().startsWith('{') ? 'application/json' : FORM)
  if (mediaType === FORM) return nested(new URLSearchParams(text))
  if (mediaType === 'application/json' || mediaType.endsWith('+json')) return readJson(text)
  const wants = 'application/json, application/x-www-form-urlencoded or multipart/form-data'
  return new Refusal('unsupported_media_type', `Content-Type wants ${wants}; got ${contentType.slice(0, 100)}`)
}

function readJson(text: string): JsonObject | Refusal {
  const parsed = parseJson(text)
  if (parsed instanceof Refusal) return parsed
  return isObject(parsed) ? parsed : new Refusal('not_an_object', 'the body wants a JSON object')
}

async function readMultipart(contentType: string, body: Buffer): Promise<JsonObject | Refusal> {
  try {
    const form = await new Response(body, { headers: { 'Content-Type': contentType } }).formData()
    const fields = new URLSearchParams()
    for (const [name, value] of form) fields.append(name, typeof value === 'string' ? value : await value.text())
    return nested(fields)
  } catch (error) {
    return new Refusal('invalid_form', `the multipart body cannot be read: ${(error as Error).message}`)
  }
}

/** `Legs[0][Status]=completed` → {Legs: [{Status: 'completed'}]} */
function nested(fields: URLSearchParams): JsonObject | Refusal {
  // The parser would leave the others out, and say nothing.
  if (fields.size > MAX_FIELDS) return new Refusal('invalid_form', `a form has at most ${MAX_FIELDS} fields`)
  return parseNested(fields.toString(), { plainObjects: true, parameterLimit: MAX_FIELDS, depth: 8 })
}
