/** `POST /v1/events`: a body of events, each judged by itself; answered once Redis has the good ones. */
import { isUtf8 } from 'node:buffer'
import { parseEvent, parseJson, Refusal } from '../shared/events.js'
import type { IngestMetrics } from '../shared/metrics.js'
import type { Appender, Origin } from './append.js'

export interface Answer {
  status: string
  body: unknown
  headers?: Record<string, string>
}

/** How long a request waits for Redis before it is told to come back. */
const REDIS_TIMEOUT_MS = 5000
const RETRY_AFTER_SECONDS = '2'
/** Many times what a body of real events has; the answer may have to name each of them. */
const MAX_BODY_EVENTS = 100_000

export function problem(status: string, code: string, message: string, headers?: Record<string, string>): Answer {
  return { status, body: { error: { code, message } }, ...(headers ? { headers } : {}) }
}

export const overloaded = (message: string): Answer =>
  problem('503 Service Unavailable', 'unavailable', message, { 'Retry-After': RETRY_AFTER_SECONDS })

interface Rejected {
  index: number
  code: string
  message: string
  path?: string | undefined
}

/** Waits for the events of one request. */
class Request implements Origin {
  private left = 1 // `sealed` takes it away, so that it cannot reach 0 before all events are in
  private readonly rejected: Rejected[] = []
  private accepted = 0
  readonly stored: Promise<void>
  private resolve = () => {}

  constructor() {
    this.stored = new Promise((resolve) => {
      this.resolve = resolve
    })
  }

  expect(): void {
    this.left++
  }

  settle(index: number, refusal?: Refusal): void {
    if (refusal) this.rejected.push({ index, ...refusal })
    else this.accepted++
    this.done()
  }

  sealed(): void {
    this.done()
  }

  settled(): void {}

  answer(): Answer {
    this.rejected.sort((a, b) => a.index - b.index)
    return { status: '200 OK', body: { accepted: this.accepted, rejected: this.rejected } }
  }

  private done(): void {
    if (--this.left === 0) this.resolve()
  }
}

const tooMany = problem(
  '413 Payload Too Large',
  'too_many_events',
  `a body has at most ${MAX_BODY_EVENTS} events or lines`,
)

/** The events of a body, in order; a Refusal where one cannot be read. */
function readBody(contentType: string, text: string): unknown[] | Answer {
  const events = contentType === 'application/x-ndjson' ? readLines(text) : readJson(text)
  return Array.isArray(events) && events.length > MAX_BODY_EVENTS ? tooMany : events
}

function readLines(text: string): unknown[] | Answer {
  const lines = text.split('\n', MAX_BODY_EVENTS + 2)
  if (lines.length > MAX_BODY_EVENTS + 1) return tooMany // the last one may be what follows the last line's end: nothing
  return lines.filter((line) => line.trim() !== '').map(parseJson)
}

function readJson(text: string): unknown[] | Answer {
  const parsed = parseJson(text)
  if (parsed instanceof Refusal) return problem('400 Bad Request', parsed.code, parsed.message)
  return Array.isArray(parsed) ? parsed : [parsed]
}

const CONTENT_TYPES = ['application/json', 'application/x-ndjson']

/** @param contentType the header's value */
export async function postEvents(
  contentType: string,
  body: Buffer,
  appender: Appender,
  metrics: IngestMetrics,
): Promise<Answer> {
  const mediaType = contentType.split(';')[0]!.trim().toLowerCase()
  if (!CONTENT_TYPES.includes(mediaType)) {
    const wants = `Content-Type wants ${CONTENT_TYPES.join(' or ')}; got ${contentType.slice(0, 100) || 'none'}`
    return problem('415 Unsupported Media Type', 'unsupported_media_type', wants)
  }
  if (!isUtf8(body)) return problem('400 Bad Request', 'invalid_utf8', 'the body is not UTF-8')
  if (appender.isFull) return overloaded('the stores cannot take more now')
  const events = readBody(mediaType, body.toString('utf8'))
  if (!Array.isArray(events)) return events

  const request = new Request()
  events.forEach((given, index) => {
    const parsed = given instanceof Refusal ? given : parseEvent(given)
    request.expect()
    if (parsed instanceof Refusal) {
      metrics.refused.inc({ code: parsed.code })
      request.settle(index, parsed)
    } else {
      appender.append(parsed.event, JSON.stringify(parsed.event), request, index)
    }
  })
  request.sealed()
  const late = overloaded(
    'Redis did not answer in time; the events may be stored all the same, so send them again with their id or seq',
  )
  return inTime(
    request.stored.then(() => request.answer()),
    late,
  )
}

/** @returns `late` when the result is not there in time */
async function inTime<T>(result: Promise<T>, late: T): Promise<T> {
  let timer: NodeJS.Timeout | undefined
  const timeout = new Promise<T>((resolve) => {
    timer = setTimeout(() => resolve(late), REDIS_TIMEOUT_MS)
  })
  return Promise.race([result, timeout]).finally(() => clearTimeout(timer))
}
