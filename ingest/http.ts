/** `POST /v1/events`: a body of events, each judged by itself; answered once Redis (or the spool) has the good ones. */
import { isUtf8 } from 'node:buffer'
import { setImmediate as endOfTurn } from 'node:timers/promises'
import { type CallEvent, type Parsed, parseEvent, parseJson, Refusal } from '../shared/events.js'
import type { IngestMetrics } from '../shared/metrics.js'
import { parseCloudEvent } from './cloudevents.js'
import type { Deliveries } from './deliver.js'
import { mediaTypeOf } from './media-type.js'

export interface Answer {
  status: string
  body: unknown
  headers?: Record<string, string>
}

const RETRY_AFTER_SECONDS = '2'
/** Many times what a body of real events has; the answer may have to name each of them. */
const MAX_BODY_EVENTS = 100_000
/** So many are judged, about a millisecond's worth, before others have their turn: a large body takes a tenth of a second. */
const SLICE_EVENTS = 256

export function problem(status: string, code: string, message: string, headers?: Record<string, string>): Answer {
  return { status, body: { error: { code, message } }, ...(headers ? { headers } : {}) }
}

export const overloaded = (message: string): Answer =>
  problem('503 Service Unavailable', 'unavailable', message, { 'Retry-After': RETRY_AFTER_SECONDS })

export const notServing = (phase: 'starting' | 'stopping'): Answer =>
  problem('503 Service Unavailable', phase, `the process is ${phase}`, { 'Retry-After': RETRY_AFTER_SECONDS })

export const badQuery = (message: string): Answer => problem('400 Bad Request', 'invalid_query', message)

export const FROM_A_PAGE = problem(
  '403 Forbidden',
  'forbidden',
  'web pages may connect only where INGEST_TOKENS is set',
)

interface Rejected {
  index: number
  code: string
  message: string
  path?: string | undefined
}

const tooMany = problem(
  '413 Payload Too Large',
  'too_many_events',
  `a body has at most ${MAX_BODY_EVENTS} events or lines`,
)

interface Format {
  /** The events of a body, in order; a Refusal where one cannot be read. */
  read(text: string): unknown[] | Answer
  parse(given: unknown): Parsed | Refusal
}

const FORMATS = new Map<string, Format>([
  ['application/json', { read: readJson, parse: parseEvent }],
  ['application/x-ndjson', { read: readLines, parse: parseEvent }],
  ['application/cloudevents+json', { read: readOne, parse: parseCloudEvent }],
  ['application/cloudevents-batch+json', { read: readArray, parse: parseCloudEvent }],
])

function readOne(text: string): unknown[] | Answer {
  const parsed = parseJson(text)
  return parsed instanceof Refusal ? unreadable(parsed) : [parsed]
}

function readArray(text: string): unknown[] | Answer {
  const parsed = parseJson(text)
  if (parsed instanceof Refusal) return unreadable(parsed)
  return Array.isArray(parsed)
    ? parsed
    : unreadable(new Refusal('not_an_array', 'a batch of CloudEvents is a JSON array'))
}

const unreadable = ({ code, message }: Refusal): Answer => problem('400 Bad Request', code, message)

function readLines(text: string): unknown[] | Answer {
  const lines = text.split('\n', MAX_BODY_EVENTS + 2)
  if (lines.length > MAX_BODY_EVENTS + 1) return tooMany // the last one may be what follows the last line's end: nothing
  return lines.filter((line) => line.trim() !== '').map(parseJson)
}

function readJson(text: string): unknown[] | Answer {
  const parsed = parseJson(text)
  if (parsed instanceof Refusal) return unreadable(parsed)
  return Array.isArray(parsed) ? parsed : [parsed]
}

/**
 * @param contentType the header's value
 * @param query `spool=true`: what Redis cannot take goes to the disk, for a producer that would not send it again
 */
export async function postEvents(
  contentType: string,
  query: URLSearchParams,
  body: Buffer,
  deliveries: Deliveries,
  metrics: IngestMetrics,
): Promise<Answer> {
  const spool = query.get('spool') ?? 'false'
  if (spool !== 'true' && spool !== 'false') return badQuery('spool wants true or false')
  const format = FORMATS.get(mediaTypeOf(contentType))
  if (!format) {
    const wants = `Content-Type wants ${[...FORMATS.keys()].join(' or ')}; got ${contentType.slice(0, 100) || 'none'}`
    return problem('415 Unsupported Media Type', 'unsupported_media_type', wants)
  }
  if (!isUtf8(body)) return problem('400 Bad Request', 'invalid_utf8', 'the body is not UTF-8')
  const spoolable = spool === 'true' && deliveries.spool !== undefined
  if (!spoolable && deliveries.appender.isFull) return overloaded('the stores cannot take more now')
  const given = format.read(body.toString('utf8'))
  if (!Array.isArray(given)) return given
  if (given.length > MAX_BODY_EVENTS) return tooMany

  const { events, indexes, rejected } = await judge(given, format, metrics)
  const delivered = await (spoolable ? deliveries.deliverOrSpool(events) : deliveries.deliver(events))
  if (delivered.state === 'unavailable') return overloaded(delivered.reason ?? 'the stores cannot take more now')
  for (const { index, refusal } of delivered.refused) rejected.push({ index: indexes[index]!, ...refusal })
  rejected.sort((a, b) => a.index - b.index)
  const accepted = given.length - rejected.length
  metrics.acked.inc(accepted)
  return delivered.state === 'stored'
    ? { status: '200 OK', body: { accepted, rejected } }
    : { status: '202 Accepted', body: { accepted, spooled: true, rejected } }
}

/** @returns the good ones with their places in the body, and the others by name */
async function judge(given: unknown[], format: Format, metrics: IngestMetrics) {
  const events: CallEvent[] = []
  const indexes: number[] = []
  const rejected: Rejected[] = []
  for (const [index, each] of given.entries()) {
    if (index > 0 && index % SLICE_EVENTS === 0) await endOfTurn()
    const parsed = each instanceof Refusal ? each : format.parse(each)
    if (parsed instanceof Refusal) {
      metrics.refused.inc({ code: parsed.code })
      rejected.push({ index, ...parsed })
    } else {
      events.push(parsed.event)
      indexes.push(index)
    }
  }
  return { events, indexes, rejected }
}
