/**
 * Logging: JSON lines on standard output. Transcript text and phone numbers are never logged.
 *
 * That holds by construction, whatever a caller gives it. In every line, phone numbers are masked (phone-numbers.ts), long strings
 * are cut, and fields that have what was said in a call are left out by their name (`NOT_LOGGED`). Of an error there are only type,
 * code, message and where it was thrown: not the command that Redis' errors carry, nor PostgreSQL's detail. Of its message what may
 * quote data is cut off, see `withoutData`. So callers give `err` the error itself, and not its message: of a string nobody knows
 * whose words it is.
 *
 * Nothing here is on the way of an event: a line costs 10 to 40 µs.
 */
import { type DestinationStream, type Logger, pino } from 'pino'
import { maskCallSid, maskField, maskNumbers } from './phone-numbers.js'

export type { Logger }

/** Of any other string. */
const MOST_CHARS = 500
const MOST_ITEMS = 100
const MOST_DEPTH = 4
const MOST_FRAMES = 12
const LEFT_OUT = '[not logged]'
/** What people said, or may have said. (Numbers under these names are counts, and stay.) */
const NOT_LOGGED = new Set(
  'text transcript full_transcript data collected_data meta event payload body raw fields args command detail objections'.split(
    ' ',
  ),
)
const CALL_SID = new Set(['callSid', 'call_sid', 'callSids', 'call_sids'])
/** Where a string is the words of whoever failed. */
const REASON = new Set(['err', 'error', 'reason', 'cause'])

/**
 * @param process which part of calltape speaks: `ingest`, `sink`, …
 * @param destination standard output, if absent
 */
export function createLog(process: string, level: string, destination?: DestinationStream): Logger {
  const options = {
    name: `calltape-${process}`,
    level,
    base: null,
    timestamp: pino.stdTimeFunctions.isoTime,
    serializers: { err: (given: unknown) => given }, // it has been described by then; pino's own would be content with less
    formatters: { bindings: (bindings: object) => clean(bindings) as Record<string, unknown> },
    hooks: {
      logMethod(this: Logger, given: unknown[], method: (this: Logger, ...args: never[]) => void): void {
        const [first, ...others] = given
        const cleaned = [first instanceof Error ? { err: first } : first, ...others].map((each) => clean(each))
        method.apply(this, cleaned as never[])
      },
    },
  }
  return destination ? pino(options, destination) : pino(options)
}

/** Why a connection failed. Where a host has several addresses, Node's error has a code and no message. */
export function reasonOf(error: Error): string {
  return error.message || ((error as NodeJS.ErrnoException).code ?? error.name)
}

/** What may be said of an error where others read it: in a log, on standard error of a service, in /readyz. */
export interface Described {
  type: string
  code?: string | number
  message: string
  /** Where in calltape; not for what a store or the system answered, which happens wherever they were asked. */
  stack?: string
}

export function describeError(error: Error): Described {
  const { code } = error as NodeJS.ErrnoException
  const isAnswer = isOfPostgres(error) || isOfSystem(error) || error.name === 'ReplyError'
  const frames = isAnswer ? [] : (error.stack ?? '').split('\n').filter((line) => /^\s+at /.test(line))
  return {
    type: error.constructor?.name || error.name,
    ...(typeof code === 'string' || typeof code === 'number' ? { code } : {}),
    message: withoutData(error),
    ...(frames.length > 0 ? { stack: frames.slice(0, MOST_FRAMES).join('\n') } : {}),
  }
}

/** For standard error, when a process ends with it: of that, too, others keep what a service writes there. */
export function describeCrash(error: unknown): string {
  if (!(error instanceof Error)) return `${typeof error} thrown that is no error`
  const { type, code, message, stack } = describeError(error)
  return `${type}${code === undefined ? '' : ` ${code}`}: ${message}${stack ? `\n${stack}` : ''}`
}

/**
 * An error's message, without what it may quote of a call.
 *
 *  - PostgreSQL's own words name tables, constraints, columns; they quote values where those are at fault (SQLSTATE 22), and what a
 *    function raises may be anything: of these there is only the code, and which function it was.
 *  - The system's (`connect ECONNREFUSED 127.0.0.1:6379`) stay; those of JSON.parse go: they quote their input.
 *  - Anything else is cut off where it begins to quote, but for names of tables and their like.
 */
