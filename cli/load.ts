/** A load generator: plays generated calls through the real WebSocket. What was sent can be made again to be compared. */
import { randomBytes } from 'node:crypto'
import { setMaxListeners } from 'node:events'
import { setImmediate as nextRound, setTimeout as sleep } from 'node:timers/promises'
import { type Client, EventRefused } from '../client/client.js'
import type { Turn } from '../shared/events.js'
import { hash } from '../shared/keys.js'
import { type ExpectedCall, expectedCall, type SentEvent } from './compare.js'
import { type Ingest, open } from './demo/client.js'

/** Says all there is to know of a set of generated calls. */
export interface Run {
  /** What the call_sids begin with; no other run's do. */
  prefix: string
  calls: number
  /** Of each call. */
  turns: number
  /** When the calls began, epoch ms. */
  startMs: number
}

const TURN_SPACING_MS = 20

export function newRun(calls: number, turns: number): Run {
  return { prefix: `load-${newRunId()}-`, calls, turns, startMs: Date.now() - turns * TURN_SPACING_MS }
}

/** 40 bits of chance: no two runs on the same stores have the same. */
export function newRunId(): string {
  return randomBytes(5).readUIntBE(0, 5).toString(36)
}

const PLAIN = [
  'Could you tell me the order number once more, please? ',
  'It should be printed on the top right of the invoice. ',
  'I have been waiting for that since last Tuesday. ',
  'Let me check this in our system, one moment please. ',
  'Yes, the delivery address is still the same as before. ',
  'Then I would book the appointment for Thursday at five. ',
  'That is more expensive than what your colleague told me. ',
  'I understand, and I am sorry for the trouble you had. ',
  'Can you send me the confirmation to my mobile phone? ',
  'The contract runs until the end of next September. ',
]
/** What breaks careless escaping, encoding or comparing. */
const ODD = [
  'column\tcolumn\tcolumn ',
  'first line\nsecond line\r\nthird line ',
  'C:\\temp\\new \\N \\. \\\\ \\x41 \\u0041 ',
  '\\N',
  `"double" 'single' \`back\` $1 %s {} ; -- `,
  'naïve café, Größe, Łódź, smørrebrød ',
  'क्या आप मुझे order number बता सकते हैं? ',
  'هل يمكنك إرسال الرقم 4417 من فضلك؟ ',
  'שלום, המספר הוא 12-34 בבקשה ',
  '少々お待ちくださいませ。 ',
  'e\u0301 a\u0308 n\u0303 \u200d\u200f\u202e\ufeff ',
  '👩‍👩‍👧‍👦 🇮🇳 👍🏽 𝒳 𠮷 ',
  '\u0001\u0007\u001b[31m\u007f\u0085\u2028 ',
  '   ',
]
const SPEAKERS = ['agent', 'customer', 'bot', 'user', 'assistant', 'caller']

const callSid = (run: Run, call: number) => `${run.prefix}${call}`

/** A turn, always the same for the same run, call and seq: about 200 characters, now and then odd, empty or long ones. */
export function generateTurn(run: Run, call: number, seq: number): Turn & { seq: number } {
  const sid = callSid(run, call)
  const chance = hash(`${sid} ${seq}`)
  const pick = (from: string[], shift: number) => from[(chance >>> shift) % from.length]!
  let text = `${call}/${seq} ${pick(PLAIN, 0)}${pick(PLAIN, 5)}${pick(PLAIN, 10)}${pick(PLAIN, 15)}`
  if (chance % 8 === 0) text = pick(ODD, 3) + text + pick(ODD, 9)
  if (chance % 500 === 1) text = text.repeat(20)
  if (chance % 100 === 2) text = ''
  if (chance % 100 === 3) text = pick(ODD, 7)
  return {
    type: 'turn',
    call_sid: sid,
    seq,
    speaker: SPEAKERS[((chance >>> 4) % 3) * 2 + (seq % 2)]!,
    text,
    ts: run.startMs + seq * TURN_SPACING_MS,
    language: 'en',
    confidence: (chance % 101) / 100,
  }
}

/** All of a call's events, in order. */
export function* generateCall(run: Run, call: number): Generator<SentEvent> {
  const sid = callSid(run, call)
  const common = { call_sid: sid, source: 'calltape-demo' }
  const to = `+1415555${String(call % 10_000).padStart(4, '0')}`
  const parties = { provider: 'calltape-demo', direction: 'outbound' as const, from: '+14155550100', to }
  yield { type: 'call.started', ...common, ts: run.startMs, ...parties }
  for (let seq = 0; seq < run.turns; seq++) yield generateTurn(run, call, seq)
  const ended = { reason: 'completed', outcome: 'generated', turn_count: run.turns }
  yield { type: 'call.ended', ...common, ts: run.startMs + run.turns * TURN_SPACING_MS, ...ended }
}

