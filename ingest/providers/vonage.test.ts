import { createHash, createHmac } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { readConfig } from '../../shared/config.js'
import { Refusal } from '../../shared/events.js'
import type { JsonObject } from '../../shared/json.js'
import type { ReadRequest, Translation } from './provider.js'
import { createVonage } from './vonage.js'

const SECRET = 'a-signature-secret-of-vonage'
const NOW = Date.UTC(2026, 0, 25, 10)
const BODY = '{"uuid":"leg-1","conversation_uuid":"CON-1","status":"ringing"}'
const provider = createVonage(readConfig({ VONAGE_SIGNATURE_SECRET: `next, ${SECRET}` }))

const part = (value: unknown) => Buffer.from(JSON.stringify(value)).toString('base64url')
const sha256 = (text: string) => createHash('sha256').update(text).digest('hex')

function jwt(
  claims: JsonObject,
  { header = { alg: 'HS256', typ: 'JWT' } as JsonObject, secret = SECRET } = {},
): string {
  const signed = `${part(header)}.${part(claims)}`
  return `${signed}.${createHmac('sha256', secret).update(signed).digest('base64url')}`
}

const CLAIMS = { iat: NOW / 1000, jti: 'j', iss: 'Vonage', api_key: 'abcd', payload_hash: sha256(BODY) }

function refusalOf(authorization: string, { body = BODY, method = 'POST', query = '', receivedMs = NOW } = {}) {
  const request = {
    method,
    route: '',
    pathSecret: undefined,
    query: new URLSearchParams(query),
    publicUrls: [],
    header: (name: string) => (name === 'authorization' ? authorization : ''),
    body: Buffer.from(body),
    receivedMs,
  }
  return provider.verify!(request)?.message
}

describe('verify', () => {
  test('a_token_of_now_over_this_body_is_accepted_under_any_of_the_secrets', () => {
    expect(refusalOf(`Bearer ${jwt(CLAIMS)}`)).toBeUndefined()
    expect(refusalOf(`Bearer ${jwt(CLAIMS, { secret: 'next' })}`)).toBeUndefined()
    expect(refusalOf(`bearer ${jwt({ ...CLAIMS, exp: NOW / 1000 + 60 })}`)).toBeUndefined()
  })

  test('the_vector_that_every_JWT_library_is_tried_with_holds', () => {
    const vector =
      'eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIiwiaWF0IjoxNTE2MjM5MDIyfQ.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c'
    const its = createVonage(readConfig({ VONAGE_SIGNATURE_SECRET: 'your-256-bit-secret' }))
    const request = {
      header: () => `Bearer ${vector}`,
      body: Buffer.from(BODY),
      receivedMs: 1516239022_000,
      method: 'POST',
    }
    // It has no payload_hash: the signature and the time before that are right.
    expect(its.verify!(request as never)?.message).toMatch(/^payload_hash/)
  })

  test('no_token_and_tokens_of_other_kinds_are_refused', () => {
    const [header, claims, signature] = jwt(CLAIMS).split('.') as [string, string, string]
    const none = part({ alg: 'none', typ: 'JWT' })
    for (const authorization of [
      '',
      'Bearer',
      'Bearer an-ingest-token',
      `Basic ${jwt(CLAIMS)}`,
      `Bearer ${header}.${claims}`,
      `Bearer ${header}.${claims}.`,
      `Bearer ${none}.${claims}.`,
      `Bearer ${none}.${claims}.${signature}`,
      `Bearer ${jwt(CLAIMS, { header: { alg: 'none' } })}`,
      `Bearer ${jwt(CLAIMS, { header: { alg: 'HS512' } })}`,
      `Bearer ${jwt(CLAIMS, { header: { alg: 'hs256' } })}`,
      `Bearer ${jwt(CLAIMS, { header: {} })}`,
      `Bearer ${jwt(CLAIMS, { secret: 'wrong' })}`,
      `Bearer ${jwt(CLAIMS)}.more`,
      `Bearer ${header}.${part({ ...CLAIMS, iat: CLAIMS.iat + 1 })}.${signature}`,
      `Bearer ${header}.${claims}.${signature.slice(0, -2)}AA`,
      'Bearer a.b.c',
    ]) {
      expect(refusalOf(authorization), authorization).toMatch(/^(Authorization wants|the JWT is not signed)/)
    }
  })

  test('a_token_that_is_old_of_tomorrow_expired_or_without_a_time_is_refused', () => {
    const seconds = NOW / 1000
    expect(refusalOf(`Bearer ${jwt({ ...CLAIMS, iat: seconds - 300 })}`)).toBeUndefined()
    for (const times of [
      { iat: seconds - 301 },
      { iat: seconds + 301 },
      { iat: undefined },
      { iat: 'soon' },
      { iat: null },
      { exp: seconds },
      { exp: seconds - 1 },
    ]) {
      expect(refusalOf(`Bearer ${jwt({ ...CLAIMS, ...times })}`), JSON.stringify(times)).toMatch(
        /^the JWT (is not of the last|has expired)/,
      )
    }
  })

  test('a_body_changed_by_one_byte_or_a_token_that_signs_no_body_is_refused', () => {
    const token = `Bearer ${jwt(CLAIMS)}`
    for (const body of [BODY.replace('ringing', 'rinking'), `${BODY} `, '', BODY.slice(0, -1)]) {
      expect(refusalOf(token, { body }), body).toMatch(/^payload_hash/)
    }
    for (const payload_hash of [undefined, '', null, sha256(BODY).toUpperCase(), sha256('')]) {
      expect(refusalOf(`Bearer ${jwt({ ...CLAIMS, payload_hash })}`)).toMatch(/^payload_hash/)
    }
  })

  test('of_a_GET_it_is_the_parameters_that_are_signed', () => {
    const query = 'uuid=leg-1&conversation_uuid=CON-1&status=ringing'
    const get = { method: 'GET', query, body: '' }
    expect(refusalOf(`Bearer ${jwt({ ...CLAIMS, payload_hash: sha256('') })}`, get)).toMatch(/^payload_hash/)
    const payload_hash = sha256('{"uuid":"leg-1","conversation_uuid":"CON-1","status":"ringing"}')
    expect(refusalOf(`Bearer ${jwt({ ...CLAIMS, payload_hash })}`, get)).toBeUndefined()
    expect(refusalOf(`Bearer ${jwt({ ...CLAIMS, payload_hash })}`, { ...get, query: `${query}&to=1` })).toMatch(
      /^payload_hash/,
    )
    const twice = `status=completed&${query}`
    const hashOfLast = sha256('{"status":"ringing","uuid":"leg-1","conversation_uuid":"CON-1"}')
    expect(refusalOf(`Bearer ${jwt({ ...CLAIMS, payload_hash: hashOfLast })}`, { ...get, query: twice })).toMatch(
      /^payload_hash/,
    )
  })

  test('without_a_secret_there_is_nothing_to_verify', () => {
    expect(createVonage(readConfig({})).verify).toBeUndefined()
  })
})

