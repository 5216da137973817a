/** Retell AI: `{event, call}`, the call whole each time. [sdk: retell-sdk's Call, lib/webhook_auth] */

import type { JsonObject } from '../../shared/json.js'
import { callStarted } from './call-started.js'
import { arrayOf, contentKey, missingCall, numberOf, objectOf, textOf, without, wordOf } from './payload.js'
import { type Common, type CreateProvider, IGNORED, type ProviderEvent, type ProviderRequest } from './provider.js'
import { forbidden, isSigned, notFresh, signatureParts } from './signature.js'

export const createRetell: CreateProvider = ({ RETELL_API_KEY: keys }) => ({
  name: 'retell',
  routes: [''],
  secretVariable: 'RETELL_API_KEY',
  ...(keys.length > 0 && { verify: (request) => verify(request, keys) }),
  toEvents({ payload }) {
    const event = textOf(payload.event) ?? ''
    const call = objectOf(payload.call)
    const callSid = textOf(call.call_id)
    if (callSid === undefined) return OF_NO_CALL.test(event) ? IGNORED : missingCall('call.call_id')
    const common = { call_sid: callSid, source: 'retell' }
    return { events: [started(call, common), ...translate(event, payload, call, common)] }
  },
})

function verify({ header, body, receivedMs }: ProviderRequest, keys: string[]) {
  const { v = '', d = '' } = signatureParts(header('x-retell-signature'))
  if (!isSigned(d, 'sha256', 'hex', keys, body, v)) return forbidden('X-Retell-Signature does not fit RETELL_API_KEY')
  return notFresh('X-Retell-Signature', Number(v), receivedMs)
}

/** Of text chats. */
const OF_NO_CALL = /^chat_/
/**
 * Each update has the whole transcript so far, and of a long call there are hundreds of them: only what can be new is taken.
 * So many updates in a row may go astray; what else is missing comes when the call has ended.
 */
const TURNS_OF_AN_UPDATE = 4

function translate(event: string, payload: JsonObject, call: JsonObject, common: Common): ProviderEvent[] {
  const spoken = turns(call, common)
  const around = without(payload, 'event', 'call')
  switch (event) {
    case 'call_started':
      return [answered(call, common, { ...around, ...metaOf(call) })]
    case 'transcript_updated':
      // Its last item may still grow.
      return spoken.slice(0, -1).slice(-TURNS_OF_AN_UPDATE)
    case 'call_ended':
    case 'call_analyzed':
      return [...spoken, ...ended(event, call, common, around)]
    default: {
      // Sent again it is the same; another one finds another transcript.
      const meta = { ...without(payload, 'call'), call: without(call, ...TRANSCRIPTS) }
      return [{ ...common, type: 'call.data', id: contentKey(payload), meta }]
    }
  }
}

const TRANSCRIPTS = [
  'transcript',
  'transcript_object',
  'transcript_with_tool_calls',
  'scrubbed_transcript_with_tool_calls',
]

/** Items of a transcript, the first there is; the others say the same. [sdk; `injected`, `dtmf`: code] */
function itemsOf(call: JsonObject): unknown[] | undefined {
  const given = TRANSCRIPTS.slice(1).find((field) => Array.isArray(call[field]))
  return given === undefined ? undefined : arrayOf(call[given])
}

const NOT_SPOKEN = /^(tool_call_|node_transition$|dtmf$|injected$)/
const isSpoken = ({ role, content }: JsonObject) => typeof content === 'string' && !NOT_SPOKEN.test(wordOf(role))

const spokenOf = (items: unknown) => arrayOf(items).map(objectOf).filter(isSpoken)

/** Items have no ids; their places stay. */
function turns(call: JsonObject, common: Common): ProviderEvent[] {
  return spokenOf(itemsOf(call)).map((item, seq) => {
    const words = arrayOf(item.words).map(objectOf)
    const [started_at, ended_at] = [timeIn(call, words[0]?.start), timeIn(call, words.at(-1)?.end)]
    const said = { seq, speaker: item.role, text: item.content, ts: started_at, started_at, ended_at }
    return { ...common, type: 'turn', ...said, meta: without(item, 'role', 'content') }
  })
}

