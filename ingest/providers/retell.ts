/** Retell AI: `{event, call}`, the call whole each time. [sdk: retell-sdk's Call, lib/webhook_auth] */
import { arrayOf, contentKey, missingCall, numberOf, objectOf, textOf, without } from './payload.js'
import { type CreateProvider, IGNORED, type JsonObject, type ProviderEvent, type ProviderRequest } from './provider.js'
import { forbidden, isFresh, isSigned, signatureParts } from './signature.js'

const TOLERANCE_MS = 5 * 60_000

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
    const of = { call_sid: callSid, source: 'retell' }
    return { events: [started(call, of), ...translate(event, payload, call, of)] }
  },
})

function verify({ header, body, receivedMs }: ProviderRequest, keys: string[]) {
  const { v = '', d = '' } = signatureParts(header('x-retell-signature'))
  if (!isSigned(d, 'sha256', 'hex', keys, body, v)) return forbidden('X-Retell-Signature does not fit RETELL_API_KEY')
  if (!isFresh(Number(v), receivedMs, TOLERANCE_MS)) return forbidden('X-Retell-Signature is older than five minutes')
  return undefined
}

interface Of {
  call_sid: string
  source: string
}

/** Of text chats. */
const OF_NO_CALL = /^chat_/
/**
 * Each update has the whole transcript so far, and of a long call there are hundreds of them: only what can be new is taken.
 * So many updates in a row may go astray; what else is missing comes when the call has ended.
 */
const TURNS_OF_AN_UPDATE = 4

function translate(event: string, payload: JsonObject, call: JsonObject, of: Of): ProviderEvent[] {
  const spoken = turns(call, of)
  switch (event) {
    case 'call_started':
      return [answered(call, of, metaOf(call))]
    case 'transcript_updated':
      // Its last item may still grow.
      return spoken.slice(0, -1).slice(-TURNS_OF_AN_UPDATE)
    case 'call_ended':
    case 'call_analyzed':
      return [...spoken, ...ended(event, call, of)]
    default: {
      // Sent again it is the same; another one finds another transcript.
      const meta = without(payload, 'call')
      return [{ ...of, type: 'call.data', id: contentKey(payload), meta }]
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
function itemsOf(call: JsonObject): JsonObject[] | undefined {
  const given = TRANSCRIPTS.slice(1).find((field) => Array.isArray(call[field]))
  return given === undefined ? undefined : arrayOf(call[given]).map(objectOf)
}

const NOT_SPOKEN = /^(tool_call_|node_transition$|dtmf$|injected$)/
const isSpoken = ({ role, content }: JsonObject) => typeof content === 'string' && !NOT_SPOKEN.test(String(role))

/** Items have no ids; their places stay. */
function turns(call: JsonObject, of: Of): ProviderEvent[] {
  return (itemsOf(call) ?? []).filter(isSpoken).map((item, seq) => {
    const words = arrayOf(item.words).map(objectOf)
    const [started_at, ended_at] = [timeIn(call, words[0]?.start), timeIn(call, words.at(-1)?.end)]
    const said = { seq, speaker: item.role, text: item.content, ts: started_at, started_at, ended_at }
    return { ...of, type: 'turn', ...said, meta: without(item, 'role', 'content') }
  })
}

/** @param seconds since the call's start @returns epoch ms */
function timeIn(call: JsonObject, seconds: unknown): number | undefined {
  const [start, after] = [numberOf(call.start_timestamp), numberOf(seconds)]
  return start === undefined || after === undefined ? undefined : start + after * 1000
}

function started(call: JsonObject, of: Of): ProviderEvent {
  const { direction, from_number, to_number, start_timestamp } = call
  const who = { provider: 'retell', direction, from: from_number, to: to_number }
  return { ...of, type: 'call.started', id: 'retell', ts: start_timestamp, ...who }
}

const answered = (call: JsonObject, of: Of, meta?: JsonObject): ProviderEvent => ({
  ...of,
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
  const unspoken = arrayOf(call.transcript_with_tool_calls)
    .map(objectOf)
    .filter((item) => !isSpoken(item))
  const repeated = itemsOf(call) ? TRANSCRIPTS : []
  const meta = without(call, ...IN_COLUMNS, ...repeated, 'call_analysis')
  return unspoken.length > 0 ? { ...meta, transcript_with_tool_calls: unspoken } : meta
}

/** The first that matches counts; a reason that nobody knows is no failure. [doc: disconnection reasons] */
const END_STATUSES: [RegExp, string][] = [
  [/^(dial_busy|user_declined)$/, 'busy'],
  [/^(dial_no_answer|registered_call_timeout|error_user_not_joined)$/, 'no-answer'],
  [
    /^(dial_failed|error|invalid_destination|telephony_provider|sip_routing|concurrency_limit|no_valid_payment)/,
    'failed',
  ],
]

function endStatus(call: JsonObject): string {
  const reason = textOf(call.disconnection_reason) ?? ''
  const status = END_STATUSES.find(([pattern]) => pattern.test(reason))?.[1]
  return (
    status ??
    (call.call_status === 'error' ? 'failed' : call.call_status === 'not_connected' ? 'no-answer' : 'completed')
  )
}

/** `call_analyzed` says all of `call_ended` again: it may be the only one that is wanted, and the recording may be late. */
function ended(event: string, call: JsonObject, of: Of): ProviderEvent[] {
  const status = endStatus(call)
  const common = { ...of, id: event, ts: call.end_timestamp }
  const duration = numberOf(call.duration_ms)
  const events: ProviderEvent[] = [
    { ...common, type: 'call.status', status },
    {
      ...common,
      type: 'call.ended',
      reason: textOf(call.disconnection_reason) ?? textOf(call.call_status),
      duration_seconds: duration === undefined ? undefined : duration / 1000,
      recording_url: textOf(call.recording_url),
      turn_count: itemsOf(call)?.filter(isSpoken).length,
      meta: metaOf(call),
    },
  ]
  if (status === 'completed') events.unshift(answered(call, of))
  const { custom_analysis_data: data, ...analysis } = objectOf(call.call_analysis)
  if (call.call_analysis) events.push({ ...common, type: 'call.data', data, meta: analysis })
  return events
}
