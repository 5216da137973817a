import { describe, expect, test } from 'vitest'
import {
  compareCall,
  type ExpectedCall,
  expectedCall,
  type SentEvent,
  type SessionRow,
  type TurnRow,
} from './compare.js'
import { generateCall, generateTurn } from './load.js'

const RUN = { prefix: 'load-test-', calls: 3, turns: 12, startMs: Date.UTC(2026, 0, 1) }

const SENT: SentEvent[] = [
  { type: 'call.started', call_sid: 'c', provider: 'twilio', direction: 'inbound', from: '+1', to: '+2' },
  { type: 'turn', call_sid: 'c', seq: 0, speaker: 'bot', text: 'Grüß Gott\t\\N', ts: 1000 },
  { type: 'turn', call_sid: 'c', seq: 1, speaker: 'caller', text: '', ts: 2000, confidence: 0.93, language: 'de' },
  { type: 'call.data', call_sid: 'c', data: { a: 1, b: { c: 2 } }, objections: ['price'] },
  { type: 'turn', call_sid: 'c', seq: 2, speaker: 'customer', text: 'a', ts: 3000, interrupted: true },
  { type: 'call.data', call_sid: 'c', data: { a: 2 }, stage: 'done', objections: ['time', 'price'] },
  { type: 'turn', call_sid: 'c', seq: 1, speaker: 'caller', text: '', ts: 2000, confidence: 0.93, language: 'de' },
  { type: 'call.ended', call_sid: 'c', reason: 'completed', outcome: 'sold', turn_count: 3 },
]

/** What PostgreSQL has when all went well. */
function stored(expected: ExpectedCall): { rows: TurnRow[]; session: SessionRow } {
  const rows = [...expected.turns.values()].map((row) => ({ ...row }))
  const full_transcript = rows.map(({ seq, speaker, text, spoken_at }) => {
    return { seq, speaker, text, timestamp: new Date(spoken_at).toISOString().replace('Z', '+00:00') }
  })
  return { rows, session: { ...structuredClone(expected.session), full_transcript, finalized_at: new Date() } }
}

/** Finds what `damage` did to a call that was stored well. */
function findingsAfter(damage: (rows: TurnRow[], session: SessionRow) => void) {
  const expected = expectedCall('c', SENT)
  const { rows, session } = stored(expected)
  damage(rows, session)
  return compareCall(expected, rows, session).map(({ kind, seq, where }) => ({ kind, seq, where: where.join() }))
}

const TURNS = 'call_transcript_turns'
const TRANSCRIPT = 'full_transcript'

describe('what is expected of a call', () => {
  test('is what its events say, each turn once, speakers as they are stored', () => {
    const { turns, session } = expectedCall('c', SENT)
    expect([...turns.values()].map((turn) => [turn.turn_id, turn.speaker])).toEqual([
      ['0', 'agent'],
      ['1', 'customer'],
      ['2', 'customer'],
    ])
    expect(session).toEqual({
      ...{ provider: 'twilio', direction: 'inbound', from_number: '+1', to_number: '+2', status: 'completed' },
      ...{
        outcome: 'sold',
        end_reason: 'completed',
        conversation_stage: 'done',
        collected_data: { a: 2, b: { c: 2 } },
      },
      ...{ objections_encountered: ['price', 'time'], turn_count: 3, expected_turns: 3, complete: true },
    })
  })

  test('without call.ended, is that it was disconnected and nothing proves it complete', () => {
    const { session } = expectedCall('c', SENT.slice(0, -1))
    const lost = { end_reason: 'disconnected', expected_turns: null, complete: null }
    expect(session).toMatchObject({ ...lost, outcome: 'disconnected' })
    const silent = SENT.filter((event) => event.type === 'turn' && event.speaker === 'bot')
    expect(expectedCall('c', silent).session).toMatchObject({ ...lost, outcome: 'no_answer' })
  })
})

