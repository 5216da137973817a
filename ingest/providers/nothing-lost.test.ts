/**
 * Whatever a provider sends, nothing of it is lost, and nothing of it makes an adapter throw: every fixture with each of its
 * fields replaced by each type of JSON, and with one more field in each of its objects.
 */
import { describe, expect, test } from 'vitest'
import { readConfig } from '../../shared/config.js'
import { type CallEvent, idempotencyKey, Refusal } from '../../shared/events.js'
import type { JsonObject } from '../../shared/json.js'
import { createIngestMetrics } from '../../shared/metrics.js'
import {
  fixturesOf,
  providersWithFixtures,
  type RequestFixture,
  type StreamFixture,
} from '../../test/support/fixtures.js'
import { parseGenerously, takeWebhook, type WebhookContext } from '../webhooks.js'
import { createProviders } from './index.js'
import type { ProviderRequest } from './provider.js'

/** Where the call is named: without it, nothing can be kept. */
const CALL =
  /\b(CallSid|callSid|call_sid|CallUUID|call_uuid|call_id|conversation_(uu)?id|response|message|call|call\.id|data|data\.payload)$/

/** What is left out on purpose, by the kind of message and the place in it. */
const LEFT_OUT: Record<string, RegExp> = {
  // The call comes whole with each event, and its end has it once. A turn stays as it first came; the end has the text of all.
  retell:
    /^(transcript_updated .*|call_(ended|analyzed) call\.(start_timestamp|transcript_\w+\.\d+\b.*)|(?!call_)\w+ call\.transcript\w*\b.*)$/,
  // The same context comes with each message, and the report has it once, with the messages in one of their forms.
  vapi: /^((?!end-of)\S* message\.(call|assistant|customer|phoneNumber|artifact|messages\w*|conversation)\b.*|end-of-\S* message\.(messages\b.*|(artifact\.)?(messagesOpenAIFormatted\b.*|transcript)|recordingUrl)|\S+ message\.(transcriptType|transcript|type))$/,
  // No message of a WebSocket without the one that opens it.
  twilio: /^(start (event|start|streamSid)|setup type)$/,
  exotel: /^start (event|stream_?[sS]id)$/,
}

const NEEDLE = 'a-needle-in-a-haystack'
/** The first is looked for; none of them may be too much for an adapter. */
const ODD: unknown[] = [NEEDLE, 7, null, 'constructor', [{}], { toString: 1, valueOf: null }]

const providers = createProviders(readConfig({}))
const metrics = createIngestMetrics()

interface Played {
  /** As they end in the tables: of those with one key the first. */
  kept: CallEvent[]
  /** Of each message, how many events it added. */
  added: number[]
  /** Of each request, what it was answered. */
  answers: string[]
}

async function play(name: string, send: (RequestFixture | StreamFixture)[]): Promise<Played> {
  const provider = providers.get(name)!
  const kept = new Map<string, CallEvent>()
  let entries = 0
  const keep = (events: CallEvent[]) => {
    for (const event of events) {
      const key = JSON.stringify([event.type, event.call_sid, idempotencyKey(event, `entry ${entries++}`)])
      if (!kept.has(key)) kept.set(key, event)
    }
  }
  const isAny = (sid: string, is: (event: CallEvent) => boolean) =>
    [...kept.values()].some((event) => event.call_sid === sid && is(event))
  const context = {
    metrics,
    deliveries: {
      deliverOrSpool: async (events: CallEvent[]) => {
        keep(events)
        return { state: 'stored', refused: [] }
      },
    },
    hasOtherTurns: async (sid: string, ids: Set<unknown>) =>
      isAny(sid, ({ type, id }) => type === 'turn' && !ids.has(id)),
    isAnswered: async (sid: string) =>
      isAny(sid, (event) => event.type === 'call.status' && /^(in-progress|completed)$/.test(event.status ?? '')),
  } as unknown as WebhookContext
  const added: number[] = []
  const answers: string[] = []
  for (const part of send) {
    const stream = 'stream' in part ? provider.openStream!() : undefined
    for (const message of 'stream' in part ? part.messages : [undefined]) {
      const before = kept.size
      if (!stream) answers.push((await takeWebhook(provider, requestOf(part as RequestFixture), context)).status)
      else if (typeof message === 'object') keep(eventsIn(stream.toEvents(message as JsonObject)))
      added.push(kept.size - before)
    }
  }
  return { kept: [...kept.values()], added, answers }
}

const eventsIn = (given: Parameters<typeof parseGenerously>[0][] = []) =>
  given.map((event) => parseGenerously(event, '')).filter((event): event is CallEvent => !(event instanceof Refusal))

