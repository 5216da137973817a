/**
 * What providers send, as files: test/fixtures/PROVIDER/NAME.json. Each is one call, what is sent of it, and the rows it has to
 * end in. (What a row must hold is a part of it: columns that are not named may hold anything.)
 */
import { once } from 'node:events'
import { readdirSync, readFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { WebSocket } from 'ws'
import { PACKAGE_ROOT } from '../../shared/package-root.js'
import { until } from './stores.js'

type JsonObject = Record<string, unknown>

/** One HTTP request. Of json, form, multipart and text at most one is there: the body. */
export interface RequestFixture {
  method?: 'GET' | 'POST'
  /** `/webhooks/exotel/status?x=y` */
  path: string
  headers?: Record<string, string>
  json?: unknown
  /** Names and values: application/x-www-form-urlencoded. */
  form?: Record<string, string>
  /** Names and values: multipart/form-data. */
  multipart?: Record<string, string>
  /** As it stands; its Content-Type is in `headers`. */
  text?: string
  /** What it has to be answered; 200 when nothing is said. */
  answer?: { status?: number; contentType?: string; body?: unknown }
}

/** One WebSocket: what is sent, and how the provider closes it. */
export interface StreamFixture {
  stream: string
  headers?: Record<string, string>
  messages: unknown[]
  /** Close code; 1006 drops the connection. */
  close: number
}

export interface Fixture {
  name: string
  call_sid: string
  send: (RequestFixture | StreamFixture)[]
  /** call_sessions; `live: true` instead of waiting until it is finalized. */
  session: JsonObject
  live?: boolean
  /** call_transcript_turns in the order of full_transcript (of a live call: of seq and time). */
  turns: JsonObject[]
  /** Among call_events.event, each of these. */
  events?: JsonObject[]
}

export function fixturesOf(provider: string): Fixture[] {
  const folder = join(PACKAGE_ROOT, 'test/fixtures', provider)
  const files = readdirSync(folder).filter((file) => file.endsWith('.json'))
  return files.map((file) => ({
    name: basename(file, '.json'),
    ...(JSON.parse(readFileSync(join(folder, file), 'utf8')) as Omit<Fixture, 'name'>),
  }))
}

export const providersWithFixtures = () => readdirSync(join(PACKAGE_ROOT, 'test/fixtures')).sort()

export async function sendRequest(ingestUrl: string, request: RequestFixture): Promise<Response> {
  const { path, headers = {} } = request
  const body = bodyOf(request)
  const method = request.method ?? 'POST'
  return await fetch(ingestUrl + path, { method, headers: { ...body.headers, ...headers }, body: body.body ?? null })
}

function bodyOf({ json, form, multipart, text }: RequestFixture): {
  body?: string | FormData | URLSearchParams
  headers?: Record<string, string>
} {
  if (json !== undefined) return { body: JSON.stringify(json), headers: { 'Content-Type': 'application/json' } }
  if (form) return { body: new URLSearchParams(form) }
  if (text !== undefined) return { body: text }
  if (!multipart) return {}
  const body = new FormData()
  for (const [name, value] of Object.entries(multipart)) body.append(name, value)
  return { body }
}

export async function playStream(
  ingestUrl: string,
  { stream, headers, messages, close }: StreamFixture,
): Promise<void> {
  const socket = new WebSocket(ingestUrl.replace('http', 'ws') + stream, {
    perMessageDeflate: false,
    ...(headers && { headers }),
  })
  await once(socket, 'open')
  for (const message of messages) socket.send(typeof message === 'string' ? message : JSON.stringify(message))
  await until('all is sent', () => socket.bufferedAmount === 0)
  const closed = once(socket, 'close')
  if (close === 1006) socket.terminate()
  else socket.close(close)
  await closed
}
