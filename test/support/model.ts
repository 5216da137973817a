/**
 * The specification of what PostgreSQL holds of a call, as a plain fold over its stream entries. It shares nothing
 * with sink/fold.sql but the rules: see "What is guaranteed" in README.md.
 */
import {
  type CallData,
  type CallEnded,
  type CallEvent,
  type CallStarted,
  type CallStatusChanged,
  type ConnectionChanged,
  END_STATUSES,
  PRESUMED_REASONS,
  type Turn,
} from '../../shared/events.js'

/** A stream entry. */
export interface Heard {
  id: string
  event: CallEvent
}

const ms = (id: string) => Number(id.split('-')[0])
/** The entry's place in its stream, as a number that compares right within a test run. */
const place = ({ id }: Heard) => ms(id) * 1e3 + Number(id.split('-')[1])
const when = ({ id, event }: Heard) => event.ts ?? ms(id)
const inTime = (a: Heard, b: Heard) => when(a) - when(b) || place(a) - place(b)
const isOwn = ({ event }: Heard) => event.source === 'calltape'
const isTurn = (heard: Heard): heard is Heard & { event: Turn } => heard.event.type === 'turn'
const isPresumed = (heard: Heard) =>
  isOwn(heard) && heard.event.type === 'call.ended' && PRESUMED_REASONS.has(heard.event.reason ?? '')

/** The turn or event that an entry is, however often it comes. */
export function keyOf({ id, event }: Heard): string {
  if (event.type !== 'turn') return event.id === undefined ? id : `${event.type} ${event.id}`
  return event.id ?? String(event.seq ?? id)
}

/** Of those with the same key the first one wins. */
function firsts<H extends Heard>(entries: H[]): H[] {
  const byKey = new Map<string, H>()
  for (const entry of entries) if (!byKey.has(keyOf(entry))) byKey.set(keyOf(entry), entry)
  return [...byKey.values()]
}

export function expectedTurns(entries: Heard[]): (Heard & { event: Turn })[] {
  return firsts(entries.filter(isTurn))
}

export function expectedEvents(entries: Heard[]): Heard[] {
  return firsts(entries.filter((entry) => !isTurn(entry)))
}

const storable = (text: string) => text.toWellFormed().replaceAll('\0', '\uFFFD')
const atTime = (value: number | undefined) => (value === undefined ? null : new Date(value))
const least = (heard: Heard[]) => (heard.length > 0 ? Math.min(...heard.map(when)) : undefined)
const greatest = (heard: Heard[]) => (heard.length > 0 ? Math.max(...heard.map(when)) : undefined)

/** What an event may say beside what they all say; each field has the same meaning wherever it is. */
type Own<E> = Partial<Omit<E, 'type' | 'call_sid' | 'id' | 'ts' | 'source'>>
type AnyEvent = { type: string } & Own<CallStarted> &
  Own<CallStatusChanged> &
  Own<CallData> &
  Own<CallEnded> &
  Own<ConnectionChanged>

/** By `seq`; a turn without one stands behind the last numbered turn spoken before it. */
function inCallOrder(turns: (Heard & { event: Turn })[]): Turn[] {
  let last = -1
  const placed = turns.toSorted(inTime).map((heard) => {
    const { seq } = heard.event
    last = Math.max(last, seq ?? -1)
    return { heard, after: seq ?? last, unnumbered: seq === undefined ? 1 : 0 }
  })
  const sorted = placed.sort((a, b) => a.after - b.after || a.unnumbered - b.unnumbered)
  return sorted.map(({ heard }) => ({ ...heard.event, ts: when(heard) }))
}

/** True or false where `turn_count` or `seq` prove it. */
function isComplete(turns: Turn[], expected: number | undefined): boolean | null {
  const seqs = new Set(turns.flatMap(({ seq }) => (seq === undefined ? [] : [seq])))
  const allNumbered = turns.every(({ seq }) => seq !== undefined)
  const hasGap = allNumbered && [...seqs].some((seq) => seq > 0 && !seqs.has(seq - 1))
  if (hasGap || (expected !== undefined && turns.length < expected)) return false
  return turns.length === expected ? true : null
}

