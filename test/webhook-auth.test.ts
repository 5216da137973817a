/** Who is not the provider, or has changed what it sent, is refused, and nothing of it is stored. */

import { createHash, createHmac, generateKeyPairSync, sign } from 'node:crypto'
import { once } from 'node:events'
import { connect } from 'node:net'
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from 'vitest'
import { WebSocket } from 'ws'
import { type RequestFixture, sendRequest } from './support/fixtures.js'
import { testIngest } from './support/ingest.js'
import { startTestStack, type TestStack, until } from './support/stores.js'
import { twilioSignature } from './support/twilio.js'

const telnyxKeys = generateKeyPairSync('ed25519')

const SECRETS = {
  VONAGE_SIGNATURE_SECRET: 'vonage-next,vonage-secret',
  JAMBONZ_SECRET: 'jambonz-next,jambonz-secret',
  EXOTEL_SECRET: 'exotel/secret,exotel-next,bot:pa55 word',
  TWILIO_AUTH_TOKEN: 'twilio-token,twilio-next-token',
  VAPI_SECRET: 'vapi-secret',
  RETELL_API_KEY: 'retell-key',
  ELEVENLABS_SECRET: 'elevenlabs-secret',
  TELNYX_PUBLIC_KEY: telnyxKeys.publicKey.export({ type: 'spki', format: 'der' }).subarray(-32).toString('base64'),
  PLIVO_AUTH_TOKEN: 'plivo-token',
}

let stack: TestStack
beforeAll(async () => {
  stack = await startTestStack(SECRETS)
})
afterAll(async () => await stack.end())

const send = (request: RequestFixture) => sendRequest(stack.ingest.url, request)
const isStored = async (callSid: string) => (await fetch(`${stack.ingest.url}/v1/calls/${callSid}`)).status === 200

async function expectRefused(request: RequestFixture, callSid: string, status = 403): Promise<void> {
  const response = await send(request)
  expect(response.status, await response.text()).toBe(status)
  expect(await isStored(callSid)).toBe(false)
}

async function expectTaken(request: RequestFixture, callSid: string): Promise<void> {
  const response = await send(request)
  expect(response.status, await response.text()).toBeLessThan(300)
  expect(await isStored(callSid)).toBe(true)
}

/** @returns the status by which the handshake of a WebSocket was answered: 101 when it was opened */
async function handshake(path: string, headers: Record<string, string>): Promise<number> {
  const socket = new WebSocket(stack.wsUrl + path, { headers, perMessageDeflate: false })
  return await new Promise((resolve, reject) => {
    socket.once('open', () => {
      socket.close(1000)
      resolve(101)
    })
    socket.once('unexpected-response', (request, response) => {
      request.destroy()
      resolve(response.statusCode ?? 0)
    })
    socket.once('error', reject)
  })
}

