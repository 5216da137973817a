/** What is sent, through the real client: at full speed, or evenly at a rate. What was sent can be made again to be compared. */
import { setTimeout as sleep } from 'node:timers/promises'
import { type ExpectedCall, expectedCall, type SentEvent } from '../cli/compare.js'
import { generateCall, generateTurn, newRun, type Run } from '../cli/load.js'
import { type Client, connect } from '../client/client.js'

const CONNECTIONS = 50
const FILLER = 'Could you tell me the order number once more, please? It is on the invoice. '

/** Calls from their start to their end, sent as fast as they are acked. */
export interface Load {
  run: Run
  turns: number
  /** Resolves when all is acked. Made beforehand, so that only sending is measured. @param acked told how many events are */
  send(urls: string[], acked?: (events: number) => void): Promise<void>
  /** What PostgreSQL must have in the end. */
  expected(): Generator<ExpectedCall>
}

/** @param textBytes length of each turn's text; absent: about 200, now and then odd, empty or long */
export function makeLoad(calls: number, turns: number, textBytes?: number): Load {
  const run = newRun(calls, turns)
  const shares = Array.from({ length: Math.min(CONNECTIONS, calls) }, (_, connection) => {
    const share = Array.from({ length: Math.ceil((calls - connection) / CONNECTIONS) }, (_, i) =>
      eventsOf(run, connection + i * CONNECTIONS, textBytes),
    )
    return inRounds(share)
  })
  return {
    run,
    turns: calls * turns,
    async send(urls, acked = () => {}) {
      const clients = await connectAll(urls, shares.length)
      let count = 0
      for (const client of clients) {
        client.on('ack', (events) => {
          count += events
          acked(count)
        })
      }
      await Promise.all(clients.map((client, i) => sendAll(client, shares[i]!)))
      await closeAll(clients)
    },
    *expected() {
      for (let call = 0; call < calls; call++)
        yield expectedCall(`${run.prefix}${call}`, eventsOf(run, call, textBytes))
    },
  }
}

function* eventsOf(run: Run, call: number, textBytes: number | undefined): Generator<SentEvent> {
  for (const event of generateCall(run, call)) {
    if (event.type === 'turn' && textBytes !== undefined) {
      const text = `${call}/${event.seq} ${FILLER.repeat(Math.ceil(textBytes / FILLER.length))}`
      event.text = text.slice(0, textBytes)
    }
    yield event
  }
}

/** An event of each call in turn: all of them are live at once, as they would be. */
function inRounds(calls: Generator<SentEvent>[]): SentEvent[] {
  const events: SentEvent[] = []
  for (let live = calls; live.length > 0; ) {
    live = live.filter((call) => {
      const { value } = call.next()
      if (value) events.push(value)
      return value !== undefined
    })
  }
  return events
}

/** Connections spread evenly over the ingests. */
export function connectAll(urls: string[], count = CONNECTIONS): Promise<Client[]> {
  return Promise.all(Array.from({ length: count }, (_, i) => connect(urls[i % urls.length]!)))
}

export const closeAll = (clients: Client[]) => Promise.all(clients.map((client) => client.close()))

async function sendAll(client: Client, events: Iterable<SentEvent>): Promise<void> {
  for (const event of events) {
    await client.ready()
    client.post(event)
  }
  await client.flush()
}

/** Calls that stay open: what was sent of them so far. */
export class OpenCalls {
  readonly run: Run
  /** Turns that were sent at full speed, of each call. */
  private filled = 0
  /** When each of the others was sent, epoch ms: in rounds, a turn of each call. */
  private readonly sentMs: number[] = []

  constructor(readonly calls: number) {
    this.run = newRun(calls, 0)
  }

  get turns(): number {
    return this.calls * this.filled + this.sentMs.length
  }

  /** The seq from which on turns are stamped with the time they were sent. */
  get firstTimedSeq(): number {
    return this.filled
  }

  /** Opens the calls, with so many turns each, in rounds. To be done first. @param sent told how many events are */
  async fill(clients: Client[], turns: number, sent: (events: number) => void): Promise<void> {
    let count = 0
    const share = async (client: Client, first: number) => {
      for (let seq = -1; seq < turns; seq++) {
        for (let call = first; call < this.calls; call += clients.length) {
          await client.ready()
          client.post(seq < 0 ? this.started(call) : generateTurn(this.run, call, seq))
          if (++count % 1000 === 0) sent(count)
        }
      }
      await client.flush()
    }
    await Promise.all(clients.map(share))
    this.filled = turns
  }

  /** Sends turns evenly, stamped with the time, until `isOver`. @param rate turns a second */
  async talk(clients: Client[], rate: number, isOver: (sent: number) => boolean): Promise<number> {
    const began = performance.now()
    let sent = 0
    while (!isOver(sent)) {
      const due = Math.floor(((performance.now() - began) / 1000) * rate)
      for (; sent < due && !isOver(sent); sent++) this.say(clients)
      await sleep(1)
    }
    await Promise.all(clients.map((client) => client.flush()))
    return sent
  }

  *expected(): Generator<ExpectedCall> {
    for (let call = 0; call < this.calls; call++) {
      const events: SentEvent[] = this.filled > 0 ? [this.started(call)] : []
      for (let seq = 0; seq < this.filled; seq++) events.push(generateTurn(this.run, call, seq))
      for (let i = call; i < this.sentMs.length; i += this.calls) events.push(this.timedTurn(i))
      if (events.length > 0) yield expectedCall(`${this.run.prefix}${call}`, events)
    }
  }

  /** Bytes of all texts that were filled in. */
  textBytes(): number {
    let bytes = 0
    for (let call = 0; call < this.calls; call++)
      for (let seq = 0; seq < this.filled; seq++) bytes += Buffer.byteLength(generateTurn(this.run, call, seq).text)
    return bytes
  }

  private say(clients: Client[]): void {
    const index = this.sentMs.length
    this.sentMs.push(Date.now())
    clients[(index % this.calls) % clients.length]!.post(this.timedTurn(index))
  }

  private timedTurn(index: number) {
    const turn = generateTurn(this.run, index % this.calls, this.filled + Math.floor(index / this.calls))
    return { ...turn, ts: this.sentMs[index]! }
  }

  private started(call: number): SentEvent {
    return generateCall(this.run, call).next().value!
  }
}
