/** A payload of a provider whose spelling varies: its fields are taken out one by one, and what nobody took is its rest. */
import type { JsonObject } from '../../shared/json.js'

interface Field {
  key: string
  name: string
  value: unknown
}

/** CallSid, callSid and call_sid are one field. */
const plainName = (name: string) => name.toLowerCase().replaceAll('_', '')

/** Null, empty, or a time that is none: Exotel's EndTime is the epoch in its own zone as long as a call lasts. */
const saysNothing = (value: unknown): boolean =>
  value === null || (typeof value === 'string' && /^\s*$|^null$|^(1970-01-01|0000-00-00)[ T]/.test(value))

export class Fields {
  private readonly left: Set<Field>

  constructor(payload: JsonObject) {
    const fields = Object.entries(payload).map(([name, value]) => ({ key: plainName(name), name, value }))
    this.left = new Set(fields.filter(({ value }) => !saysNothing(value)))
  }

  /**
   * The first of the named fields that can be read.
   *
   * @param read undefined for what it cannot read, which then stays
   * @param keys in lower case, without underscores
   */
  take<T>(read: (value: unknown) => T | undefined, ...keys: string[]): T | undefined {
    return this.find(read, keys, true)
  }

  /** The same, and the field stays. */
  peek<T>(read: (value: unknown) => T | undefined, ...keys: string[]): T | undefined {
    return this.find(read, keys, false)
  }

  /** Under its own names: what has no column. */
  get rest(): JsonObject {
    return Object.fromEntries([...this.left].map(({ name, value }) => [name, value]))
  }

  private find<T>(read: (value: unknown) => T | undefined, keys: string[], takes: boolean): T | undefined {
    for (const key of keys) {
      for (const field of this.left) {
        const value = field.key === key ? read(field.value) : undefined
        if (value === undefined) continue
        if (takes) this.left.delete(field)
        return value
      }
    }
    return undefined
  }
}