const translate = (payload: JsonObject) => provider.toEvents({ payload } as ReadRequest) as Translation
const LEG = { uuid: 'leg', conversation_uuid: 'CON', from: '1', to: '2', direction: 'outbound' }

describe('translation', () => {
  test('an_outbound_leg_that_reaches_nobody_counts_only_while_nobody_has_answered', () => {
    for (const status of ['started', 'ringing', 'busy', 'cancelled', 'failed', 'rejected', 'timeout', 'unanswered']) {
      const { events, unlessAnswered } = translate({ ...LEG, status })
      expect(
        events.map(({ type }) => type),
        status,
      ).toEqual(['call.started', 'call.data'])
      expect(unlessAnswered?.[0]).toMatchObject({ type: 'call.status', call_sid: 'CON' })
    }
    for (const leg of [{ status: 'answered' }, { status: 'completed' }, { direction: 'inbound', status: 'busy' }]) {
      expect(translate({ ...LEG, ...leg }).unlessAnswered, JSON.stringify(leg)).toBeUndefined()
    }
  })

  test('the_leg_of_a_bots_WebSocket_says_nothing_of_the_call', () => {
    for (const status of ['started', 'answered', 'completed', 'failed', 'disconnected']) {
      const { events, unlessAnswered } = translate({ ...LEG, to: 'wss://bot.example.com/', status })
      expect([events.map(({ type }) => type), unlessAnswered], status).toEqual([['call.data'], undefined])
    }
  })

  test('a_retry_has_the_same_keys_and_another_event_has_others', () => {
    const ids = (payload: JsonObject) => translate(payload).events.map(({ id }) => id)
    expect(ids({ ...LEG, status: 'answered' })).toEqual(ids({ status: 'answered', ...LEG }))
    expect(ids({ ...LEG, status: 'answered' })).not.toEqual(ids({ ...LEG, status: 'completed' }))
  })

  test('who_names_no_conversation_is_of_the_leg_and_who_names_nothing_is_refused', () => {
    expect(translate({ uuid: 'leg', reason: 'no NCCO' }).events).toMatchObject([{ type: 'call.data', call_sid: 'leg' }])
    expect(translate({ call_uuid: 'leg', status: 'human' }).events.at(-1)).toMatchObject({
      call_sid: 'leg',
      status: 'in-progress',
    })
    expect(provider.toEvents({ payload: { status: 'answered' } } as unknown as ReadRequest)).toEqual(
      new Refusal('missing_field', expect.stringContaining('conversation_uuid'), 'conversation_uuid'),
    )
  })

  test('names_that_every_object_has_are_no_statuses', () => {
    expect(translate({ ...LEG, status: 'constructor' }).events.at(-1)).toMatchObject({
      type: 'call.data',
      meta: { status: 'constructor' },
    })
  })
})