/** What became of a call that is over. Of the words that a reason may have, only those that are said of arbitrary calls. */
function outcomeOf(verdict: string | null, status: string, reason: string | null, answered: boolean, turns: Turn[]) {
  const spoke = (who: (speaker: string) => boolean) =>
    turns.some(({ speaker, text }) => who(speaker) && text.trim() !== '')
  const customerSpoke = spoke((speaker) => speaker !== 'agent' && speaker !== 'system')
  if (verdict) return verdict
  if (status === 'failed') return 'error'
  if (status === 'busy' || status === 'no-answer') return 'no_answer'
  if (status === 'canceled') return customerSpoke ? 'disconnected' : 'no_answer'
  // Redis may know of an end status that PostgreSQL took for the same event as another one: then it is only the reason.
  if (reason === 'failed') return 'error'
  if (!customerSpoke && (reason === 'busy' || reason === 'no-answer')) return 'no_answer'
  if (!customerSpoke && (spoke((speaker) => speaker === 'agent') || !answered)) return 'no_answer'
  return reason === 'abandoned' || reason === 'disconnected' ? 'disconnected' : null
}

/** The call's row, without what is derived from when it was written. */
export function expectedRow(entries: Heard[]): Record<string, unknown> {
  const turns = expectedTurns(entries)
  const sorted = expectedEvents(entries).sort(inTime)
  const events = sorted.map(({ event }) => event as AnyEvent)
  const said = <F extends keyof AnyEvent>(field: F) =>
    events.map((e) => e[field]).filter((value) => value !== undefined)
  const first = <F extends keyof AnyEvent>(field: F) => said(field)[0] ?? null
  const last = <F extends keyof AnyEvent>(field: F) => said(field).at(-1) ?? null
  const merged = (objects: object[]) =>
    objects.some((o) => Object.keys(o).length > 0) ? Object.assign({}, ...objects) : null

  const ofType = (type: string) => sorted.filter(({ event }) => event.type === type)
  const ends = ofType('call.ended')
  const realEnds = ends.filter((end) => !isPresumed(end))
  const presumedAt = Math.max(...ends.filter(isPresumed).map(place))
  const wentOn = [...turns, ...ofType('call.connected')].some((heard) => place(heard) > presumedAt)
  const final = realEnds.length > 0 || (presumedAt > 0 && !wentOn)

  const statuses = said('status')
  const furthest = ['in-progress', 'ringing', 'initiated', 'queued'].find((status) =>
    statuses.includes(status as never),
  )
  const started = events.some(({ type }) => type === 'call.started') ? 'initiated' : 'in-progress'
  const endStatuses = sorted.filter(({ event }) => END_STATUSES.has((event as AnyEvent).status ?? ''))
  const status = (endStatuses[0]?.event as AnyEvent)?.status ?? (final ? 'completed' : (furthest ?? started))

  const heardOf = sorted.filter((heard) => !isOwn(heard))
  const connection = (ofType('call.connected').at(-1)?.event as AnyEvent)?.connection
  const lost = ofType('call.disconnected').filter(
    ({ event }) => connection && (event as AnyEvent).connection === connection,
  )
  const saidOver = least(ends.filter((end) => !isOwn(end))) ?? least(endStatuses)
  const over = saidOver ?? Math.max(greatest(lost) ?? greatest(heardOf) ?? 0, greatest(turns) ?? 0)
  const answered = least(sorted.filter(({ event }) => (event as AnyEvent).status === 'in-progress'))
  const began = least([...heardOf, ...turns])!
  const computed = final ? Math.round(Math.max(0, over - (answered ?? began)) / 1000) : null

  const inOrder = inCallOrder(turns)
  const reasons = [...ends.filter(isOwn), ...ends.filter((end) => !isOwn(end))].map(
    ({ event }) => (event as AnyEvent).reason,
  )
  const reason = reasons.filter((said) => said !== undefined).at(-1) ?? null
  const wasAnswered = answered !== undefined || (endStatuses[0]?.event as AnyEvent)?.status === 'completed'
  return {
    provider: first('provider'),
    direction: first('direction'),
    from_number: first('from'),
    to_number: first('to'),
    status,
    outcome: final ? outcomeOf(last('outcome'), status, reason, wasAnswered, inOrder) : last('outcome'),
    answered_at: atTime(answered),
    ended_at: atTime(final ? over : saidOver),
    duration_seconds: last('duration_seconds') ?? computed,
    recording_url: last('recording_url'),
    conversation_stage: last('stage'),
    collected_data: merged(said('data')),
    objections_encountered: said('objections').flat().length > 0 ? [...new Set(said('objections').flat())] : null,
    full_transcript: final
      ? inOrder.map(({ seq, speaker, text, ts }) => ({
          seq: seq ?? null,
          speaker,
          text: storable(text),
          timestamp: ts,
        }))
      : null,
    turn_count: final ? turns.length : null,
    expected_turns: last('turn_count'),
    complete: final ? isComplete(inOrder, last('turn_count') ?? undefined) : null,
    end_reason: final ? reason : null,
    meta: merged(said('meta')),
    finalized: final,
  }
}
