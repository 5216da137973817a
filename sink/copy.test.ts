import { expect, test } from 'vitest'
import { EncodedTurns, TURN_COLUMNS } from './copy.js'

const COLUMNS = TURN_COLUMNS.split(', ')
const HEADER_BYTES = 19

/** The rows in COPY's binary format: each column's bytes, null for null. */
function decode(data: Buffer): Record<string, Buffer | null>[] {
  const rows: Record<string, Buffer | null>[] = []
  let at = HEADER_BYTES
  for (let columns = data.readInt16BE(at); columns !== -1; columns = data.readInt16BE(at)) {
    expect(columns).toBe(COLUMNS.length)
    at += 2
    const row: Record<string, Buffer | null> = {}
    for (const name of COLUMNS) {
      const length = data.readInt32BE(at)
      at += 4
      row[name] = length === -1 ? null : data.subarray(at, at + length)
      at += Math.max(0, length)
    }
    rows.push(row)
  }
  expect(at + 2).toBe(data.length)
  return rows
}

const row = (text: string, meta: string | null = null) => ({
  turn: { type: 'turn', call_sid: 'sid', speaker: 'agent', text } as const,
  turnId: 'id',
  streamId: '1767268800000-0',
  meta,
})

test('no_rows_are_a_header_and_a_trailer', () => {
  const data = new EncodedTurns().encoded()
  expect(data.subarray(0, 11).toString('latin1')).toBe('PGCOPY\n\xff\r\n\0')
  expect(decode(data)).toEqual([])
})

test('rows_are_whole_wherever_the_buffer_has_to_grow', () => {
  const long = 'न'.repeat(21_845)
  for (let before = 900_000; before < 1_060_000; before += 8000) {
    const turns = new EncodedTurns()
    for (const text of ['x'.repeat(before), long, 'after']) turns.push(row(text, JSON.stringify({ text })))
    const rows = decode(turns.encoded())
    expect(rows.map(({ text }) => text!.length)).toEqual([before, 65_535, 5])
    expect(rows[1]!.text!.toString()).toBe(long)
    expect(rows[1]!.meta!.toString()).toBe(`\u0001{"text":"${long}"}`)
    expect(rows[2]!.stream_id!.toString()).toBe('1767268800000-0')
    expect(turns.length).toBe(3)
  }
})