/** @param seconds since the call's start @returns epoch ms */
function timeIn(call: JsonObject, seconds: unknown): number | undefined {
  const [start, after] = [numberOf(call.start_timestamp), numberOf(seconds)]
  return start === undefined || after === undefined ? undefined : start + after * 1000
}

function started(call: JsonObject, common: Common): ProviderEvent {
  const { direction, from_number, to_number, start_timestamp } = call
  return callStarted(common, 'retell', { direction, from: from_number, to: to_number }, { ts: start_timestamp })
}

const answered = (call: JsonObject, common: Common, meta?: JsonObject): ProviderEvent => ({
  ...common,
  type: 'call.status',
  id: 'call_started',
  ts: call.start_timestamp,
  status: 'in-progress',
  meta,
})

const IN_COLUMNS = [
  'call_id',
  'direction',
  'from_number',
  'to_number',
  'start_timestamp',
  'end_timestamp',
  'duration_ms',
  'recording_url',
]

/** All of the call that has no column, and of the transcript what nobody said. */
function metaOf(call: JsonObject): JsonObject {
  const textsOf = (items: unknown) => spokenOf(items).map(({ content }) => content)
  const texts = JSON.stringify(textsOf(itemsOf(call)))
  const rest = TRANSCRIPTS.slice(1).map((field): [string, unknown] => {
    const items = call[field]
    if (!Array.isArray(items) || JSON.stringify(textsOf(items)) !== texts) return [field, items]
    return [field, items.filter((item) => !isSpoken(objectOf(item)))]
  })
  const unread = rest.filter(([, items]) => items !== undefined && !(Array.isArray(items) && items.length === 0))
  const columns = IN_COLUMNS.filter((field) => field !== 'duration_ms' || numberOf(call.duration_ms) !== undefined)
  const read = call.call_analysis === objectOf(call.call_analysis) ? ['call_analysis'] : []
  const text = itemsOf(call) ? TRANSCRIPTS : TRANSCRIPTS.slice(1)
  return { ...without(call, ...columns, ...text, ...read), ...Object.fromEntries(unread) }
}

/** The first that matches counts; a reason that nobody knows is no failure. [doc: disconnection reasons] */
const STATUS_OF_REASON: [RegExp, string][] = [
  [/^(dial_busy|user_declined)$/, 'busy'],
  [/^(dial_no_answer|registered_call_timeout|error_user_not_joined)$/, 'no-answer'],
  [
    /^(dial_failed|error|invalid_destination|telephony_provider|sip_routing|concurrency_limit|no_valid_payment)/,
    'failed',
  ],
]

function endStatus(call: JsonObject): string {
  const reason = textOf(call.disconnection_reason) ?? ''
  const status = STATUS_OF_REASON.find(([pattern]) => pattern.test(reason))?.[1]
  return (
    status ??
    (call.call_status === 'error' ? 'failed' : call.call_status === 'not_connected' ? 'no-answer' : 'completed')
  )
}

/** `call_analyzed` says all of `call_ended` again: it may be the only one that is wanted, and the recording may be late. */
function ended(event: string, call: JsonObject, common: Common, around: JsonObject): ProviderEvent[] {
  const status = endStatus(call)
  const said = { ...common, id: event, ts: call.end_timestamp }
  const duration = numberOf(call.duration_ms)
  const events: ProviderEvent[] = [
    { ...said, type: 'call.status', status },
    {
      ...said,
      type: 'call.ended',
      reason: textOf(call.disconnection_reason) ?? textOf(call.call_status),
      duration_seconds: duration === undefined ? undefined : duration / 1000,
      recording_url: textOf(call.recording_url),
      turn_count: itemsOf(call) && spokenOf(itemsOf(call)).length,
      // With the transcript as text: what was stored of it live stays as it was, and this may have been corrected since.
      meta: { ...around, ...metaOf(call), transcript: call.transcript },
    },
  ]
  if (status === 'completed') events.unshift(answered(call, common))
  const { custom_analysis_data: data, ...analysis } = objectOf(call.call_analysis)
  if (Object.keys(objectOf(call.call_analysis)).length > 0)
    events.push({ ...said, type: 'call.data', data, meta: analysis })
  return events
}
