/** What a log line must not have in it, and what it must keep. */
import { describe, expect, test } from 'vitest'
import { createLog, describeCrash, describeError, withoutData } from './log.js'
import { maskCallSid, maskNumbers } from './phone-numbers.js'

describe('phone_numbers', () => {
  test.each([
    ['+919876543210', '+91••••••••10'],
    ['call +1 (415) 555-0100 again', 'call +14•••••••00 again'],
    ['%2B14155550100', '+14•••••••00'],
    ['0044 20 7946 0958', '+44••••••••58'],
    ['sip:+919876543210@pbx.example.com;transport=tls', 'sip:+91••••••••10@pbx.example.com;transport=tls'],
    ['sip:asha.rao@example.com', 'sip:•••@example.com'],
    ['sips:1234@10.0.0.1:5061', 'sips:••34@10.0.0.1:5061'],
    ['tel:98765-43210', 'tel:••••••••10'],
    ['from 98765 43210 to 020-7946-0958', 'from ••••••••10 to •••••••••58'],
    ['{"from":"09876543210","to":"14155550100"}', '{"from":"•••••••••10","to":"•••••••••00"}'],
    ['from_number=09876543210&To=07946095800', 'from_number=•••••••••10&To=•••••••••00'],
    ['no answer at 919876543210.', 'no answer at ••••••••••10.'],
    ['नंबर +919876543210 पर', 'नंबर +91••••••••10 पर'],
  ])('%s_is_masked', (text, masked) => {
    expect(maskNumbers(text)).toBe(masked)
    expect(maskNumbers(masked)).toBe(masked)
  })

  test.each([
    '1781600004000-0',
    '1781600004000',
    'from 1781600004000-0 to 1781600004999-12',
    'from 1781600004 to 1781600009',
    '2026-06-16T08:53:25.123456Z',
    'from 2026-01-31T09:00:00+05:30 to 2026-02-28',
    'Sun Nov 22 2026 21:15:24 GMT+0530 (India Standard Time)',
    'connect ECONNREFUSED 192.168.100.200:63790',
    'postgres://127.0.0.1:54320/calltape_test_86281fc0a1b2',
    '550e8400-e29b-41d4-a716-446655440000',
    'CA5f2d3e4b1234567890abcdef12345678',
    '/var/spool/000000000042-9f86d081.segment',
    'ct:{63}:call:CA-my-call',
    '1.25e+21 and 0.000012345678',
    'took 123456 ms, port 63790',
    'error 22P02',
  ])('%s_has_none', (text) => expect(maskNumbers(text)).toBe(text))

  test('call_sids_that_are_numbers_are_masked_and_still_told_apart', () => {
    const [a, b] = ['+919876543210', '+919876543310'].map(maskCallSid)
    expect(a).toMatch(/^\+91••••••••10#[0-9a-f]{4}$/)
    expect(b).not.toBe(a)
    expect(maskCallSid('+919876543210')).toBe(a)
    expect(maskCallSid('98765432')).toMatch(/^••••••32#[0-9a-f]{4}$/)
    expect(maskCallSid('bot-7:+919876543210')).toMatch(/^bot-7:\+91••••••••10#[0-9a-f]{4}$/)
    for (const sid of ['CA5f2d3e4b1234567890abcdef12345678', 'call-17', '550e8400-e29b-41d4-a716-446655440000'])
      expect(maskCallSid(sid)).toBe(sid)
  })
})

function lineOf(...given: unknown[]): Record<string, unknown> {
  const lines: string[] = []
  const log = createLog('test', 'trace', { write: (line) => lines.push(line) })
  ;(log.error as (...args: unknown[]) => void)(...given)
  expect(lines).toHaveLength(1)
  return JSON.parse(lines[0]!) as Record<string, unknown>
}

const SAID = 'my PIN is four-two'
/** As pg throws it. */
const ofPostgres = (code: string, message: string, more: object = {}) =>
  Object.assign(new Error(message), { severity: 'ERROR', routine: 'f', code, detail: SAID, where: undefined, ...more })

describe('a_line', () => {
  test('leaves_out_what_was_said_and_cuts_what_is_long', () => {
    const line = lineOf(
      {
        text: SAID,
        data: { pin: SAID },
        events: 7,
        deep: { deeper: { meta: [SAID] } },
        blob: Buffer.from(SAID),
        callSid: 'CA1',
      },
      'x'.repeat(10_000),
    )
    expect(JSON.stringify(line)).not.toContain('PIN')
    expect(line).toMatchObject({ events: 7, callSid: 'CA1', level: 50 })
    expect(JSON.stringify(line).length).toBeLessThan(1000)
  })

  test('masks_numbers_wherever_they_are', () => {
    const line = lineOf(
      { from: '98765', to_number: '+14155550100', a: ['+14155550100'], b: { c: '+14155550100' } },
      'to +14155550100',
    )
    expect(JSON.stringify(line)).not.toMatch(/98765|5550100/)
    expect(line.msg).toBe('to +14•••••••00')
    expect(JSON.stringify(lineOf('%s hung up', '+14155550100'))).not.toContain('5550100')
  })

  test('has_of_an_error_type_code_message_and_frames_alone', () => {
    const reply = Object.assign(new Error('ERR no'), {
      name: 'ReplyError',
      command: { name: 'xadd', args: ['k', SAID] },
    })
    expect(lineOf({ err: reply }, 'failed').err).toEqual({ type: 'Error', message: 'ERR no' })
    for (const given of [
      [new TypeError('no')],
      [new TypeError('no'), 'a message'],
      [{ err: new TypeError('no') }, 'a message'],
    ]) {
      expect(lineOf(...given).err).toEqual({
        type: 'TypeError',
        message: 'no',
        stack: expect.stringMatching(/^\s+at /),
      })
    }
  })

  test('has_of_a_reason_in_words_only_what_is_in_front_of_a_quotation', () => {
    expect(lineOf({ err: `invalid input syntax for type integer: "${SAID}"` }, 'x').err).toBe(
      'invalid input syntax for type integer: …',
    )
    expect(lineOf({ reason: 'new row for relation "calls" violates check constraint "rule_1"' }, 'x').reason).toBe(
      'new row for relation "calls" violates check constraint "rule_1"',
    )
    expect(lineOf({ err: "it can't be, and isn't" }, 'x').err).toBe("it can't be, and isn't")
  })
})

describe('an_error', () => {
  test.each([
    [
      'of_PostgreSQL_about_a_value',
      ofPostgres('22P02', `invalid input syntax for type json: "${SAID}"`),
      'error 22P02',
    ],
    [
      'that_a_trigger_raises',
      ofPostgres('40001', SAID, { where: 'PL/pgSQL function public.check_text() line 3 at RAISE' }),
      'error 40001 raised in public.check_text',
    ],
    [
      'of_SQL_that_a_function_made',
      ofPostgres('42601', SAID, { where: `SQL statement "SELECT ${SAID}"\nPL/pgSQL function f() line 1` }),
      'error 42601 raised in f',
    ],
    [
      'of_PostgreSQL_about_a_constraint',
      ofPostgres('23514', 'new row for relation "call_transcript_turns" violates check constraint "rule"'),
      'new row for relation "call_transcript_turns" violates check constraint "rule"',
    ],
    [
      'of_PostgreSQL_about_a_COPY',
      ofPostgres('53100', 'could not extend file "base/1/2": No space left on device', {
        where: `COPY t, line 1: "${SAID}"`,
      }),
      'could not extend file "base/1/2": No space left on device',
    ],
    [
      'of_the_system',
      Object.assign(new Error("ENOENT: no such file or directory, open '/spool/x'"), {
        syscall: 'open',
        code: 'ENOENT',
      }),
      "ENOENT: no such file or directory, open '/spool/x'",
    ],
    ['of_the_system_without_a_message', Object.assign(new Error(''), { code: 'ECONNREFUSED' }), 'ECONNREFUSED'],
    [
      'of_a_Redis_command',
      new Error(`ERR unknown command 'XFOO', with args beginning with: '${SAID}'`),
      'ERR unknown command …',
    ],
    ['of_Node_about_an_argument', new TypeError(`The "x" argument must be a string. Received ${SAID}`), 'The …'],
    [
      'that_passes_on_another',
      new Error(`LEGACY_CALL_SESSIONS: ${SAID}`, { cause: ofPostgres('22001', SAID) }),
      'LEGACY_CALL_SESSIONS: error 22001',
    ],
  ])('%s', (_what, error, message) => {
    expect(withoutData(error)).toBe(message)
    expect(JSON.stringify(describeError(error))).not.toContain('PIN')
  })

  test('of_JSON_that_is_malformed_quotes_none_of_it', () => {
    const error = (() => {
      try {
        return JSON.parse(SAID) as Error
      } catch (thrown) {
        return thrown as Error
      }
    })()
    expect(error.message).toContain('PIN') // Node itself does
    expect(JSON.stringify(describeError(error))).not.toContain('PIN')
  })

  test('that_ends_the_process_is_told_without_what_it_carries', () => {
    const error = Object.assign(new Error(`ERR ${'x'}`), { command: { args: [SAID] }, detail: SAID, code: 'E' })
    expect(describeCrash(error)).toMatch(/^Error E: ERR x\n\s+at /)
    expect(describeCrash(error)).not.toContain('PIN')
    expect(describeCrash(SAID)).toBe('string thrown that is no error')
  })
})