/** What PostgreSQL must have of a run in the end, made again call by call. */
export function* expectedCalls(run: Run): Generator<ExpectedCall> {
  for (let call = 0; call < run.calls; call++) yield expectedCall(callSid(run, call), generateCall(run, call))
}

export interface PlayOptions {
  run: Run
  /** Turns a second, all calls together. Absent: as fast as they are acknowledged. */
  rate?: number | undefined
  /** Default: 50, or as many as there are calls. */
  connections?: number
  signal?: AbortSignal
}

/** How far the playing is. */
export interface Progress {
  turnsSent: number
  turnsAcked: number
  /** Events put on the wire again after a lost connection; counted when a connection is done. */
  resent: number
  /** The first ones, in words. */
  refusals: string[]
}

export function newProgress(): Progress {
  return { turnsSent: 0, turnsAcked: 0, resent: 0, refusals: [] }
}

const CONNECTIONS = 50
/** Unacknowledged events of all connections together: enough to keep ingest busy, and little enough for our memory. */
const MAX_UNACKED = 20_000
const MOST_REFUSALS = 20

/**
 * Plays a run's calls, interleaved over the connections, and resolves when everything has been answered.
 *
 * @param progress kept up to date all the while
 * @throws (rejects) ConnectionClosed, or the signal's reason
 */
export async function playCalls(ingest: Ingest, options: PlayOptions, progress = newProgress()): Promise<Progress> {
  const { run } = options
  const count = Math.min(options.connections ?? CONNECTIONS, run.calls)
  const stop = new AbortController() // one player's failure ends the others
  const signal = AbortSignal.any([stop.signal, ...(options.signal ? [options.signal] : [])])
  setMaxListeners(0, signal) // each player listens
  const pace = new Pace(options.rate)
  const maxUnacked = Math.ceil(MAX_UNACKED / count)
  const play = async (index: number) => {
    const client = await open(ingest, { maxUnacked })
    await new Player(client, pace, progress).play(run, index, count, signal)
  }
  try {
    await Promise.all(Array.from({ length: count }, (_, index) => play(index)))
  } catch (error) {
    stop.abort(error)
    throw signal.reason
  }
  return progress
}

/** Plays its share of the calls over one connection. */
class Player {
  constructor(
    private readonly client: Client,
    private readonly pace: Pace,
    private readonly progress: Progress,
  ) {
    client.on('ack', (events) => {
      progress.turnsAcked += events
    })
    client.on('refused', (error) => this.refused(error))
  }

  async play(run: Run, first: number, step: number, signal: AbortSignal): Promise<void> {
    const cut = () => this.client.terminate()
    signal.addEventListener('abort', cut)
    try {
      let next = first
      let live: Generator<SentEvent>[] = []
      while (live.length > 0 || next < run.calls) {
        signal.throwIfAborted()
        // One more call begins in each round, so that calls begin and end all the time and not all at once.
        if (next < run.calls) live.push(generateCall(run, next))
        next += step
        const going: Generator<SentEvent>[] = []
        for (const call of live) {
          const { value: event } = call.next()
          if (!event) continue
          await this.send(event, signal)
          going.push(call)
        }
        live = going
        await nextRound() // waiting for what is settled already lets nothing else run, not even the sockets
      }
      await this.client.flush()
      await this.client.close()
    } finally {
      this.progress.resent += this.client.stats.resent
      signal.removeEventListener('abort', cut)
      cut()
    }
  }

  private async send(event: SentEvent, signal: AbortSignal): Promise<void> {
    await this.client.ready()
    if (event.type === 'turn') {
      await this.pace.next(signal)
      this.client.post(event)
      this.progress.turnsSent++
      return
    }
    this.client.send(event).then(
      () => this.progress.turnsAcked--, // no turn, but among the events that the client says were acknowledged
      (error: Error) => this.refused(error),
    )
  }

  private refused(error: Error): void {
    if (!(error instanceof EventRefused)) return // the connection was closed: then ready() or flush() fail with it, too
    if (this.progress.refusals.length < MOST_REFUSALS) {
      const { call_sid: sid, type, seq } = error.event
      this.progress.refusals.push(`${sid} ${type} ${seq ?? ''}: ${error.message}`)
    }
  }
}

/** What was missed for so long, because nothing could be sent, is caught up with; more than that is not. */
const BURST_MS = 100

/** Gives each turn its time: a token bucket that all connections draw from. */
class Pace {
  private due = performance.now()

  constructor(private readonly rate: number | undefined) {}

  async next(signal: AbortSignal): Promise<void> {
    if (this.rate === undefined) return
    const now = performance.now()
    this.due = Math.max(this.due, now - BURST_MS) + 1000 / this.rate
    if (this.due - now > 1) await sleep(this.due - now, undefined, { signal })
  }
}
