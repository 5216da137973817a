import { expect, test } from 'vitest'
import { readConfig } from '../shared/config.js'
import type { CallEvent } from '../shared/events.js'
import { createIngestMetrics } from '../shared/metrics.js'
import { createProviders } from './providers/index.js'
import { takeWebhook, type WebhookContext } from './webhooks.js'

const providers = createProviders(readConfig({}))

/** What becomes of a body, and the events that are stored. */
async function taken(
  name: string,
  route: string,
  contentType: string,
  body: string,
  wasSpoken = false,
  wasAnswered: boolean | 'unknown' = false,
) {
  const stored: CallEvent[] = []
  const context = {
    metrics: createIngestMetrics(),
    deliveries: {
      deliverOrSpool: async (events: CallEvent[]) => {
        stored.push(...events)
        return { state: 'stored', refused: [] }
      },
    },
    hasOtherTurns: async () => wasSpoken,
    isAnswered: async () => (wasAnswered === 'unknown' ? undefined : wasAnswered),
  } as unknown as WebhookContext
  const request = {
    method: 'POST',
    route,
    pathSecret: undefined,
    query: new URLSearchParams(),
    publicUrls: [],
    header: (header: string) => (header === 'content-type' ? contentType : ''),
    body: Buffer.from(body),
    receivedMs: 0,
  }
  return { answer: await takeWebhook(providers.get(name)!, request, context), stored }
}

test('a_form_with_too_many_fields_is_refused_and_not_cut_off', async () => {
  const form = (fields: number) =>
    ['CallSid=CA1', ...Array.from({ length: fields - 1 }, (_, i) => `x${i}=${i}`)].join('&')
  const type = 'application/x-www-form-urlencoded'
  const most = await taken('exotel', 'status', type, form(2000))
  expect(JSON.stringify(most.stored)).toContain('"x1998":"1998"')
  const more = await taken('exotel', 'status', type, form(2001))
  expect(more.answer).toMatchObject({ status: '400 Bad Request', body: { error: { code: 'invalid_form' } } })
  expect(more.stored).toEqual([])
})

test('a_report_of_turns_that_came_live_is_kept_but_not_as_turns', async () => {
  const artifact = { messages: [{ role: 'user', message: 'One that never came live.', time: 1_700_000_000_000 }] }
  const body = JSON.stringify({ message: { type: 'end-of-call-report', call: { id: 'v1' }, artifact } })
  const live = await taken('vapi', '', 'application/json', body, true)
  expect(live.stored.filter(({ type }) => type === 'turn')).toEqual([])
  expect(JSON.stringify(live.stored)).toContain('One that never came live.')
  const again = await taken('vapi', '', 'application/json', body, true)
  expect(again.stored).toEqual(live.stored)
  const alone = await taken('vapi', '', 'application/json', body)
  expect(alone.stored.filter(({ type }) => type === 'turn')).toHaveLength(1)
})

test.each([
  [true, '200 OK', 2],
  [false, '200 OK', 4],
  ['unknown', '503 Service Unavailable', 0],
] as const)('a_busy_leg_of_a_call_that_was_answered_%s_is_%s_with_%i_events', async (wasAnswered, status, events) => {
  const payload = { call_session_id: 't1', hangup_cause: 'user_busy' }
  const body = JSON.stringify({ data: { event_type: 'call.hangup', id: 'e1', payload } })
  const { answer, stored } = await taken('telnyx', '', 'application/json', body, false, wasAnswered)
  expect({ status: answer.status, events: stored.length }).toEqual({ status, events })
})