describe('twilio', () => {
  const path = '/webhooks/twilio/voice?tenant=it%27s+acme'
  const formOf = (callSid: string) => ({ CallSid: callSid, CallStatus: 'ringing', From: '+1 415', CallerName: 'Zoë' })
  const signed = (form: Record<string, string>, at = path, token = 'twilio-token') => ({
    'X-Twilio-Signature': twilioSignature(token, stack.ingest.url + at, form),
  })

  test.each(['twilio-token', 'twilio-next-token'])('a_form_signed_with_%s_is_taken', async (token) => {
    const form = formOf(`CA-signed-${token}`)
    await expectTaken({ path, form, headers: signed(form, path, token) }, form.CallSid)
  })

  test('without_its_signature_or_with_a_wrong_one_it_is_refused', async () => {
    const form = formOf('CA-unsigned')
    await expectRefused({ path, form }, form.CallSid)
    await expectRefused({ path, form, headers: { 'X-Twilio-Signature': 'GvWf1cFY/Q7PnoempGyD5oXAezc=' } }, form.CallSid)
    await expectRefused({ path, form, headers: signed(form, path, 'another token') }, form.CallSid)
    await expectRefused({ path, form, headers: { Authorization: 'Bearer twilio-token' } }, form.CallSid)
  })

  test('a_form_changed_by_one_byte_or_sent_elsewhere_is_refused', async () => {
    const form = formOf('CA-changed')
    const headers = signed(form)
    await expectRefused({ path, form: { ...form, CallStatus: 'rinking' }, headers }, form.CallSid)
    await expectRefused({ path, form: { ...form, More: '' }, headers }, form.CallSid)
    await expectRefused({ path: path.replace('acme', 'acmf'), form, headers }, form.CallSid)
    await expectRefused({ path: path.replace('voice', 'recording'), form, headers }, form.CallSid)
    await expectTaken({ path, form, headers }, form.CallSid)
  })

  test('a_get_is_signed_with_its_query', async () => {
    const at = '/webhooks/twilio/voice?CallSid=CA-get&CallStatus=ringing'
    await expectRefused({ method: 'GET', path: `${at}x`, headers: signed({}, at) }, 'CA-get')
    await expectTaken({ method: 'GET', path: at, headers: signed({}, at) }, 'CA-get')
  })

  test('of_json_the_url_carries_the_digest', async () => {
    const body = '{"CallSid":"CA-json","CallStatus":"ringing"}'
    const at = `/webhooks/twilio/voice?bodySHA256=${createHash('sha256').update(body).digest('hex')}`
    const headers = { ...signed({}, at), 'Content-Type': 'application/json' }
    await expectRefused({ path: at, text: body.replace('ringing', 'ringinh'), headers }, 'CA-json')
    await expectTaken({ path: at, text: body, headers }, 'CA-json')
  })

  test('a_body_that_its_signature_does_not_cover_is_refused', async () => {
    // Signed for a GET, or for a form without a body: sent again with a body of somebody else's.
    const at = '/webhooks/twilio/voice'
    const json = { CallSid: 'CA-uncovered', CallStatus: 'completed' }
    await expectRefused({ path: at, json, headers: signed({}, at) }, json.CallSid)
    await expectRefused({ path: at, multipart: json, headers: signed({}, at) }, json.CallSid)
    await expectRefused({ path: at, form: json, headers: signed({}, at) }, json.CallSid)
  })

  test('a_websocket_is_opened_only_with_the_signature_of_its_url', async () => {
    const at = '/streams/twilio'
    expect(await handshake(at, {})).toBe(403)
    expect(await handshake(at, { 'X-Twilio-Signature': twilioSignature('wrong', stack.wsUrl + at) })).toBe(403)
    for (const url of [stack.wsUrl + at, `${stack.wsUrl + at}/`, stack.ingest.url + at]) {
      expect(await handshake(at, { 'X-Twilio-Signature': twilioSignature('twilio-token', url) }), url).toBe(101)
    }
  })
})

describe('exotel', () => {
  const status = (callSid: string) => ({ CallSid: callSid, Status: 'completed', DateUpdated: '2024-01-15 14:30:45' })
  const basic = (credentials: string) => ({ Authorization: `Basic ${Buffer.from(credentials).toString('base64')}` })
  const path = '/webhooks/exotel/status'

  test.each([
    ['a-secret-in-the-path', `${path}/exotel%2Fsecret`, {}],
    ['another-one', `${path}/exotel-next`, {}],
    ['a-password', path, basic('anybody:exotel/secret')],
    ['user-and-password', path, basic('bot:pa55 word')],
    ['a-password-beside-another-path', `${path}/of-another`, basic('x:exotel-next')],
  ])('%s_lets_in', async (name, at, headers) => {
    await expectTaken({ path: at, json: status(`EX-${name}`), headers }, `EX-${name}`)
    const query = `?CallSid=EX-passthru-${name}`
    const passthru = at.replace('status', 'passthru') + query
    await expectTaken({ method: 'GET', path: passthru, headers }, `EX-passthru-${name}`)
    expect(await handshake(at.replace(path, '/streams/exotel'), headers)).toBe(101)
  })

  test.each([
    [401, 'nothing', path, {}],
    [401, 'a-wrong-password', path, basic('anybody:wrong')],
    [401, 'the-password-of-another-user', path, basic('x:pa55 word')],
    [401, 'a-secret-as-a-user', path, basic('exotel-next:')],
    [401, 'a-token', path, { Authorization: 'Bearer exotel-next' }],
    [403, 'a-wrong-path', `${path}/exotel-nex`, {}],
    [403, 'a-password-as-a-path', `${path}/pa55%20word`, {}],
  ])('%s_for_%s', async (code, name, at, headers) => {
    const sid = `EX-refused-${name}`
    await expectRefused({ path: at, json: status(sid), headers }, sid, code)
    await expectRefused(
      { method: 'GET', path: `${at.replace('status', 'passthru')}?CallSid=${sid}`, headers },
      sid,
      code,
    )
    expect(await handshake(at.replace(path, '/streams/exotel'), headers)).toBe(code)
  })

  test('who_gave_no_credentials_is_asked_for_them', async () => {
    const response = await send({ path, json: status('EX-asked') })
    expect(response.headers.get('www-authenticate')).toBe('Basic realm="calltape"')
  })

  test('no_answer_repeats_a_secret', async () => {
    const wrongPlaces = [
      '/webhooks/exotel/state/exotel-next',
      '/webhooks/other/exotel-next',
      '/webhooks/exotel/exotel-next',
    ]
    const requests: RequestFixture[] = wrongPlaces.map((at) => ({ path: at, json: {} }))
    requests.push({ method: 'GET', path: '/streams/exotel/exotel-next' }, { path: `${path}/exotel-next`, json: {} })
    for (const request of requests) {
      const response = await send(request)
      expect(response.status, request.path).toBeGreaterThanOrEqual(400)
      expect(await response.text()).not.toContain('exotel-next')
    }
    expect(await handshake('/streams/other/exotel-next', {})).toBe(404)
  })
})

