/** Plivo's voice callbacks, whatever URL they are configured for: they all have the same fields. [doc, sdk: plivo-node] */

import { END_STATUSES } from '../../shared/events.js'
import type { JsonObject } from '../../shared/json.js'
import { callStarted } from './call-started.js'
import { contentKey, jsonOf, missingCall, numberOf, objectOf, textOf, without } from './payload.js'
import { verifySignature } from './plivo-signature.js'
import { type Common, type CreateProvider, EMPTY_RESPONSE, type ProviderEvent, type ReadRequest } from './provider.js'

export const createPlivo: CreateProvider = ({ PLIVO_AUTH_TOKEN: tokens }) => ({
  name: 'plivo',
  routes: [''],
  secretVariable: 'PLIVO_AUTH_TOKEN',
  ...(tokens.length > 0 && { verify: (request) => verifySignature(request, tokens) }),
  toEvents(request) {
    const fields = fieldsOf(request)
    const callSid = textOf(fields.CallUUID) ?? textOf(fields.call_uuid)
    if (callSid === undefined) return missingCall('CallUUID')
    // There are no numbers: what is sent again is the same.
    const common = { call_sid: callSid, source: 'plivo', id: contentKey(fields) }
    return { events: [started(fields, common), ...translate(fields, common)] }
  },
  // The answer URL wants XML, the others take it.
  answer: () => EMPTY_RESPONSE,
})

/** Of the Record API, a callback is JSON in `response` (unverified: liberal); what its URL carries is the user's own. */
function fieldsOf({ query, payload }: ReadRequest): JsonObject {
  const fields = { ...Object.fromEntries(query), ...payload }
  const response = jsonOf(fields.response)
  return {
    ...objectOf(response),
    ...(Object.keys(objectOf(response)).length > 0 ? without(fields, 'response') : fields),
  }
}

function started({ Direction, From, To }: JsonObject, common: Common): ProviderEvent {
  return callStarted(common, 'plivo', { direction: Direction, from: From, to: To })
}

/** Those that the contract has other words for. */
const STATUSES = new Map([
  ['timeout', 'no-answer'],
  ['cancel', 'canceled'],
  ['cancelled', 'canceled'],
])

function translate(fields: JsonObject, common: Common): ProviderEvent[] {
  const word = textOf(fields.CallStatus)
  const status = STATUSES.get(word ?? '') ?? word
  const recording_url = textOf(fields.RecordUrl) ?? textOf(fields.record_url)
  const duration_seconds = numberOf(fields.Duration)
  const digits = textOf(fields.Digits)
  // Times come without a zone, in the one of the account's console: they stay as they are.
  const meta = without(
    fields,
    'CallUUID',
    'call_uuid',
    'From',
    'To',
    'Direction',
    ...(status === word ? ['CallStatus'] : []),
  )
  const events: ProviderEvent[] = []
  if (status === undefined && recording_url === undefined) events.push({ ...common, type: 'call.data', meta })
  else events.push({ ...common, type: 'call.status', status, recording_url, meta })
  if (digits !== undefined) events.push({ ...common, type: 'call.data', data: { digits } })
  if (status !== undefined && END_STATUSES.has(status)) {
    events.push({ ...common, type: 'call.ended', reason: textOf(fields.HangupCause) ?? word, duration_seconds })
  }
  return events
}