describe('comparing', () => {
  test('finds nothing where all is well', () => {
    expect(findingsAfter((rows) => rows.reverse())).toEqual([])
  })

  test('finds a missing turn, once, wherever it is missing', () => {
    const inBoth = findingsAfter((rows, session) => {
      rows.splice(1, 1)
      session.full_transcript?.splice(1, 1)
    })
    expect(inBoth).toEqual([{ kind: 'missing', seq: 1, where: `${TURNS},${TRANSCRIPT}` }])
    expect(findingsAfter((rows) => rows.splice(2, 1))).toEqual([{ kind: 'missing', seq: 2, where: TURNS }])
  })

  test('finds a doubled turn, though its key be another', () => {
    const findings = findingsAfter((rows) => rows.push({ ...rows[0]!, turn_id: '1700000000000-0' }))
    expect(findings).toContainEqual({ kind: 'doubled', seq: 0, where: TURNS })
    expect(findingsAfter((_, session) => session.full_transcript?.push(session.full_transcript[2]!))).toEqual([
      { kind: 'doubled', seq: 2, where: TRANSCRIPT },
    ])
  })

  test.each<[string, Partial<TurnRow>]>([
    ['text', { text: 'Grüß Gott\t\\n' }],
    ['text in another normal form', { text: 'Grüß Gott\t\\N'.normalize('NFD') }],
    ['speaker', { speaker: 'bot' }],
    ['time', { spoken_at: 1001 }],
    ['confidence', { confidence: 1 }],
    ['language', { language: 'en' }],
    ['interruption', { interrupted: false }],
  ])('finds a changed %s', (_name, change) => {
    expect(findingsAfter((rows) => Object.assign(rows[0]!, change))).toEqual([
      { kind: 'changed', seq: 0, where: TURNS },
    ])
  })

  test('finds a transcript out of order, naming the turn that stands too late', () => {
    const findings = findingsAfter((_, session) => {
      session.full_transcript = [1, 0, 2].map((place) => session.full_transcript![place]!)
    })
    expect(findings).toEqual([{ kind: 'out of order', seq: 0, where: TRANSCRIPT }])
  })

  test('finds a turn that nobody sent', () => {
    expect(findingsAfter((rows) => rows.push({ ...rows[0]!, seq: 3, turn_id: '3' }))).toEqual([
      { kind: 'unexpected', seq: 3, where: TURNS },
    ])
    expect(findingsAfter((rows) => rows.push({ ...rows[0]!, seq: null, turn_id: 'x' }))).toEqual([
      { kind: 'unexpected', seq: undefined, where: TURNS },
    ])
  })

  test.each([
    ['is not finalized', { finalized_at: null }],
    ['lacks its end', { end_reason: null, outcome: null }],
    ['has another count', { turn_count: 2, complete: false }],
    ['has other data', { collected_data: { a: 1, b: { c: 2 } } }],
  ])("finds a call's row that %s", (_name, change) => {
    expect(findingsAfter((_, session) => Object.assign(session, change))).toEqual([
      { kind: 'call row', seq: undefined, where: 'call_sessions' },
    ])
  })

  test('finds that there is no row', () => {
    const expected = expectedCall('c', SENT)
    const differences = compareCall(expected, stored(expected).rows, undefined)
    expect(differences).toEqual([
      { callSid: 'c', kind: 'call row', seq: undefined, where: ['call_sessions'], detail: 'there is none' },
    ])
  })
})

describe('generated calls', () => {
  test('are the same each time they are made, and different from each other', () => {
    const once = [...generateCall(RUN, 1)]
    expect([...generateCall(RUN, 1)]).toEqual(once)
    expect(once.length).toBe(RUN.turns + 2)
    expect(generateTurn(RUN, 2, 0).text).not.toBe(generateTurn(RUN, 1, 0).text)
  })

  test('have turns of every kind, all of which PostgreSQL can store', () => {
    const texts = Array.from({ length: 5000 }, (_, seq) => generateTurn(RUN, 0, seq).text)
    expect(texts.every((text) => text.isWellFormed() && !text.includes('\0'))).toBe(true)
    const has = (kind: (text: string) => boolean) => texts.some(kind)
    expect(has((text) => text === '')).toBe(true)
    expect(has((text) => text === '\\N')).toBe(true)
    expect(has((text) => text.length > 3000)).toBe(true)
    for (const odd of ['\t', '\n', '\r', '\\', '"', '👩‍👩‍👧‍👦', 'क्या', 'هل', '\u0301', '\u0001']) {
      expect(
        has((text) => text.includes(odd)),
        odd,
      ).toBe(true)
    }
    const mean = texts.reduce((sum, text) => sum + text.length, 0) / texts.length
    expect(mean).toBeGreaterThan(180)
    expect(mean).toBeLessThan(260)
  })
})