describe('vonage', () => {
  const path = '/webhooks/vonage'
  const bodyOf = (callSid: string) => JSON.stringify({ conversation_uuid: callSid, uuid: 'leg', status: 'answered' })
  const sha256 = (text: string) => createHash('sha256').update(text).digest('hex')

  function token(signedText: string, { secret = 'vonage-secret', ageSeconds = 0, alg = 'HS256' } = {}): string {
    const claims = { iat: Math.floor(Date.now() / 1000) - ageSeconds, payload_hash: sha256(signedText) }
    const signed = [{ alg, typ: 'JWT' }, claims]
      .map((part) => Buffer.from(JSON.stringify(part)).toString('base64url'))
      .join('.')
    return `Bearer ${signed}.${createHmac('sha256', secret).update(signed).digest('base64url')}`
  }

  function request(text: string, authorization?: string): RequestFixture {
    const headers = { 'Content-Type': 'application/json', ...(authorization && { Authorization: authorization }) }
    return { path, text, headers }
  }

  test.each(['vonage-secret', 'vonage-next'])('a_body_signed_with_%s_is_taken', async (secret) => {
    const body = bodyOf(`CON-${secret}`)
    await expectTaken(request(body, token(body, { secret })), `CON-${secret}`)
  })

  test('a_GET_whose_parameters_are_signed_is_taken_and_with_others_refused', async () => {
    const query = 'conversation_uuid=CON-get&status=answered'
    const headers = { Authorization: token('{"conversation_uuid":"CON-get","status":"answered"}') }
    await expectRefused({ method: 'GET', path: `${path}?${query}&from=1`, headers }, 'CON-get')
    await expectTaken({ method: 'GET', path: `${path}?${query}`, headers }, 'CON-get')
  })

  test('without_its_token_with_a_wrong_one_or_an_old_one_it_is_refused', async () => {
    const body = bodyOf('CON-wrong')
    await expectRefused(request(body), 'CON-wrong')
    await expectRefused(request(body, 'Bearer vonage-secret'), 'CON-wrong')
    await expectRefused(request(body, token(body, { secret: 'another' })), 'CON-wrong')
    await expectRefused(request(body, token(body, { alg: 'none' })), 'CON-wrong')
    await expectRefused(request(body, token(body, { ageSeconds: 310 })), 'CON-wrong')
    await expectRefused(request(body, token(body, { ageSeconds: -310 })), 'CON-wrong')
  })

  test('a_body_changed_by_one_byte_is_refused', async () => {
    const body = bodyOf('CON-changed')
    await expectRefused(request(body.replace('answered', 'answereb'), token(body)), 'CON-changed')
    await expectRefused(request(`${body} `, token(body)), 'CON-changed')
    await expectTaken(request(body, token(body)), 'CON-changed')
  })
})

describe('INGEST_TOKENS', () => {
  test('guard_what_has_no_signature_and_open_nothing_that_has_one', async () => {
    const ingest = await testIngest({
      REDIS_URL: stack.redis.url,
      INGEST_TOKENS: 'a-token',
      VONAGE_SIGNATURE_SECRET: 'vonage-secret',
    })
    const answerOf = async (path: string, headers = {}) => {
      const json = { type: 'close', event: 'on_pipeline_finished', call_sid: 'tokens', conversation_uuid: 'tokens' }
      return (await sendRequest(ingest.url, { path, json, headers })).status
    }
    const withToken = { Authorization: 'Bearer a-token' }
    for (const path of ['/webhooks/livekit', '/webhooks/pipecat', '/webhooks/jambonz']) {
      expect(await answerOf(path), path).toBe(401)
      expect(await answerOf(path, { Authorization: 'Bearer a-toke' }), path).toBe(401)
      expect(await answerOf(`${path}?token=a-token`), path).toBe(401)
    }
    expect(await answerOf('/webhooks/vonage', withToken)).toBe(403)
    expect(await isStored('tokens')).toBe(false)
    for (const path of ['/webhooks/livekit', '/webhooks/pipecat', '/webhooks/jambonz']) {
      expect(await answerOf(path, withToken), path).toBe(200)
    }
    expect(await isStored('tokens')).toBe(true)
  })
})

