/** What becomes of a call: the rules of `call_outcome`, row by row, and through the fold. Whether a sequence of numbers is whole. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type Database, freshDatabase } from './support/stores.js'

let database: Database
beforeAll(async () => {
  database = await freshDatabase()
})
afterAll(() => database.drop())

interface Facts {
  verdict?: string
  status?: string | null
  reason?: string | undefined
  answered?: boolean | null
  agentSpoke?: boolean | null
  customerSpoke?: boolean | null
}
type Case = [claim: string, facts: Facts, outcome: string | null]

/** A conversation that came to its end; what a case says is what is different. */
const TALKED: Facts = { status: 'completed', reason: 'hangup', answered: true, agentSpoke: true, customerSpoke: true }
/** Nobody took the call. */
const RANG: Facts = { status: 'completed', answered: false, agentSpoke: false, customerSpoke: false }
/** Somebody took the call, and nothing is known of what was said. */
const TAKEN: Facts = { ...RANG, answered: true }

async function outcome({
  verdict,
  status,
  reason,
  answered,
  agentSpoke,
  customerSpoke,
}: Facts): Promise<string | null> {
  const values = [verdict, status, reason, answered, agentSpoke, customerSpoke]
  const { rows } = await database.pool.query('SELECT call_outcome($1, $2, $3, $4, $5, $6) AS outcome', values)
  return rows[0].outcome
}

const cases: Case[] = [
  ["the bot's verdict wins over everything", { verdict: 'sold', status: 'failed', reason: 'voicemail' }, 'sold'],
  ["the bot's verdict wins over busy", { ...RANG, verdict: 'callback', status: 'busy' }, 'callback'],
  ["the bot's verdict is kept as it is", { ...RANG, verdict: 'Callback Requested ' }, 'Callback Requested '],
  ['an empty verdict is none', { ...TALKED, verdict: '' }, null],
  ['an empty verdict is none, of a call that nobody took', { ...RANG, verdict: '' }, 'no_answer'],
  ['a blank verdict is none', { ...TALKED, verdict: ' \t\n ', reason: 'disconnected' }, 'disconnected'],

  ['busy', { ...RANG, status: 'busy' }, 'no_answer'],
  ['no-answer, whatever the reason', { ...RANG, status: 'no-answer', reason: 'error' }, 'no_answer'],
  ['failed', { ...RANG, status: 'failed' }, 'error'],
  ['failed, whatever the reason, and although they talked', { ...TALKED, status: 'failed', reason: 'busy' }, 'error'],
  ['canceled before anybody spoke', { ...RANG, status: 'canceled' }, 'no_answer'],
  ['canceled while the agent spoke', { ...TALKED, status: 'canceled', customerSpoke: false }, 'no_answer'],
  ['canceled in the conversation', { ...TALKED, status: 'canceled' }, 'disconnected'],
  ['canceled wins over the reason', { ...TALKED, status: 'canceled', reason: 'error' }, 'disconnected'],

  ['canceled wins over a machine', { ...TALKED, status: 'canceled', reason: 'voicemail' }, 'disconnected'],

  ['voicemail, although it talked', { ...TALKED, reason: 'voicemail' }, 'no_answer'],
  ['voicemail wins over an error', { ...TALKED, reason: 'voicemail-detection-error' }, 'no_answer'],
  ['an error, although they talked', { ...TALKED, reason: 'error' }, 'error'],
  ['an error wins over a silent customer', { ...TALKED, customerSpoke: false, reason: 'db-error' }, 'error'],
  ['an error wins over a call that nobody took', { ...RANG, reason: 'dial_failed' }, 'error'],
  ['an error wins over a lost connection', { ...TALKED, reason: 'error_llm_websocket_lost_connection' }, 'error'],
  ['an error wins over nobody reached', { ...RANG, reason: 'error: busy' }, 'error'],
  ['not to be reached wins over a silent customer', { ...TALKED, customerSpoke: false, reason: 'invalid' }, 'error'],
  ['no answer wins over an invalid number', { ...RANG, reason: 'no_answer, maybe invalid' }, 'no_answer'],
  ['no answer of a call that was taken', { ...TAKEN, reason: 'customer-did-not-answer' }, 'no_answer'],

  ['nothing from the customer', { ...TALKED, customerSpoke: false }, 'no_answer'],
  ['nothing from the customer, lost', { ...TALKED, customerSpoke: false, reason: 'disconnected' }, 'no_answer'],
  ['nothing from the customer, abandoned', { ...TALKED, customerSpoke: false, reason: 'abandoned' }, 'no_answer'],
  ['nothing from the customer, expired', { ...TALKED, customerSpoke: false, reason: 'expired' }, 'no_answer'],
  ['nothing from the customer, unanswered', { ...TALKED, customerSpoke: false, answered: false }, 'no_answer'],
  ['nobody took it', RANG, 'no_answer'],
  ['nobody took it, lost', { ...RANG, reason: 'disconnected' }, 'no_answer'],
  ['taken, and nothing known', TAKEN, null],
  ['taken, nothing known, usual end', { ...TAKEN, reason: 'normal_clearing' }, null],
  ['taken, nothing known, lost', { ...TAKEN, reason: 'disconnected' }, 'disconnected'],
  ['the customer spoke, nobody said that he answered', { ...TALKED, answered: false, agentSpoke: false }, null],

  ['lost mid-way', { ...TALKED, reason: 'disconnected' }, 'disconnected'],
  ['abandoned mid-way', { ...TALKED, reason: 'abandoned' }, 'disconnected'],
  ['expired mid-way', { ...TALKED, reason: 'expired' }, null],
  ['the usual end', TALKED, null],
  ['no reason', { ...TALKED, reason: undefined }, null],
  ['no status', { ...TALKED, status: null, reason: 'disconnected' }, 'disconnected'],
  ['nothing known at all', {}, 'no_answer'],
  ['a null is a false one', { status: 'completed', reason: 'x', answered: true, agentSpoke: null }, null],
]

