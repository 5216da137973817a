/** What a legacy session's blob holds, also where it is no JSON: Python writes NaN, and a blob may break off anywhere. */
import { JSONParser } from '@streamparser/json'
import { isObject, type JsonObject } from '../../shared/json.js'

/** Whose items are all or nothing: of half a turn a later look may find the whole. */
export const TRANSCRIPT_FIELD = 'transcript_history'

export interface Blob {
  fields: JsonObject
  /** It breaks off, or goes on as something else: `fields` is what was complete before. */
  isTruncated: boolean
}

/** @returns why there is nothing to be had from it: never with what it says */
export function readBlob(text: string): Blob | string {
  const whole = parse(text) ?? parse(withoutPythonConstants(text))
  if (whole) {
    const { value } = whole
    if (isObject(value)) return { fields: value, isTruncated: false }
    return `JSON, but ${Array.isArray(value) ? 'an array' : value === null ? 'null' : `a ${typeof value}`}`
  }
  const fields = readBeginning(withoutPythonConstants(text))
  return fields && Object.keys(fields).length > 0 ? { fields, isTruncated: true } : 'not JSON'
}

function parse(text: string): { value: unknown } | undefined {
  try {
    return { value: JSON.parse(text) }
  } catch {
    return undefined // its words would quote the blob
  }
}

/** `json.dumps` writes them for floats, outside of strings: they stand for no value. */
const withoutPythonConstants = (text: string) =>
  text.replace(/"[^"\\]*(?:\\.[^"\\]*)*"?|NaN|-?Infinity/gs, (found) => (found.startsWith('"') ? found : 'null'))

/** @returns every value that is complete, in what they are in; undefined when it does not begin like an object */
function readBeginning(text: string): JsonObject | undefined {
  const parser = new JSONParser()
  let root: unknown
  /** The containers that are open, from the outside; the parser's own, so it stays as it is when the text is at its end. */
  let open: { key?: unknown; value?: unknown }[] = []
  parser.onValue = ({ value, parent, stack }) => {
    open = stack
    root = stack.length === 0 ? value : (stack[1]?.value ?? parent)
  }
  try {
    parser.write(text) // and no `end`: a number that the text ends with may be half of one
  } catch {
    // What was complete before is there.
  }
  if (!isObject(root)) return undefined
  const [, inRoot, inField] = open
  if (inField && inRoot?.key === TRANSCRIPT_FIELD && Array.isArray(inField.value)) inField.value.pop()
  return root
}