function requestOf({
  path,
  method = 'POST',
  json,
  form,
  multipart,
  text = '',
  headers,
}: RequestFixture): ProviderRequest {
  const url = new URL(path, 'http://localhost')
  const fields = form ?? multipart
  const type = json === undefined ? 'application/x-www-form-urlencoded' : 'application/json'
  const all = new Map(Object.entries({ 'Content-Type': type, ...headers }).map(([name, v]) => [name.toLowerCase(), v]))
  const body = json === undefined ? (fields ? String(new URLSearchParams(fields)) : text) : JSON.stringify(json)
  return {
    method,
    route: url.pathname.split('/').slice(3).join('/'),
    pathSecret: undefined,
    query: url.searchParams,
    publicUrls: [url.href],
    header: (name) => all.get(name) ?? '',
    body: Buffer.from(body),
    receivedMs: Date.UTC(2026, 5, 1),
  }
}

type Path = (string | number)[]

/** The paths of all that is in it; of a list's items the first two stand for all. */
function* walk(value: unknown, path: Path = []): Generator<{ path: Path; isObject: boolean }> {
  const isObject = typeof value === 'object' && value !== null && !Array.isArray(value)
  yield { path, isObject }
  if (Array.isArray(value)) for (const [i, each] of value.slice(0, 2).entries()) yield* walk(each, [...path, i])
  if (isObject) for (const [name, each] of Object.entries(value)) yield* walk(each, [...path, name])
}

function replaced(root: unknown, path: Path, value: unknown): unknown {
  const copy = structuredClone(root)
  let at = copy as JsonObject
  for (const step of path.slice(0, -1)) at = at[step] as JsonObject
  at[path.at(-1)!] = value
  return copy
}

/** The message with one thing changed, in every way. */
function* mutants(message: unknown, isForm: boolean): Generator<{ where: string; changed: unknown }> {
  for (const { path, isObject } of walk(message)) {
    const more = [...path, 'a_new_field']
    if (isObject) yield { where: more.join('.'), changed: replaced(message, more, NEEDLE) }
    if (path.length === 0) continue
    for (const odd of ODD) {
      if (!isForm || typeof odd === 'string') yield { where: path.join('.'), changed: replaced(message, path, odd) }
    }
  }
}

interface Place {
  message: unknown
  isForm: boolean
  /** The fixture's messages with this one changed. */
  with(changed: unknown): (RequestFixture | StreamFixture)[]
}

function placesOf(send: (RequestFixture | StreamFixture)[]): Place[] {
  return send.flatMap((part, i): Place[] => {
    if ('stream' in part) {
      return part.messages.map((message, j) => ({
        message,
        isForm: false,
        with: (changed) => send.with(i, { ...part, messages: part.messages.with(j, changed) }),
      }))
    }
    const kind = (['json', 'form', 'multipart'] as const).find((each) => part[each] !== undefined)
    if (kind) {
      return [
        { message: part[kind], isForm: kind !== 'json', with: (changed) => send.with(i, { ...part, [kind]: changed }) },
      ]
    }
    const { pathname, searchParams } = new URL(part.path, 'http://localhost')
    const query = (changed: unknown) => String(new URLSearchParams(changed as Record<string, string>))
    return [
      {
        message: Object.fromEntries(searchParams),
        isForm: true,
        with: (changed) => send.with(i, { ...part, path: `${pathname}?${query(changed)}` }),
      },
    ]
  })
}

/** The provider's own word for what it is. */
function kindOf(message: unknown): string {
  const { event, type, message: inner } = message as JsonObject
  return String(event ?? type ?? (inner as JsonObject | undefined)?.type ?? '')
}

describe.each(providersWithFixtures())('%s', (provider) => {
  test.each(fixturesOf(provider))('$name: nothing_is_lost_and_nothing_throws', async ({ send }) => {
    const wrong = new Set<string>()
    const usual = await play(provider, send)
    for (const [i, place] of placesOf(send).entries()) {
      if (usual.added[i] === 0) continue // sent again, refused, or nothing to keep
      for (const { where, changed } of mutants(place.message, place.isForm)) {
        const kind = kindOf(place.message)
        const played = await play(provider, place.with(changed)).catch((error: Error) => error)
        if (played instanceof Error) {
          wrong.add(`${kind} ${where}: ${played.message}`)
          continue
        }
        if (CALL.test(where) || LEFT_OUT[provider]?.test(`${kind} ${where}`)) continue
        if (played.answers.some((status, n) => status[0] !== usual.answers[n]?.[0]))
          wrong.add(`${kind} ${where} is refused`)
        const isKept = JSON.stringify(played.kept).includes(NEEDLE)
        if (JSON.stringify(changed).includes(NEEDLE) && !isKept) wrong.add(`${kind} ${where} is lost`)
      }
    }
    expect([...wrong]).toEqual([])
  })
})
