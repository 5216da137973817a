/** `POST /v1/events`: a body of events, each judged by itself; answered once Redis has the good ones. */
import { isUtf8 } from 'node:buffer'
import { parseEvent, Refusal } from '../shared/events.js'
import type { IngestMetrics } from '../shared/metrics.js'
import type { Appender, Origin } from './append.js'
import { parseJson } from './stream.js'

export interface Answer {
  status: string
  body: unknown
  headers?: Record<string, string>
}

/** How long a request waits for Redis before it is told to come back. */
const STORE_TIMEOUT_MS = 5000
const RETRY_AFTER_SECONDS = '2'

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
  readonly rejected: Rejected[] = []
  accepted = 0
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

  private done(): void {
    if (--this.left === 0) this.resolve()
  }
}

/** The events of a body, in order; a Refusal where one cannot be read. */
function readBody(contentType: string, text: string): unknown[] | Answer {
  if (contentType === 'application/x-ndjson') {
    return text
      .split('\n')
      .filter((line) => line.trim() !== '')
      .map(parseJson)
  }
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
  if (!(await inTime(request.stored))) {
    return overloaded(
      'Redis did not answer in time; the events may be stored all the same, so send them again with their id or seq',
    )
  }
  request.rejected.sort((a, b) => a.index - b.index)
  return { status: '200 OK', body: { accepted: request.accepted, rejected: request.rejected } }
}

async function inTime(stored: Promise<void>): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<false>((resolve) => {
    timer = setTimeout(() => resolve(false), STORE_TIMEOUT_MS)
  })
  const result = await Promise.race([stored.then(() => true), late])
  clearTimeout(timer)
  return result
}
