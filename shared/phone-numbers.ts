/**
 * Phone numbers in what goes to a log: masked, but for the last two digits (and, behind a +, the first two: `+91••••••••34`), so that
 * an operator can still tell whether two lines are of the same one.
 *
 * What counts as one, in a string:
 *  - `+` (also as `%2B`, or 00) and 7 to 15 digits, with spaces, dots, dashes or parentheses between them;
 *  - whoever is in front of the @ in `sip:` and `sips:`, and what follows `tel:`;
 *  - 8 to 15 digits behind a word such as from, to, number, phone, written in one of the usual ways;
 *  - 10 to 12 digits by themselves, as providers write numbers without the +.
 * What does not: epoch seconds and milliseconds, an entry's id, dates, IP addresses, digits that are part of a word (a UUID, hex),
 * fewer digits (ports, durations). A count of bytes with ten digits and more is taken for a number: that costs nothing.
 */
import { createHash } from 'node:crypto'

const DOT = '•'
const LABEL =
  '(?:from|to|caller|callee|called|calling|number|phone|tel|telephone|mobile|msisdn|cli|ani|dnis|dialed|dialled|customer|recipient)'
const LABEL_TAIL = '(?:[_ -]?(?:number|no|phone|address|id))?'

const INTERNATIONAL = /(?:\+|%2B|(?<![\w.:-])00(?=[1-9]))\d(?:[ ().\u2010-\u2015-]{0,2}\d){6,14}(?!\d)/gi
const URI = /\b(sips?:)([^@\s"'<>;,]+)(?=@)|\b(tel:)([^\s"'<>;,]+)/gi
const LABELLED = new RegExp(
  String.raw`(?<![a-z0-9])(${LABEL}${LABEL_TAIL}["'\\]*\s*[:=]?\s*["'\\]*)(\(?\d[\d ().-]{6,24}\d)(?![\w•])`,
  'gi',
)
const BARE = /(?<![\w.:/+•-])\d{10,12}(?![\w:•-]|\.\d)/g
/** Of these there may be digits as many as a number has. */
const NO_NUMBER = /^(?:1\d{12}(?:-\d+)?|1\d{9}(?:\.\d+)?|\d+-\d{1,4}|\d{4}-\d\d-\d\d.*|\d{1,3}(?:\.\d{1,3}){3})$/
const WHOLE_LABEL = new RegExp(`^${LABEL}${LABEL_TAIL}$`, 'i')
const DIGITS = /\d/g
const HAS_NUMBER = /\d{2}|tel:|sips?:/i

/** @returns the string with its phone numbers masked */
export function maskNumbers(text: string): string {
  if (!HAS_NUMBER.test(text)) return text
  return text
    .replace(URI, (_all, sip?: string, user = '', tel = '', number = '') =>
      sip ? sip + (mask(user) || DOT.repeat(3)) : tel + mask(number),
    )
    .replace(INTERNATIONAL, mask)
    .replace(LABELLED, (all: string, label: string, number: string) =>
      NO_NUMBER.test(number) || digitsIn(number) < 8 || digitsIn(number) > 15 ? all : label + mask(number),
    )
    .replace(BARE, (number) => (NO_NUMBER.test(number) ? number : mask(number)))
}

/** @param name of the field that has the value: one such as `from_number` has a number, however it is written */
export function maskField(name: string, value: string): string {
  if (!WHOLE_LABEL.test(name) || digitsIn(value) < 5 || NO_NUMBER.test(value)) return maskNumbers(value)
  return mask(value)
}

/**
 * A call_sid may be a phone number, or have one in it. Calls must be told apart all the same: so a masked one gets four hex digits of
 * its hash. (More of them would let somebody who tries all numbers find the one. Of these, tens of thousands fit.)
 */
export function maskCallSid(callSid: string): string {
  const isNumber = /^[+\d][\d.-]{6,}\d$/.test(callSid) && !NO_NUMBER.test(callSid)
  const masked = isNumber ? mask(callSid) : maskNumbers(callSid)
  return masked === callSid ? callSid : `${masked}#${createHash('sha256').update(callSid).digest('hex').slice(0, 4)}`
}

const digitsIn = (text: string) => text.match(DIGITS)?.length ?? 0

/** Keeps the last two digits, and the first two behind a +. */
function mask(number: string): string {
  if (number.includes(DOT)) return number // it is masked
  const local = number.replace(/^(?:\+|%2B|00)/i, '')
  const digits = (local.match(DIGITS) ?? []).join('')
  const start = local === number ? '' : digits.slice(0, 2)
  const hidden = digits.length - start.length - 2
  if (hidden < 1) return digits.length === 0 ? '' : DOT.repeat(digits.length)
  return `${start && '+'}${start}${DOT.repeat(hidden)}${digits.slice(-2)}`
}
