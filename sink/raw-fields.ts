/** An entry's fields as JSON, whatever they hold: text as a string, what is not UTF-8 as {"base64":"…"}. */
import { isUtf8 } from 'node:buffer'
import type { RedisClient } from '../shared/redis.js'
import type { QuarantineRow } from './decode.js'

export type RawField = string | Buffer

/** @returns what JSON.stringify makes the field's JSON of */
export function fieldToJson(field: RawField): string | { base64: string } {
  if (typeof field === 'string') return field
  return isUtf8(field) ? field.toString() : { base64: field.toString('base64') }
}

/** @returns the fields and values in turn; a Buffer for what is not UTF-8; undefined when `given` is something else */
export function fieldsFromJson(given: unknown): RawField[] | undefined {
  if (!Array.isArray(given)) return undefined
  const fields = given.map(fieldFromJson)
  return fields.every((field) => field !== undefined) ? fields : undefined
}

function fieldFromJson(given: unknown): RawField | undefined {
  if (typeof given === 'string') return given
  const base64 = typeof given === 'object' && given !== null && 'base64' in given ? given.base64 : undefined
  return typeof base64 === 'string' ? Buffer.from(base64, 'base64') : undefined
}

/** What is not UTF-8 was read as U+FFFD: such entries are read once more, as bytes. */
export async function keepBytes(redis: RedisClient, rows: QuarantineRow[]): Promise<void> {
  for (const row of rows) {
    if (!row.raw.includes('\uFFFD')) continue
    const [entry] = await redis.xrangeBuffer(row.streamKey, row.entryId, row.entryId)
    if (entry) row.raw = JSON.stringify(entry[1].map(fieldToJson))
  }
}
