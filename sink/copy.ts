/**
 * copy: turn rows as PostgreSQL's binary COPY format (https://www.postgresql.org/docs/current/sql-copy.html, "Binary
 * Format"). Measured against the text format with 280-byte turns: 0.4 of the CPU here, 0.65 of the CPU in PostgreSQL,
 * which has no numbers and times to parse. A column's type must be exactly the table's.
 *
 *     header   'PGCOPY\n\xff\r\n\0'  int32 flags  int32 extension length
 *     row      int16 columns, then for each: int32 length (-1: null), value
 *     trailer  int16 -1
 */
import { entryMs, type TurnRow, type TurnRows } from './decode.js'

const HEADER = Buffer.from('PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0', 'latin1')
const PG_EPOCH_MS = Date.UTC(2000, 0, 1)
const TWO_32 = 2 ** 32
/** Grows from there. Most batches are small, and V8 answers large buffers that come and go with full collections. */
const FIRST_BYTES = 16 * 1024
/** Up to this many characters a loop over ASCII beats the call into Buffer.write. */
const LOOP_MAX_CHARS = 40
const COLUMNS = [
  'call_sid',
  'turn_id',
  'seq',
  'speaker',
  'text',
  'spoken_at',
  'started_at',
  'ended_at',
  'confidence',
  'language',
  'interrupted',
  'meta',
  'stream_id',
  'ingested_at',
]

/** The columns that `encodeTurns` writes, in its order. */
export const TURN_COLUMNS = COLUMNS.join(', ')

/** Rows for COPY … FROM STDIN (FORMAT binary), encoded as they come: a batch is then one buffer, not a heap of objects. */
export class EncodedTurns implements TurnRows {
  private buffer = Buffer.allocUnsafeSlow(FIRST_BYTES)
  private view = new DataView(this.buffer.buffer)
  private at = HEADER.copy(this.buffer)
  private rows = 0

  get length(): number {
    return this.rows
  }

  push({ turn, turnId, streamId, meta }: TurnRow): void {
    const strings = turn.call_sid.length + turnId.length + turn.speaker.length + turn.text.length + streamId.length
    this.startRow(strings + (turn.language?.length ?? 0) + (meta?.length ?? 0))
    this.text(turn.call_sid)
    this.text(turnId)
    this.int4(turn.seq)
    this.text(turn.speaker)
    this.text(turn.text)
    this.timestamptz(turn.ts ?? entryMs(streamId))
    this.timestamptz(turn.started_at)
    this.timestamptz(turn.ended_at)
    this.float4(turn.confidence)
    this.text(turn.language)
    this.boolean(turn.interrupted)
    this.jsonb(meta)
    this.text(streamId)
    this.timestamptz(entryMs(streamId))
    this.rows++
  }

  /** @returns all of it, for `TURN_COLUMNS`; valid until the next push */
  encoded(): Buffer {
    this.reserve(2)
    this.view.setInt16(this.at, -1)
    return this.buffer.subarray(0, this.at + 2)
  }

  /** @param chars of all strings in the row together; a UTF-16 unit takes at most three bytes */
  private startRow(chars: number): void {
    this.reserve(2 + COLUMNS.length * 16 + chars * 3)
    this.view.setInt16(this.at, COLUMNS.length)
    this.at += 2
  }

  /** @returns true when there is no value, and that is what was written */
  private wroteNull(value: unknown): value is null | undefined {
    if (value !== undefined && value !== null) return false
    this.view.setInt32(this.at, -1)
    this.at += 4
    return true
  }

  private text(value: string | undefined): void {
    if (this.wroteNull(value)) return
    const start = this.at + 4
    const ascii = value.length <= LOOP_MAX_CHARS && this.writeAscii(value, start)
    const bytes = ascii ? value.length : this.buffer.write(value, start)
    this.view.setInt32(this.at, bytes)
    this.at = start + bytes
  }

  /** @returns false at the first character that is not ASCII: then it is for Buffer.write, from the start */
  private writeAscii(value: string, start: number): boolean {
    const { buffer } = this
    for (let i = 0; i < value.length; i++) {
      const char = value.charCodeAt(i)
      if (char > 127) return false
      buffer[start + i] = char
    }
    return true
  }

  private int4(value: number | undefined): void {
    if (this.wroteNull(value)) return
    this.view.setInt32(this.at, 4)
    this.view.setInt32(this.at + 4, value)
    this.at += 8
  }

  private float4(value: number | undefined): void {
    if (this.wroteNull(value)) return
    this.view.setInt32(this.at, 4)
    this.view.setFloat32(this.at + 4, value)
    this.at += 8
  }

  private boolean(value: boolean | undefined): void {
    if (this.wroteNull(value)) return
    this.view.setInt32(this.at, 1)
    this.buffer[this.at + 4] = value ? 1 : 0
    this.at += 5
  }

  /** Microseconds since 2000 as an int64. In two halves: BigInt costs more, and is needed only after the year 2285. */
  private timestamptz(ms: number | undefined): void {
    if (this.wroteNull(ms)) return
    this.view.setInt32(this.at, 8)
    const micros = (ms - PG_EPOCH_MS) * 1000
    if (Number.isSafeInteger(micros)) {
      const high = Math.floor(micros / TWO_32)
      this.view.setInt32(this.at + 4, high)
      this.view.setUint32(this.at + 8, micros - high * TWO_32)
    } else {
      this.view.setBigInt64(this.at + 4, BigInt(ms - PG_EPOCH_MS) * 1000n)
    }
    this.at += 12
  }

  private jsonb(json: string | null): void {
    if (this.wroteNull(json)) return
    const bytes = this.buffer.write(json, this.at + 5)
    this.view.setInt32(this.at, bytes + 1)
    this.buffer[this.at + 4] = 1 // jsonb's wire version
    this.at += 5 + bytes
  }

  private reserve(bytes: number): void {
    const needed = this.at + bytes
    if (needed <= this.buffer.length) return
    const grown = Buffer.allocUnsafeSlow(Math.max(needed, this.buffer.length * 2))
    this.buffer.copy(grown, 0, 0, this.at)
    this.buffer = grown
    this.view = new DataView(grown.buffer)
  }
}
