import { createHmac } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { readConfig } from '../../shared/config.js'
import type { JsonObject } from '../../shared/json.js'
import { createPlivo } from './plivo.js'
import { verifySignature } from './plivo-signature.js'
import type { ReadRequest, Translation } from './provider.js'

const TOKEN = 'Y2Q2ZDgxZmY5YWRiOTI5YmQ1Njg0MTAxZWIyOTc4'
const NONCE = '31627761595286130198'
const form = (fields: Record<string, string>) => new URLSearchParams(fields).toString()

interface Given {
  body?: string
  type?: string
  urls?: string[]
  headers?: Record<string, string>
}

function refusalOf(
  signature: string,
  { body = '', type = 'application/x-www-form-urlencoded', urls = [], headers }: Given,
) {
  const all: Record<string, string> = {
    'content-type': type,
    'x-plivo-signature-v3': signature,
    'x-plivo-signature-v3-nonce': NONCE,
    ...headers,
  }
  const request = {
    method: body === '' ? 'GET' : 'POST',
    publicUrls: urls,
    body: Buffer.from(body),
    header: (name: string) => all[name] ?? '',
  }
  return verifySignature(request as never, ['next', TOKEN])?.message
}

const signed = (base: string, token = TOKEN) => createHmac('sha256', token).update(`${base}.${NONCE}`).digest('base64')

describe('signature', () => {
  const url = 'https://plivobin.non-prod.plivops.com/api/v1/validate_signature03.xml'
  const call = '3e82ae9d-2c78-4d85-b1a4-6eae7dbafb36'
  const fields = {
    Direction: 'outbound',
    From: '19792014278',
    ALegUUID: call,
    CallStatus: 'in-progress',
    BillRate: '0.002',
    ParentAuthID: 'MANWVLYTK4ZWU1YTY4QA',
    To: 'sip:PlivoSignature382029104058171078704104@phone-qa.voice.plivodev.com',
    ALegRequestUUID: call,
    CallUUID: call,
    RequestUUID: call,
    'SIP-H-To': '<sip:PlivoSignature382029104058171078704104@52.9.11.55;transport=udp>;tag=1',
    SessionStart: '2020-04-08 11:34:33.238707',
    Event: 'StartApp',
  }
  const posted = 'iAjE5QqI37mbkYe4w3jTMudqEzbDufdqi7sYwTu64e0='

  test('a_form_that_is_larger_than_any_is_not_even_hashed', () => {
    const body = `CallUUID=${'a'.repeat(128 * 1024)}`
    const signature = signed(`${url}?${body.replace('=', '')}`)
    expect(refusalOf(signature, { urls: [url], body })).toContain('at most')
  })

  test.each([
    ['POST', 'iAjE5QqI37mbkYe4w3jTMudqEzbDufdqi7sYwTu64e0=', url, form(fields)],
    ['POST with a query', 'k7Pusd4OxCIjR5IfA9iedDNu/h/gbdYqdzG/MiYtd1c=', `${url}/?a=b&c=d`, form(fields)],
    ['GET', 'i/MQsaQSAd6fiKhOh2qeeeLHZ9faldADSb3/7+Akfbc=', `${url}?${form(fields)}`, ''],
    ['GET with a query', 'UBq8jAtd32wR8EK9VgxbBn4n5rpI/l1H9iN4WfSEHFQ=', `${url}/?a=b&c=d&${form(fields)}`, ''],
  ])('the_vector_of_the_SDKs_for_%s_holds', (_, signature, at, body) => {
    expect(refusalOf(signature, { urls: [at], body })).toBeUndefined()
    expect(refusalOf(signature, { urls: [at.replace('03', '04')], body })).toMatch(/PUBLIC_URL/)
  })

  test('one_of_several_signatures_urls_and_tokens_is_enough', () => {
    const [urls, body] = [['http://10.0.0.1/x', url], form(fields)]
    expect(refusalOf(`bm90aGluZw==, ${posted}`, { urls, body })).toBeUndefined()
    expect(refusalOf('', { urls, body, headers: { 'x-plivo-signature-ma-v3': posted } })).toBeUndefined()
    expect(refusalOf(signed(url, 'next'), { urls })).toBeUndefined()
  })

  test('values_are_signed_decoded_and_those_of_one_name_sorted', () => {
    const base = `${url}?a=1&a=2&b=é .nameZoënumber1number2`
    const urls = [`${url}?b=%C3%A9+&a=2&a=1`]
    expect(refusalOf(signed(base), { urls, body: 'number=2&name=Zo%C3%AB&number=1' })).toBeUndefined()
  })

  test('anything_missing_or_changed_is_refused', () => {
    const [urls, body] = [[url], form(fields)]
    expect(refusalOf('', { urls, body })).toMatch(/does not fit/)
    expect(refusalOf(posted.toLowerCase(), { urls, body })).toMatch(/does not fit/)
    expect(refusalOf(posted, { urls, body: body.replace('outbound', 'inbound') })).toMatch(/does not fit/)
    expect(refusalOf(posted, { urls, body: `${body}&x=` })).toMatch(/does not fit/)
    expect(refusalOf(posted, { urls, body, headers: { 'x-plivo-signature-v3-nonce': '' } })).toMatch(/does not fit/)
    expect(refusalOf(signed(url, 'wrong'), { urls })).toMatch(/does not fit/)
  })

  test('a_body_that_is_no_form_cannot_be_put_to_the_signature_of_a_GET', () => {
    const json = JSON.stringify({ CallUUID: 'x', CallStatus: 'completed' })
    for (const type of ['application/json', 'multipart/form-data; boundary=x', '']) {
      expect(refusalOf(signed(url), { urls: [url], body: json, type })).toMatch(/signs forms/)
    }
  })
})

const plivo = createPlivo(readConfig({}))
const eventsOf = (payload: JsonObject, query = '') =>
  (plivo.toEvents({ payload, query: new URLSearchParams(query) } as ReadRequest) as Translation).events

test('what_is_sent_again_has_its_keys_and_what_is_not_has_others', () => {
  const hangup = { CallUUID: 'x', CallStatus: 'completed', Event: 'Hangup', Duration: '3' }
  expect(eventsOf(hangup)).toEqual(eventsOf(Object.fromEntries(Object.entries(hangup).reverse())))
  const ids = [hangup, { ...hangup, Duration: '4' }].map((payload) => eventsOf(payload)[1]!.id)
  expect(new Set(ids).size).toBe(2)
})

test.each([
  ['timeout', 'no-answer'],
  ['no-answer', 'no-answer'],
  ['cancel', 'canceled'],
  ['busy', 'busy'],
  ['failed', 'failed'],
  ['completed', 'completed'],
])('%s_is_%s_and_ends_the_call', (CallStatus, status) => {
  expect(eventsOf({ CallUUID: 'x', CallStatus })).toMatchObject([
    { type: 'call.started' },
    { type: 'call.status', status, meta: status === CallStatus ? {} : { CallStatus } },
    { type: 'call.ended', reason: CallStatus },
  ])
})

test('a_status_that_nobody_knows_ends_nothing', () => {
  expect(eventsOf({ CallUUID: 'x', CallStatus: 'parked' })).toMatchObject([
    { type: 'call.started' },
    { type: 'call.status', status: 'parked' },
  ])
})

test('without_a_call_it_is_refused_and_without_a_token_it_is_not_verified', () => {
  expect(plivo.toEvents({ payload: {}, query: new URLSearchParams() } as ReadRequest)).toMatchObject({
    code: 'missing_field',
    path: 'CallUUID',
  })
  expect(plivo.verify).toBeUndefined()
})
