/** One HTTP request on uWebSockets.js: what is read of it, and its answer. */
import type uWS from 'uWebSockets.js'
import { type Answer, overloaded, problem } from './http.js'

const JSON_TYPE = 'application/json; charset=utf-8'

/** A request without its body. */
export interface RequestHead {
  method: string
  path: string
  queryString: string
  query: URLSearchParams
  isWebSocket: boolean
  /** @param name in lower case @returns the header's value, empty when there is none */
  header(name: string): string
}

/** What is needed of a request later: uWebSockets.js takes it back after its handler. */
export function readHead(req: uWS.HttpRequest): RequestHead {
  const headers = new Map<string, string>()
  req.forEach((name, value) => {
    headers.set(name, value)
  })
  return {
    method: req.getMethod().toUpperCase(),
    path: req.getUrl(),
    queryString: req.getQuery() ?? '',
    query: new URLSearchParams(req.getQuery()),
    isWebSocket: false,
    header: (name) => headers.get(name) ?? '',
  }
}

export interface BodyLimits {
  /** Of one body. */
  maxBytes: number
  /** Of all that are being read: nobody knows yet what they are worth, and some not even whose they are. */
  maxHeldBytes: number
}

/** Of all bodies of this process. */
let heldBytes = 0

/** A request and its answer, which may be written only while its client is there; whoever wants to know is told of it. */
export class Exchange {
  private readonly isHead: boolean
  private readonly announcedBytes: number
  private isOver = false
  /** Of its body. */
  private readonly chunks: Buffer[] = []
  private bytes = 0

  constructor(
    private readonly res: uWS.HttpResponse,
    req: uWS.HttpRequest,
    private readonly answered: (answer: Answer) => void = () => undefined,
  ) {
    this.isHead = req.getMethod() === 'head'
    this.announcedBytes = Number(req.getHeader('content-length') || 0)
    res.onAborted(() => {
      this.isOver = true
      this.release()
    })
  }

  answer(answer: Answer, closeConnection = false): void {
    if (this.isOver) return
    const { res, isHead } = this
    const { status, headers, body } = answer
    this.answered(answer)
    const text = typeof body === 'string' ? body : JSON.stringify(body)
    this.isOver = true
    this.release()
    res.cork(() => {
      res.writeStatus(status)
      if (typeof body !== 'string') res.writeHeader('Content-Type', JSON_TYPE)
      for (const [name, value] of Object.entries(headers ?? {})) res.writeHeader(name, value)
      if (isHead) {
        // Given any argument, endWithoutBody would wait for a body of that length and block the connection.
        res.writeHeader('Content-Length', String(Buffer.byteLength(text))).endWithoutBody()
      } else {
        res.end(text, closeConnection)
      }
    })
  }

  answerWith(result: Promise<Answer> | Answer): void {
    Promise.resolve(result)
      .then((value) => this.answer(value))
      .catch((error: Error) => this.answer(overloaded(error.message)))
  }

  /** Answers 413 or 503 instead of calling `handle` when there is too much of it. */
  readBody({ maxBytes, maxHeldBytes }: BodyLimits, handle: (body: Buffer) => Promise<Answer>): void {
    if (this.announcedBytes > maxBytes) {
      this.answer(tooLarge(maxBytes), true)
      return
    }
    this.res.onData((chunk, isLast) => {
      if (this.isOver) return
      this.bytes += chunk.byteLength
      heldBytes += chunk.byteLength
      if (this.bytes > maxBytes) this.answer(tooLarge(maxBytes), true)
      else if (heldBytes > maxHeldBytes) this.answer(TOO_MANY_BODIES, true)
      else this.chunks.push(Buffer.from(chunk.slice(0))) // uWebSockets.js takes its memory back after this call
      if (this.isOver || !isLast) return
      const body = Buffer.concat(this.chunks)
      this.release()
      this.answerWith(handle(body))
    })
  }

  private release(): void {
    heldBytes -= this.bytes
    this.bytes = 0
    this.chunks.length = 0
  }
}

const TOO_MANY_BODIES = overloaded('too much is being sent at once')

/** @returns a part of a path without its percent-encoding; as it stands where it has none that can be read */
export function decodePart(part: string): string {
  try {
    return decodeURIComponent(part)
  } catch {
    return part
  }
}

function tooLarge(maxBytes: number): Answer {
  return problem('413 Payload Too Large', 'too_large', `a body has at most ${maxBytes} bytes`)
}
