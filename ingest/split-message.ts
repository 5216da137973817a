/**
 * A message that is an array of events, event by event, each with its own JSON as it came: that goes into the stream as it is.
 * Against parsing the array as a whole and writing each event's JSON anew: 1.2 µs an event of 300 bytes instead of 3.0, the more so
 * as one character beyond ASCII would make all of the array a string of 16-bit units.
 */
import { isAscii } from 'node:buffer'

/** An event as it was given. */
export interface GivenEvent {
  value: unknown
  json: string
}

const OPEN_BRACKET = 0x5b
const CLOSE_BRACKET = 0x5d

/**
 * Splits at every `},{` (or `}, {`), wherever it stands: in a string or deeper down, too. That is safe because all parts then have
 * to be JSON by themselves: the first one starts where an object starts, and of an object no beginning is JSON but all of it. So
 * if it parses it is the array's first element, and the next one starts where the second element starts.
 *
 * @param message UTF-8
 * @returns undefined when that does not work out: then the message is something else, or no JSON
 */
export function splitMessage(message: Buffer): GivenEvent[] | undefined {
  if (message[0] !== OPEN_BRACKET || message.at(-1) !== CLOSE_BRACKET) return undefined
  const bytes = message.toString('latin1') // a character a byte: what is found in it is where it is in the message
  const separator = bytes.includes('}, {') && !bytes.includes('},{') ? '}, {' : '},{'
  const encoding = isAscii(message) ? 'latin1' : 'utf8' // the same for ASCII, and faster
  const events: GivenEvent[] = []
  for (let start = 1; ; ) {
    const at = bytes.indexOf(separator, start)
    const end = at === -1 ? bytes.length - 1 : at + 1
    const json = message.toString(encoding, start, end)
    const value = parseObject(json)
    if (value === undefined) return undefined
    events.push({ value, json })
    if (at === -1) return events
    start = at + separator.length - 1
  }
}

function parseObject(json: string): unknown {
  if (!json.startsWith('{')) return undefined
  try {
    return JSON.parse(json)
  } catch {
    return undefined // the whole message is looked at then, and its sender is told what is wrong with it
  }
}