export function withoutData(error: Error): string {
  const { cause } = error
  let message = reasonOf(error)
  if (isOfPostgres(error)) message = ofPostgres(error)
  else if (error instanceof SyntaxError) message = 'what was to be read is malformed'
  else if (cause instanceof Error && cause.message && message.includes(cause.message)) {
    const [before = ''] = message.split(cause.message)
    message = unquoted(before) + withoutData(cause)
  } else if (!isOfSystem(error)) message = unquoted(message)
  return short(message)
}

interface PostgresError extends Error {
  code: string
  where?: string | undefined
}

// By its shape: with pg's class, every process would load pg for its log.
const isOfPostgres = (error: Error): error is PostgresError =>
  'severity' in error && 'routine' in error && 'code' in error && typeof error.code === 'string'
const isOfSystem = (error: Error) => 'syscall' in error && typeof error.syscall === 'string'

/** Classes of SQLSTATE whose messages name things of the database, and never a value. */
const NAMES_ONLY = new Set('08 0A 23 25 26 28 3D 3F 40 42 44 53 54 55 57 58 XX'.split(' '))
const FUNCTION = /^(?:PL\/\w+|SQL) function "?([\w.$]+)/m

function ofPostgres({ code, where = '', message }: PostgresError): string {
  if (/^(?:PL\/|SQL (?:function|statement))/m.test(where)) {
    return `error ${code} raised in ${FUNCTION.exec(where)?.[1] ?? 'a function'}`
  }
  return NAMES_ONLY.has(code.slice(0, 2)) ? message : `error ${code}`
}

const NAMED =
  /\b(?:relation|table|column|constraint|index|schema|database|role|user|function|type|view|sequence|parameter|extension|host|address) $/i
const QUOTE = /(?<!\p{L})["'`“‘«]/gu
/** Data follows, without quotes. */
const DATA_FOLLOWS = /\)=\(|Failing row contains|\bReceived\b/

/** Up to where it begins to quote something that is no name. */
function unquoted(message: string): string {
  const [text = ''] = message.split(DATA_FOLLOWS)
  for (const { 0: quote, index } of text.matchAll(QUOTE)) {
    const [name = ''] = /^[\w.$]{1,63}/.exec(text.slice(index + 1)) ?? []
    const end = index + 1 + name.length
    if (NAMED.test(text.slice(0, index)) && text[end] === quote) continue
    if (/^[\s.,;:)]|^$/.test(text.slice(index + 1)) && isClosing(text, index)) continue
    return `${text.slice(0, index)}…`
  }
  return text === message ? text : `${text}…`
}

/** The quote behind a name that was kept. */
const isClosing = (text: string, index: number) => /["'`][\w.$]{1,63}$/.test(text.slice(0, index))

/** Masked before it is cut: what is left of a number at the end would pass for none. (Far behind that, nobody will look.) */
function short(text: string, mask: (text: string) => string = maskNumbers): string {
  const masked = mask(text.slice(0, 4 * MOST_CHARS))
  return masked.length > MOST_CHARS ? `${masked.slice(0, MOST_CHARS)}…` : masked
}

/** Whatever is to be logged, as it may be. @param name of the field that has it; none for a message */
function clean(value: unknown, name = '', depth = 0): unknown {
  if (typeof value === 'string') {
    if (NOT_LOGGED.has(name)) return LEFT_OUT
    if (CALL_SID.has(name)) return short(value, maskCallSid)
    return short(REASON.has(name) ? unquoted(value) : value, (text) => maskField(name, text))
  }
  if (typeof value === 'bigint') return String(value)
  if (typeof value !== 'object' || value === null) return value
  if (value instanceof Error) return describeError(value)
  if (value instanceof Date) return value
  if (value instanceof URL) return short(value.href)
  if (ArrayBuffer.isView(value)) return `[${value.byteLength} bytes]`
  if (NOT_LOGGED.has(name) || depth === MOST_DEPTH) return LEFT_OUT
  if (Array.isArray(value)) return value.slice(0, MOST_ITEMS).map((each) => clean(each, name, depth + 1))
  const entries = Object.entries(value).slice(0, MOST_ITEMS)
  return Object.fromEntries(entries.map(([key, inner]) => [maskNumbers(key), clean(inner, key, depth + 1)]))
}