const hmacOf = (secret: string, ...signed: string[]) =>
  createHmac('sha256', secret).update(signed.join('')).digest('hex')
const nowSeconds = () => Math.floor(Date.now() / 1000)

/** Providers that sign the body as it stands, and the time; Vapi just shows its secret. */
const SIGNERS = [
  {
    provider: 'vapi',
    bodyOf: (callSid: string) => ({ message: { type: 'hang', call: { id: callSid } } }),
    headersAt: (_body: string, _seconds: number) => ({ 'X-Vapi-Secret': 'vapi-secret' }),
    wrong: { 'X-Vapi-Secret': 'vapi-secreT' },
  },
  {
    provider: 'jambonz',
    bodyOf: (callSid: string) => ({ call_sid: callSid, call_status: 'ringing' }),
    headersAt: (body: string, seconds: number) => ({
      'Jambonz-Signature': `t=${seconds},v1=${hmacOf('jambonz-secret', `${seconds}.`, body)}`,
    }),
    wrong: { 'Jambonz-Signature': `t=${nowSeconds()},v1=${'0'.repeat(64)}` },
    staleSeconds: 6 * 60,
  },
  {
    provider: 'retell',
    bodyOf: (callSid: string) => ({ event: 'call_started', call: { call_id: callSid } }),
    headersAt: (body: string, seconds: number) => ({
      'X-Retell-Signature': `v=${seconds * 1000},d=${hmacOf('retell-key', body, String(seconds * 1000))}`,
    }),
    wrong: { 'X-Retell-Signature': `v=${Date.now()},d=${'0'.repeat(64)}` },
    staleSeconds: 6 * 60,
  },
  {
    provider: 'elevenlabs',
    bodyOf: (callSid: string) => ({ type: 'post_call_transcription', data: { conversation_id: callSid } }),
    headersAt: (body: string, seconds: number) => ({
      'ElevenLabs-Signature': `t=${seconds},v0=${hmacOf('elevenlabs-secret', `${seconds}.`, body)}`,
    }),
    wrong: { 'ElevenLabs-Signature': `t=${nowSeconds()},v0=${'0'.repeat(64)}` },
    staleSeconds: 31 * 60,
  },
  {
    provider: 'telnyx',
    bodyOf: (callSid: string) => ({
      data: { event_type: 'call.answered', id: 'e-1', payload: { call_session_id: callSid } },
    }),
    headersAt: (body: string, seconds: number) => ({
      'Telnyx-Timestamp': String(seconds),
      'Telnyx-Signature-Ed25519': sign(null, Buffer.from(`${seconds}|${body}`), telnyxKeys.privateKey).toString(
        'base64',
      ),
    }),
    wrong: { 'Telnyx-Timestamp': String(nowSeconds()), 'Telnyx-Signature-Ed25519': 'bm90aGluZw==' },
    staleSeconds: 6 * 60,
  },
].map((signer) => ({
  ...signer,
  request: (text: string, headers: Record<string, string>): RequestFixture => ({
    path: `/webhooks/${signer.provider}`,
    text,
    headers: { ...headers, 'Content-Type': 'application/json' },
  }),
}))

describe.each(SIGNERS)('$provider', ({ provider, bodyOf, headersAt, wrong, request }) => {
  test('a_signed_body_is_taken', async () => {
    const callSid = `${provider}-signed`
    const body = JSON.stringify(bodyOf(callSid))
    await expectTaken(request(body, headersAt(body, nowSeconds())), callSid)
  })

  test('without_its_header_or_with_a_wrong_one_it_is_refused', async () => {
    const callSid = `${provider}-unsigned`
    const body = JSON.stringify(bodyOf(callSid))
    await expectRefused(request(body, {}), callSid)
    await expectRefused(request(body, { ...wrong }), callSid)
    const { [Object.keys(wrong).at(-1)!]: _, ...rest } = headersAt(body, nowSeconds()) as Record<string, string>
    await expectRefused(request(body, rest), callSid)
  })
})

