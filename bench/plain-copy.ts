/** What PostgreSQL takes at most: plain COPY of rows that are in its table already, into that very table. */
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { from as copyFrom, to as copyTo } from 'pg-copy-streams'
import type { Pool, PoolClient } from '../shared/postgres.js'
import { TURN_COLUMNS } from '../sink/copy.js'

/** A sink's transactions are about this large, too. */
const ROWS_A_COMMIT = 5000
/** About so many rows as are in a transaction of a sink's. */
const PAGES_A_COMMIT = 160

/** Runs `copy` on an emptied table, with the figures of a COPY of `expected` rows. @returns rows/s */
async function timed(client: PoolClient, expected: number, copy: () => Promise<number>): Promise<number> {
  await client.query('TRUNCATE call_transcript_turns')
  await client.query('CHECKPOINT')
  const began = performance.now()
  const rows = await copy()
  const seconds = (performance.now() - began) / 1000
  if (rows !== expected) throw new Error(`plain COPY took ${rows} rows of ${expected}`)
  return expected / seconds
}

async function copyIn(client: PoolClient, data: Buffer, options: string): Promise<number> {
  const copy = client.query(copyFrom(`COPY call_transcript_turns (${TURN_COLUMNS}) FROM STDIN ${options}`))
  await pipeline(Readable.from([data]), copy)
  return copy.rowCount
}

const batchOf = (from: number) =>
  `SELECT ${TURN_COLUMNS} FROM call_transcript_turns ORDER BY ctid OFFSET ${from} LIMIT ${ROWS_A_COMMIT}`

/** As a program does it that has rows and wants them in the table: one connection, text, a batch a commit. @returns rows/s */
export async function copyRows(pool: Pool, expected: number): Promise<number> {
  const client = await pool.connect()
  try {
    const batches: Record<string, unknown>[][] = []
    for (let from = 0; from < expected; from += ROWS_A_COMMIT) {
      batches.push((await client.query<Record<string, unknown>>(batchOf(from))).rows)
    }
    return await timed(client, expected, async () => {
      let rows = 0
      for (const batch of batches) rows += await copyIn(client, Buffer.from(batch.map(textLine).join('')), '')
      return rows
    })
  } finally {
    client.release()
  }
}

const ESCAPES: Record<string, string> = { '\\': '\\\\', '\n': '\\n', '\r': '\\r', '\t': '\\t' }

/** A line of COPY's text format. */
function textLine(row: Record<string, unknown>): string {
  const fields = Object.values(row).map((value) => {
    if (value === null) return '\\N'
    if (value instanceof Date) return value.toISOString()
    const text = typeof value === 'object' ? JSON.stringify(value) : String(value)
    return /[\\\n\r\t]/.test(text) ? text.replace(/[\\\n\r\t]/g, (char) => ESCAPES[char]!) : text
  })
  return `${fields.join('\t')}\n`
}

/**
 * With nothing left to do but send and store: what was encoded is taken out of the table as it goes in again.
 *
 * @returns rows/s
 */
export async function copyEncoded(pool: Pool, expected: number, options: '' | '(FORMAT binary)'): Promise<number> {
  const client = await pool.connect()
  try {
    const batches: Buffer[] = []
    for (let from = 0; from < expected; from += ROWS_A_COMMIT) {
      const chunks: Buffer[] = []
      const out = client.query(copyTo(`COPY (${batchOf(from)}) TO STDOUT ${options}`))
      for await (const chunk of out) chunks.push(chunk as Buffer)
      batches.push(Buffer.concat(chunks))
    }
    return await timed(client, expected, async () => {
      let rows = 0
      for (const batch of batches) rows += await copyIn(client, batch, options)
      return rows
    })
  } finally {
    client.release()
  }
}

/**
 * Binary COPY into an empty table with the same key, page range by page range; only the COPY is timed.
 *
 * @param source a table of the same columns @returns rows/s
 */
export async function copyRanges(pool: Pool, source: string, expected: number): Promise<number> {
  const client = await pool.connect()
  try {
    await client.query('CREATE TABLE plain_turns (LIKE call_transcript_turns INCLUDING ALL)')
    let [rows, ms] = [0, 0]
    for (let page = 0; rows < expected; page += PAGES_A_COMMIT) {
      const range = `ctid >= '(${page},0)' AND ctid < '(${page + PAGES_A_COMMIT},0)'`
      const chunks: Buffer[] = []
      const copying = copyTo(`COPY (SELECT ${TURN_COLUMNS} FROM ${source} WHERE ${range}) TO STDOUT (FORMAT binary)`)
      for await (const chunk of client.query(copying)) chunks.push(chunk as Buffer)
      const data = Buffer.concat(chunks)
      const began = performance.now()
      const copy = client.query(copyFrom(`COPY plain_turns (${TURN_COLUMNS}) FROM STDIN (FORMAT binary)`))
      await pipeline(Readable.from([data]), copy)
      ms += performance.now() - began
      if (copy.rowCount === 0) throw new Error(`plain COPY took ${rows} rows of ${expected}`)
      rows += copy.rowCount
    }
    return rows / (ms / 1000)
  } finally {
    await client.query('DROP TABLE IF EXISTS plain_turns')
    client.release()
  }
}