/** As providers have them. [reason, when they talked, when nobody took the call] */
const reasons: [outcome: string | null, unanswered: string, reasons: string[]][] = [
  // A machine.
  [
    'no_answer',
    'no_answer',
    [
      'voicemail',
      'voicemail_reached',
      'Voicemail detected',
      'voice_mail_reached',
      'machine',
      'Machine Detected',
    ].concat(['machine_end_beep', 'answering-machine', 'MACHINE_START', 'ivr_reached', 'customer.voicemail']),
  ],
  // Something broke.
  [
    'error',
    'error',
    ['error', 'ERROR', 'pipeline-error-openai-llm-failed', 'pipeline-no-available-llm-model', 'assistant-error']
      .concat([
        'call.start.error-get-org',
        'call.in-progress.error-vapifault-worker-died',
        'unknown-error',
        'error_asr',
      ])
      .concat(['assistant-request-returned-error', 'twilio-failed-to-connect-call', 'vonage-failed-to-connect-call'])
      .concat(['error_llm_websocket_open', 'sip_routing_error', 'Network Error', 'Error Reaching Answer URL', 'failed'])
      .concat(['Failed: 503', 'NORMAL_TEMPORARY_FAILURE', 'custom_llm generation failed', 'worker-shutdown'])
      .concat([
        'This request exceeds your quota limit.',
        'concurrency_limit_reached',
        'no_valid_payment',
        'scam_detected',
      ]),
  ],
  // Nobody was reached; a customer who spoke was.
  [
    null,
    'no_answer',
    [
      'no-answer',
      'no_answer',
      'No Answer',
      'noAnswer',
      'dial_no_answer',
      'NO_ANSWER',
      'customer-did-not-answer',
      'busy',
    ]
      .concat(["didn't answer", 'unanswered', 'customer-busy', 'dial_busy', 'user_busy', 'Busy Line', 'call_rejected'])
      .concat(['rejected', 'vonage-rejected', 'user_declined', 'NO_USER_RESPONSE', 'SUBSCRIBER_ABSENT', 'timeout']),
  ],
  // Nobody could be.
  [
    null,
    'error',
    ['invalid_destination', 'Invalid Destination Address', 'assistant-not-found', 'assistant-not-valid', 'not_found']
      .concat([
        'assistant-not-provided',
        'assistant-request-returned-no-assistant',
        'no-server-available',
        'dial_failed',
      ])
      .concat([
        'license-check-failed',
        'twilio-reported-customer-misdialed',
        'UNALLOCATED_NUMBER',
        'Endpoint Not Registered',
      ])
      .concat(['NO_ROUTE_DESTINATION', 'DESTINATION_OUT_OF_ORDER', 'Destination Out Of Service', 'SERVICE_UNAVAILABLE'])
      .concat(['telephony_provider_unavailable', 'telephony_provider_permission_denied', 'marked_as_spam', 'Forbidden'])
      .concat(['no_concurrency_fallback', 'Canceled (Out Of Credits)', 'Simultaneous dial limit reached'])
      .concat(['NORMAL_CIRCUIT_CONGESTION', 'Destination Country Barred', 'INCOMPATIBLE_DESTINATION']),
  ],
  // Dropped.
  [
    'disconnected',
    'no_answer',
    ['disconnected', 'Disconnected', 'abandoned', 'phone-call-provider-closed-websocket', 'vonage-disconnected']
      .concat(['silence-timed-out', 'silence_time_out', 'inactivity', 'user-inactivity-timeout', 'MEDIA_TIMEOUT'])
      .concat(['connection lost', 'lost_connection', 'call dropped', 'idle timeout']),
  ],
  // None of these: the usual end, words that only contain one, and what a bot tells of the conversation.
  [
    null,
    'no_answer',
    ['customer-ended-call', 'user_hangup', 'agent_hangup', 'assistant-ended-call', 'normal_clearing', 'Normal Hangup']
      .concat([
        'assistant-forwarded-call',
        'call_transfer',
        'exceeded-max-duration',
        'max_duration_reached',
        'time_limit',
      ])
      .concat(['Client disconnected: 1000', 'participant_disconnected', 'End Of XML Instructions', 'originator_cancel'])
      .concat(['callended', 'hangup', 'completed', 'expired', 'terrors', 'errorless', 'washing-machine-sold', ''])
      .concat([
        'sales-pipeline-updated',
        'unspecified',
        'silence',
        'headline dropped',
        'customer gave the machine back',
      ]),
  ],
  [null, 'error', ['verification_failed', 'failed-to-qualify', 'invalid-lead', 'payment-not-found']],
]

