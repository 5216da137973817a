/** `calltape export`: a call for others. A vCon is judged by a schema written from draft-ietf-vcon-vcon-core-04. Needs a built dist/. */
import { mkdtemp, readFile, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest'
import { z } from 'zod'
import { type ExportedCall, readCall } from '../cli/export/call.js'
import { asText } from '../cli/export/text.js'
import { asVcon } from '../cli/export/vcon.js'
import type { CallEvent } from '../shared/events.js'
import { Calls, ended, newSid } from './support/calls.js'
import { calltape } from './support/program.js'
import { Producer, turn } from './support/streams.js'

let calls: Calls
beforeAll(async () => {
  calls = await Calls.start()
})
afterAll(() => calls.stack.end())

const environment = () => ({ REDIS_URL: calls.stack.redis.url, DATABASE_URL: calls.stack.database.url })
const run = (...args: string[]) => calltape(['export', ...args], environment())
const read = async (sid: string) => (await readCall(calls.stack.database.pool, 0, sid))!

const date = z.iso.datetime({ offset: true })
const index = z.int().min(0)
const party = z.looseObject({ tel: z.string().optional(), sip: z.string().optional(), name: z.string().optional() })
const content = { body: z.string(), encoding: z.enum(['base64url', 'none']), mediatype: z.string().min(1) }
const common = { start: date.optional(), parties: z.array(index).optional(), duration: z.number().min(0).optional() }
/** Section 4.3.1.6: which parameters a type must have, and which it must not. */
const dialog = z.discriminatedUnion('type', [
  z.strictObject({
    type: z.literal('text'),
    ...common,
    ...content,
    message_id: z.string(),
    application: z.string().optional(),
  }),
  z.strictObject({
    type: z.literal('incomplete'),
    ...common,
    disposition: z.enum(['no-answer', 'congestion', 'failed', 'busy', 'hung-up', 'voicemail-no-message']),
  }),
])
const analysis = z.strictObject({
  type: z.string(),
  dialog: z.array(index),
  mediatype: z.string(),
  vendor: z.string(),
  schema: z.string(),
  body: z.unknown(),
  encoding: z.enum(['base64url', 'json', 'none']),
})
const vconSchema = z
  .strictObject({
    vcon: z.literal('0.4.0'),
    uuid: z.uuid({ version: 'v8' }),
    extensions: z.array(z.string()),
    created_at: date,
    updated_at: date.optional(),
    subject: z.string(),
    parties: z.array(party),
    dialog: z.array(dialog),
    analysis: z.array(analysis),
  })
  .superRefine((vcon, context) => {
    const used = vcon.dialog.flatMap((each) => each.parties ?? [])
    if (used.some((each) => each >= vcon.parties.length)) context.addIssue('a party that is none')
    if (vcon.analysis.some((each) => each.dialog.some((i) => i >= vcon.dialog.length)))
      context.addIssue('a dialog that is none')
    if (vcon.parties.some((each) => 'role' in each) && !vcon.extensions.includes('CC'))
      context.addIssue('role is of CC')
  })

/** As whoever reads the file gets it. */
const vconOf = (call: ExportedCall) => vconSchema.parse(JSON.parse(JSON.stringify(asVcon(call))))

/** Seven languages, an interruption, missing times, numbers out of order, what PostgreSQL cannot hold. */
function conversation(sid: string): CallEvent[] {
  const at = Date.UTC(2026, 5, 16, 8, 53, 25, 123)
  const said = (seq: number, speaker: string, text: string, more: object = {}): CallEvent => {
    return { ...turn(sid, seq, text), speaker, ts: at + seq * 65_000, ...more }
  }
  return [
    {
      type: 'call.started',
      call_sid: sid,
      ts: at,
      direction: 'inbound',
      from: '+919876543210',
      to: 'sip:bot@example.com',
      provider: 'exotel',
    },
    said(1, 'customer', 'नमस्ते, क्या आप सुन रहे हैं?', {
      language: 'hi',
      confidence: 0.97,
      started_at: at + 66_000,
      ended_at: at + 68_500,
    }),
    said(0, 'agent', 'வணக்கம்!\nHow may I help?', { language: 'ta', interrupted: true }),
    said(2, 'system', 'transferred: 你好 👋🏽'),
    said(3, 'customer', 'NUL \0 and a lone \ud800 surrogate, \u001b[31mred', { meta: { mood: 'fine' } }),
    said(4, 'supervisor', 'مرحبا'),
    { type: 'call.data', call_sid: sid, ts: at + 1, data: { budget: 5 }, objections: ['price'] },
    { ...ended(sid, 5), ts: at + 400_000, recording_url: 'https://example.com/r.mp3' } as CallEvent,
  ]
}

test('json_has_the_row_the_turns_in_call_order_and_the_events', async () => {
  const sid = newSid()
  await calls.storeSettled(...conversation(sid))
  const { code, out, err } = await run(sid, '--format', 'json')
  expect({ code, err }).toEqual({ code: 0, err: '' })
  const given = JSON.parse(out) as ExportedCall & { format: string; call: Record<string, unknown> }
  expect(given).toMatchObject({ format: 'calltape-call-1', call_sid: sid, quarantined: 0 })
  expect(given.call).toMatchObject({
    direction: 'inbound',
    turn_count: 5,
    complete: true,
    initiated_at: '2026-06-16T08:53:25.123Z',
  })
  expect(given.call).not.toHaveProperty('full_transcript')
  const transcript = (await calls.session(sid))!.full_transcript as { text: string; seq: number }[]
  expect(given.turns.map(({ seq, text }) => ({ seq, text }))).toEqual(
    transcript.map(({ seq, text }) => ({ seq, text })),
  )
  expect(given.turns[3]!.meta).toMatchObject({ mood: 'fine', calltape_replaced: true })
  expect(given.events.map(({ type }) => type)).toEqual(['call.started', 'call.data', 'call.ended'])
})

test('turns_without_numbers_and_those_that_start_over_are_in_the_order_of_the_transcript', async () => {
  for (const mark of [undefined, 'GT']) {
    const sid = newSid()
    const marks: CallEvent[] = mark
      ? ['GT1', 'GT2'].map((of) => ({ type: 'call.data', call_sid: sid, id: of, meta: { sequence: { of, at: 9 } } }))
      : []
    const keyless = (text: string, ts: number): CallEvent => ({
      type: 'turn',
      call_sid: sid,
      speaker: 'agent',
      text,
      ts,
    })
    const numbered = (seq: number, ts: number): CallEvent => ({ ...turn(sid, seq), id: `${seq}-${ts}`, ts })
    await calls.storeSettled(
      ...marks,
      numbered(2, 1000),
      keyless('b', 900),
      numbered(1, 2000),
      keyless('a', 1500),
      numbered(1, 500),
      keyless('a again', 1500),
      ended(sid),
    )
    const transcript = (await calls.session(sid))!.full_transcript as { text: string }[]
    expect((await read(sid)).turns.map(({ text }) => text)).toEqual(transcript.map(({ text }) => text))
  }
})

test('a_vcon_is_one_by_the_draft_and_has_every_turn', async () => {
  const sid = newSid()
  await calls.storeSettled(...conversation(sid))
  const call = await read(sid)
  const vcon = vconOf(call)
  expect(vcon.parties).toEqual([
    { tel: '+919876543210', role: 'customer' },
    { sip: 'sip:bot@example.com', role: 'agent' },
    { name: 'system', validation: 'none' },
    { name: 'supervisor', validation: 'none' },
  ])
  expect(vcon.dialog.map((each) => each.parties)).toEqual([[1], [0], [2], [0], [3]])
  expect(vcon.dialog.map((each) => (each.type === 'text' ? each.body : ''))).toEqual(call.turns.map(({ text }) => text))
  expect(vcon.dialog[1]).toMatchObject({
    start: '2026-06-16T08:54:31.123Z',
    duration: 2.5,
    application: 'exotel',
    message_id: '1',
  })
  expect(vcon.dialog[0]).not.toHaveProperty('duration')
  expect(vcon.created_at).toBe('2026-06-16T08:53:25.123Z')
  expect(vcon.analysis[0]!.body).toMatchObject({
    call: { recording_url: 'https://example.com/r.mp3', collected_data: { budget: 5 } },
  })
})

test('the_same_call_gives_the_same_bytes_and_another_call_another_uuid', async () => {
  const [sid, other] = [newSid(), newSid()]
  await calls.storeSettled(...conversation(sid), ...conversation(other))
  const [first, second] = [await run(sid, '--format', 'vcon'), await run(sid, '--format', 'vcon')]
  expect(first.out).toBe(second.out)
  expect(vconOf(await read(other)).uuid).not.toBe(vconOf(await read(sid)).uuid)
  expect(vconOf({ call_sid: 'a call', call: null, turns: [], events: [], quarantined: 0 }).uuid).toBe(
    'a0beda68-8f3d-82b0-a4d5-a0ae24c1381f',
  )
})

test('a_call_without_turns_is_a_vcon_too_and_says_why_nobody_spoke', async () => {
  const [busy, silent, gone] = [newSid(), newSid(), newSid()]
  await calls.storeSettled(
    { type: 'call.started', call_sid: busy, direction: 'outbound', from: '+14155550100', to: '+919876543210' },
    { type: 'call.status', call_sid: busy, status: 'busy' },
    ended(busy),
    ended(silent),
    { type: 'call.status', call_sid: gone, status: 'canceled' },
    ended(gone),
  )
  const vcon = vconOf(await read(busy))
  expect(vcon.dialog).toEqual([{ type: 'incomplete', start: vcon.created_at, parties: [0, 1], disposition: 'busy' }])
  expect(vcon.parties.map((each) => each.role)).toEqual(['agent', 'customer'])
  expect(vconOf(await read(silent))).toMatchObject({ parties: [], dialog: [] })
  expect(vconOf(await read(gone)).dialog).toMatchObject([{ type: 'incomplete', disposition: 'no-answer' }])
  expect(asText(await read(silent))).toMatch(/\n\nno turns\n$/)
})

test('text_is_readable_and_no_turn_looks_like_two', async () => {
  const sid = newSid()
  await calls.storeSettled(...conversation(sid))
  const text = asText(await read(sid))
  expect(text).toContain(`call ${sid}\n\n  provider                exotel\n`)
  expect(text).toContain(
    '\n[00:00] agent: வணக்கம்!\n  How may I help? [interrupted]\n[01:05] customer: नमस्ते, क्या आप सुन रहे हैं?\n',
  )
  expect(text).toContain('\n[03:15] customer: NUL \uFFFD and a lone \uFFFD surrogate, \uFFFD[31mred\n')
  expect(text.match(/^\[/gm)).toHaveLength(5)
})

test('what_is_missing_is_said_on_standard_error_and_the_file_is_for_its_owner_alone', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'calltape-test-export-'))
  onTestFinished(() => rm(folder, { recursive: true, force: true }))
  const [sid, out] = [newSid(), join(folder, 'call.json')]
  await calls.storeSettled(turn(sid, 0))
  await calls.foreign(sid, [['e', '{']])
  await calls.settled(sid)
  const live = await run(sid, '--format', 'json', '--out', out)
  expect(live).toMatchObject({ code: 0, out: '' })
  expect(live.err).toMatch(/is live.*\n.*1 in quarantine, not in the export/)
  expect(JSON.parse(await readFile(out, 'utf8'))).toMatchObject({ quarantined: 1, turns: [{ text: 'turn 0' }] })
  expect((await stat(out)).mode & 0o777).toBe(0o600)
})

test('a_call_that_nobody_knows_or_that_only_Redis_knows_is_told_apart', async () => {
  const [nobody, waiting] = [newSid(), newSid()]
  const unknown = await run(nobody, '--format', 'text')
  expect(unknown).toMatchObject({
    code: 2,
    out: '',
    err: expect.stringContaining(`nothing is known of call ${nobody}`),
  })
  await calls.stop()
  await new Producer(calls.stack.redis).store(turn(waiting, 0))
  expect(await run(waiting, '--format', 'text')).toMatchObject({
    code: 2,
    err: expect.stringContaining('is in Redis, and not in'),
  })
  expect(await run(waiting, '--format', 'xml')).toMatchObject({
    code: 2,
    err: expect.stringContaining('--format wants'),
  })
})
