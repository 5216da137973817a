import { createHmac } from 'node:crypto'
import { expect, test } from 'vitest'
import { readConfig } from '../../shared/config.js'
import type { JsonObject } from '../../shared/json.js'
import { createJambonz } from './jambonz.js'
import type { ReadRequest, Translation } from './provider.js'

const SECRET = 'a-webhook-secret'
const NOW = Date.UTC(2026, 0, 25, 10)
const BODY = '{"call_sid":"jb-1","call_status":"ringing"}'
const provider = createJambonz(readConfig({ JAMBONZ_SECRET: `next,${SECRET}` }))

function signature(t: number | string, { body = BODY, secret = SECRET } = {}): string {
  return `t=${t},v1=${createHmac('sha256', secret).update(`${t}.${body}`).digest('hex')}`
}

function refusalOf(header: string, body = BODY): string | undefined {
  const request = {
    header: (name: string) => (name === 'jambonz-signature' ? header : ''),
    body: Buffer.from(body),
    receivedMs: NOW,
  }
  return provider.verify!(request as never)?.message
}

test('a_signature_of_now_over_this_body_is_accepted_under_any_of_the_secrets', () => {
  expect(refusalOf(signature(NOW / 1000))).toBeUndefined()
  expect(refusalOf(signature(NOW / 1000, { secret: 'next' }))).toBeUndefined()
  expect(refusalOf(signature(NOW / 1000 - 300))).toBeUndefined()
})

test('missing_wrong_old_and_changed_ones_are_refused', () => {
  const t = NOW / 1000
  const right = signature(t)
  for (const wrong of [
    '',
    `t=${t}`,
    right.replace('v1=', 'v0='),
    right.replace(`t=${t}`, `t=${t + 1}`),
    right.replace(`t=${t},`, ''),
    right.slice(0, -1),
    signature(t, { secret: 'wrong' }),
    signature(t, { secret: '' }),
  ]) {
    expect(refusalOf(wrong), wrong).toMatch(/does not fit/)
  }
  expect(refusalOf(right, BODY.replace('ringing', 'rinking'))).toMatch(/does not fit/)
  expect(refusalOf(right, `${BODY}\n`)).toMatch(/does not fit/)
  for (const old of [signature(t - 301), signature(t + 301), signature('now'), signature('')]) {
    expect(refusalOf(old), old).toMatch(/last 5 minutes/)
  }
})

function idOf(text: string, signed: string): unknown {
  const payload: JsonObject = {
    call_sid: 'jb-1',
    call_status: 'in-progress',
    speech: { is_final: true, alternatives: [{ transcript: text }] },
  }
  const { events } = provider.toEvents({ payload, header: () => signed } as unknown as ReadRequest) as Translation
  return events.find(({ type }) => type === 'turn')!.id
}

test('the_same_sentence_said_twice_is_two_turns_and_one_sent_twice_is_one', () => {
  expect(idOf('Yes.', 't=1,v1=a')).toBe(idOf('Yes.', 't=1,v1=a'))
  expect(idOf('Yes.', 't=1,v1=a')).not.toBe(idOf('Yes.', 't=2,v1=b'))
  expect(idOf('Yes.', '')).toBeUndefined() // nothing tells them apart: rather twice than not at all
})

test('who_names_no_call_is_refused', () => {
  expect(
    provider.toEvents({ payload: { call_status: 'ringing' }, header: () => '' } as unknown as ReadRequest),
  ).toMatchObject({
    code: 'missing_field',
    path: 'call_sid',
  })
})