describe('call_outcome', () => {
  test.each(cases)('%s', async (_claim, facts, expected) => {
    expect(await outcome(facts)).toBe(expected)
  })

  test('knows_the_words_of_providers', async () => {
    for (const [talked, unanswered, words] of reasons) {
      for (const reason of words) {
        expect(await outcome({ ...TALKED, reason }), `${reason}, they talked`).toBe(talked)
        expect(await outcome({ ...RANG, reason }), `${reason}, nobody took it`).toBe(unanswered)
      }
    }
  })

  test('reads_a_reason_in_any_case_and_with_any_separators', async () => {
    for (const separator of ['-', '_', ' ', '.', ':']) {
      const written = (words: string) => [words, words.toUpperCase()].map((reason) => reason.replaceAll(' ', separator))
      for (const reason of written('db error')) expect(await outcome({ ...TALKED, reason }), reason).toBe('error')
      for (const reason of written('answering machine')) {
        expect(await outcome({ ...TALKED, reason }), reason).toBe('no_answer')
      }
      for (const reason of written('call dropped')) {
        expect(await outcome({ ...TALKED, reason }), reason).toBe('disconnected')
      }
    }
  })

  test('is_put_into_the_statement_that_calls_it', async () => {
    const { rows } = await database.pool.query(
      `EXPLAIN VERBOSE SELECT call_outcome(outcome, status, end_reason, answered_at IS NULL, complete, complete) FROM call_sessions`,
    )
    expect(rows.map((row) => row['QUERY PLAN']).join('\n')).not.toMatch(/call_outcome|reason_words/)
  })
})

