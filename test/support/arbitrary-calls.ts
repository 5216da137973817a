/** Calls as producers might send them, well or badly, for the model check. */
import fc from 'fast-check'
import { CALL_STATUSES } from '../../shared/event-rules.js'
import type { CallEvent } from '../../shared/events.js'

/** An event without its call. */
export type Said = CallEvent extends infer E ? (E extends CallEvent ? Omit<E, 'call_sid'> : never) : never

const T0 = Date.UTC(2026, 0, 1, 12)
const optional = <T>(arbitrary: fc.Arbitrary<T>) => fc.option(arbitrary, { nil: undefined })
const time = optional(fc.nat(8).map((seconds) => T0 + seconds * 1000))
const duration = optional(fc.nat(90))
const url = optional(fc.constantFrom('https://r/1', 'https://r/2'))
const number = optional(fc.constantFrom('+1', '+2'))

/** Without the fields that are undefined, as JSON has it. The ids are few, so that many an event comes twice, or in two types. */
const event = (type: Said['type'], fields: Record<string, fc.Arbitrary<unknown>>): fc.Arbitrary<Said> =>
  fc
    .record({
      id: optional(fc.constantFrom('a', 'b', '3')),
      ts: time,
      source: optional(fc.constantFrom('bot', 'exotel')),
      ...fields,
    })
    .map((made) => ({ type, ...Object.fromEntries(Object.entries(made).filter(([, v]) => v !== undefined)) }) as Said)

const turn = event('turn', {
  seq: optional(fc.nat(6)),
  speaker: fc.constantFrom('agent', 'customer'),
  text: fc.constantFrom('a', 'b', '', 'größer 😀', 'nul \0', 'half \ud83d'),
})
const started = event('call.started', {
  direction: optional(fc.constantFrom('inbound', 'outbound')),
  from: number,
  to: number,
  provider: optional(fc.constantFrom('exotel', 'twilio')),
})
const status = event('call.status', {
  status: optional(fc.constantFrom(...CALL_STATUSES)),
  duration_seconds: duration,
  recording_url: url,
})
const data = event('call.data', {
  data: optional(fc.dictionary(fc.constantFrom('x', 'y', 'z'), fc.constantFrom(1, 2, null, { deep: [1] }))),
  stage: optional(fc.constantFrom('greeting', 'offer')),
  objections: optional(fc.array(fc.constantFrom('price', 'trust', 'busy'), { maxLength: 3 })),
})
const ended = event('call.ended', {
  reason: optional(fc.constantFrom('hangup', 'completed', 'abandoned')),
  outcome: optional(fc.constantFrom('sold', 'refused')),
  turn_count: optional(fc.nat(7)),
  duration_seconds: duration,
  recording_url: url,
})

/** Whatever anybody might say. */
const wild = fc.array(
  fc.oneof(
    { weight: 6, arbitrary: turn },
    { weight: 3, arbitrary: status },
    { weight: 2, arbitrary: data },
    { weight: 1, arbitrary: started },
    { weight: 2, arbitrary: ended },
  ),
  { maxLength: 14 },
)

interface Edit {
  kind: 'drop' | 'move' | 'again' | 'otherwise'
  from: number
  to: number
}

/** A call as a good producer sends it, … */
function politeCall(turns: number, keyed: 'seq' | 'id' | 'neither', timed: boolean): Said[] {
  const ts = (seconds: number) => (timed ? { ts: T0 + seconds * 1000 } : {})
  const key = (i: number) => (keyed === 'seq' ? { seq: i } : keyed === 'id' ? { id: `turn ${i}` } : {})
  return [
    { type: 'call.started', id: 'start', direction: 'inbound', from: '+1', ...ts(0) },
    { type: 'call.status', id: 'answer', status: 'in-progress', ...ts(1) },
    ...Array.from(
      { length: turns },
      (_, i): Said => ({ type: 'turn', speaker: 'agent', text: `${i}`, ...key(i), ...ts(2 + i) }),
    ),
    { type: 'call.data', id: 'data', data: { turns }, stage: 'offer', ...ts(2 + turns) },
    { type: 'call.ended', id: 'end', reason: 'hangup', turn_count: turns, ...ts(3 + turns) },
    { type: 'call.status', id: 'done', status: 'completed', recording_url: 'https://r/1', ...ts(4 + turns) },
  ]
}

/** … and as it arrives. */
function edited(events: Said[], edits: Edit[]): Said[] {
  const all = [...events]
  for (const { kind, from, to } of edits) {
    const [i, j] = [from % all.length, to % all.length]
    const chosen = all[i]!
    if (kind === 'drop' && all.length > 1) all.splice(i, 1)
    if (kind === 'move') all.splice(j, 0, ...all.splice(i, 1))
    if (kind === 'again') all.splice(j, 0, chosen)
    if (kind === 'otherwise') all.splice(j, 0, { ...chosen, ...(chosen.type === 'turn' ? { text: 'otherwise' } : {}) })
  }
  return all
}

const edit = fc.record<Edit>({
  kind: fc.constantFrom('drop', 'move', 'again', 'otherwise'),
  from: fc.nat(20),
  to: fc.nat(20),
})
const polite = fc
  .record({
    turns: fc.nat(8),
    keyed: fc.constantFrom('seq' as const, 'id' as const, 'neither' as const),
    timed: fc.boolean(),
    edits: fc.array(edit, { maxLength: 6 }),
  })
  .map(({ turns, keyed, timed, edits }) => edited(politeCall(turns, keyed, timed), edits))

/** What is said of one call, in the order in which it is sent. */
export const call: fc.Arbitrary<Said[]> = fc.oneof(wild, polite)