describe.each(SIGNERS.filter(({ staleSeconds }) => staleSeconds))(
  '$provider',
  ({ provider, bodyOf, headersAt, staleSeconds = 0, request }) => {
    test('a_body_changed_by_one_byte_is_refused', async () => {
      const callSid = `${provider}-changed`
      const body = JSON.stringify(bodyOf(`${provider}-chanGed`))
      await expectRefused(request(body.replace('chanGed', 'changed'), headersAt(body, nowSeconds())), callSid)
      await expectRefused(request(`${body}\n`, headersAt(body, nowSeconds())), `${provider}-chanGed`)
    })

    test('an_old_one_sent_again_is_refused', async () => {
      const callSid = `${provider}-old`
      const body = JSON.stringify(bodyOf(callSid))
      await expectRefused(request(body, headersAt(body, nowSeconds() - staleSeconds)), callSid)
      await expectRefused(request(body, headersAt(body, nowSeconds() + staleSeconds)), callSid)
    })
  },
)

describe('plivo', () => {
  const path = '/webhooks/plivo'
  const formOf = (callSid: string) => ({ CallUUID: callSid, CallStatus: 'ringing', From: '1415 555' })
  const headersOf = (base: string, token = 'plivo-token') => ({
    'X-Plivo-Signature-V3': createHmac('sha256', token).update(`${base}.12345`).digest('base64'),
    'X-Plivo-Signature-V3-Nonce': '12345',
  })
  const signed = (form: Record<string, string>, token?: string) => {
    const fields = Object.entries(form).sort(([a], [b]) => (a < b ? -1 : 1))
    return headersOf(`${stack.ingest.url + path}?${fields.flat().join('')}`, token)
  }

  test('a_signed_form_and_a_signed_get_are_taken', async () => {
    const form = formOf('plivo-form')
    await expectTaken({ path, form, headers: signed(form) }, form.CallUUID)
    const at = `${path}?CallStatus=ringing&CallUUID=plivo-get`
    await expectTaken({ method: 'GET', path: at, headers: headersOf(stack.ingest.url + at) }, 'plivo-get')
  })

  test('without_its_headers_with_wrong_ones_or_changed_by_one_byte_it_is_refused', async () => {
    const form = formOf('plivo-unsigned')
    const right = signed(form)
    await expectRefused({ path, form }, form.CallUUID)
    await expectRefused({ path, form, headers: signed(form, 'another token') }, form.CallUUID)
    await expectRefused({ path, form, headers: { ...right, 'X-Plivo-Signature-V3-Nonce': '12346' } }, form.CallUUID)
    await expectRefused({ path, form: { ...form, CallStatus: 'rinking' }, headers: right }, form.CallUUID)
    await expectRefused({ path: `${path}?x=y`, form, headers: right }, form.CallUUID)
  })

  test('json_put_to_the_signature_of_a_get_is_refused', async () => {
    const headers = headersOf(stack.ingest.url + path)
    await expectRefused({ path, json: formOf('plivo-json'), headers }, 'plivo-json')
    await expectRefused({ path, multipart: formOf('plivo-json'), headers }, 'plivo-json')
  })
})

test.each([
  ['/webhooks/nobody', 404],
  ['/webhooks/exotel/status/wrong', 403],
  ['/webhooks/exotel/status', 401],
  ['/webhooks/vapi', 403],
])('to_%s_nobody_sends_megabytes_before_he_is_turned_away', async (path, status) => {
  const socket = connect(Number(new URL(stack.ingest.url).port), '127.0.0.1')
  socket.write(
    `POST ${path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 16000000\r\n\r\n{`,
  )
  const [answer] = (await once(socket, 'data')) as [Buffer]
  socket.destroy()
  expect(answer.toString()).toContain(`HTTP/1.1 ${status} `)
})

test('bodies_that_nobody_has_verified_yet_are_bounded_together_and_forgotten_with_their_senders', async () => {
  const ingest = await testIngest({
    ...{ REDIS_URL: stack.redis.url, RETELL_API_KEY: 'key', MAX_QUEUE_BYTES: '1048576', MAX_BODY_BYTES: '1048576' },
  })
  const half = 600_000
  const send = () => {
    const socket = connect(Number(new URL(ingest.url).port), '127.0.0.1')
    onTestFinished(() => void socket.destroy())
    socket.write(
      `POST /webhooks/retell HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${half + 1}\r\n\r\n`,
    )
    socket.write(Buffer.alloc(half, ' '))
    return socket
  }
  const first = send()
  const second = send()
  const [answer, refused] = await Promise.race(
    [first, second].map(async (socket) => [...(await once(socket, 'data')), socket]),
  )
  expect(String(answer)).toContain('HTTP/1.1 503 ')
  const left = refused === first ? second : first
  left.destroy()
  const post = () => fetch(`${ingest.url}/webhooks/retell`, { method: 'POST', body: ' '.repeat(half) })
  await until('there is room again', async () => (await post()).status === 403)
})