/** What is marked in an event's meta. */
const mark = (at: unknown, more: object = {}): unknown => ({ of: 'S', at, ...more })
const start = (at: unknown, dense: unknown = true) => mark(at, { starts: true, dense })
const end = (at: unknown) => mark(at, { ends: true })
const turnIds = (...numbers: number[]) => numbers.map((n) => `S-${n}`)

const sequences: [claim: string, marks: unknown[], turnIds: string[], whole: boolean | null][] = [
  ['every number is a turn or a mark', [start(1), mark(3), end(5)], turnIds(2, 4), true],
  ['in any order, some of them twice', [end(4), mark(3), mark(3), start(1), start(1)], turnIds(2, 3), true],
  ['nothing between start and end', [start(1), end(2)], [], true],
  ['a number is missing', [start(1), end(4)], turnIds(2), false],
  ['the first one is missing', [start(1), end(3)], [], false],
  ['a number is missing that a turn of another origin has', [start(1), end(3)], ['2'], false],
  ['a number is missing, and one is beyond the end', [start(1), end(4)], turnIds(2, 5), false],
  ['a turn beyond the end', [start(1), end(3)], turnIds(2, 4), null],
  ['a turn before the start', [start(2), end(4)], turnIds(1, 3), null],
  ['a turn of another origin', [start(1), end(3)], [...turnIds(2), 'of the bot'], null],
  ['a turn of another name', [start(1), end(3)], ['T-2'], false],
  ['a turn of a name that is longer', [start(1), end(3)], [...turnIds(2), 'S-2-3'], null],
  ['not dense', [start(1, false), end(4)], turnIds(2), null],
  ['nobody knows whether it is dense', [mark(1, { starts: true }), end(4)], turnIds(2), null],
  ['dense, and not', [start(1, true), start(1, false), end(4)], turnIds(2), null],
  ['no start', [end(3)], turnIds(1, 2), null],
  ['no end', [start(1)], turnIds(2, 3), null],
  ['an end before its start', [start(5), end(1)], turnIds(2, 3, 4), null],
  ['a mark without its number', [start(1), mark(undefined), end(3)], turnIds(2), null],
  ['a number that is none', [start(1), mark('3'), end(3)], turnIds(2), null],
  ['a fraction fills no gap', [start(1), mark(1.5), end(3)], [], false],
  ['numbers too large for any', [start(1e300), end(2e300)], turnIds(2), null],
  ['what marks nothing', [1, 'S', null, [], [start(1)], { of: 1 }, { of: {} }, start(1), end(3)], turnIds(2), true],
  ['nothing but that', [1, 'S', null, [], { of: 1 }], turnIds(2), null],
]

describe('sequence_is_whole', () => {
  test.each(sequences)('%s', async (_claim, marks, ids, whole) => {
    const values = [marks.map((each) => JSON.stringify(each)), ids]
    const sql = 'SELECT sequence_is_whole($1::jsonb[], $2::text[]) AS whole'
    expect((await database.pool.query(sql, values)).rows).toEqual([{ whole }])
  })

  test('sequences_are_counted_by_name_and_what_marks_nothing_is_none', async () => {
    const count = async (marks: unknown[] | null) => {
      const values = [marks?.map((each) => JSON.stringify(each)) ?? null]
      return (await database.pool.query('SELECT sequences_of($1::jsonb[]) AS n', values)).rows[0].n
    }
    expect(await count([start(1), end(2), { of: 'T' }, { of: 'T', at: 1 }, { of: 5 }, 'S', null])).toBe(2)
    expect(await count([{ of: 5 }, 'S', null, [], 1])).toBe(null)
    expect(await count(null)).toBe(null)
  })
})
