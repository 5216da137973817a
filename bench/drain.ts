/** A backlog that has grown while no sink ran, drained at full speed; against plain COPY of the very same rows. */
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { from as copyFrom, to as copyTo } from 'pg-copy-streams'
import type { Pool, PoolClient } from '../shared/postgres.js'
import { TURN_COLUMNS } from '../sink/copy.js'
import { cpuNow, cpuSince } from './machine.js'
import { type Bench, cpuRows, makeLoad, openPool, type Result, row, start, untilFinalized, verify } from './scenario.js'

const ROUNDS = 3

export async function drain(bench: Bench): Promise<Result[]> {
  const pool = openPool(bench)
  const rounds: { drained: number; copied: number; text: number; binary: number; cpu: Record<string, number> }[] = []
  try {
    for (let round = 0; round < ROUNDS; round++) {
      await pool.query('TRUNCATE call_transcript_turns, call_events, call_sessions')
      const load = makeLoad(bench.calls, bench.turns)
      const ingest = await start(bench, 'ingest')
      await load.send(ingest.url)
      await ingest.stop()
      await pool.query('CHECKPOINT')

      const began = performance.now()
      const sink = await start(bench, 'sink')
      const startup = performance.now() - began // its Node starting is not draining
      const pids = { redis: bench.redis.pid, sink: sink.pid(), postgres: bench.postgres.pid }
      const cpu = cpuNow(pids)
      await untilFinalized(pool, load)
      const drained = load.turns / ((performance.now() - began - startup) / 1000)
      const cost = cpuSince(cpu, pids, load.turns)
      await sink.stop()
      await verify(pool, load)

      const binary = await copyEncoded(pool, load.turns, '(FORMAT binary)')
      const text = await copyEncoded(pool, load.turns, '')
      const copied = await copyRows(pool, load.turns)
      rounds.push({ drained, copied, text, binary, cpu: cost })
      bench.say(
        `drain, round ${round + 1} of ${ROUNDS}: ${Math.round(drained)} turns/s, plain COPY ${Math.round(copied)} rows/s, ` +
          `ratio ${(drained / copied).toFixed(2)}`,
      )
    }
  } finally {
    await pool.end()
  }
  const middle = rounds.sort((a, b) => a.drained / a.copied - b.drained / b.copied)[Math.floor(ROUNDS / 2)]!
  const scenario = `drain, ${bench.calls} × ${bench.turns}`
  return [
    row(scenario, 'drained and finalized', middle.drained, 'turns/s'),
    row(scenario, 'plain COPY of the same rows', middle.copied, 'rows/s'),
    row(scenario, 'ratio', middle.drained / middle.copied, ''),
    row(scenario, 'COPY of text encoded beforehand', middle.text, 'rows/s'),
    row(scenario, 'ratio to that', middle.drained / middle.text, ''),
    row(scenario, 'COPY of binary encoded beforehand', middle.binary, 'rows/s'),
    row(scenario, 'ratio to that', middle.drained / middle.binary, ''),
    ...cpuRows(scenario, middle.cpu),
  ]
}

/** A sink's transactions are about this large, too. */
const ROWS_A_COMMIT = 5000

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

/** About so many rows as are in a transaction of a sink's. */
const PAGES_A_COMMIT = 160

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

const batchOf = (from: number) =>
  `SELECT ${TURN_COLUMNS} FROM call_transcript_turns ORDER BY ctid OFFSET ${from} LIMIT ${ROWS_A_COMMIT}`

/** Plain COPY as a program does it that has rows and wants them in the table: one connection, text, a batch a commit. */
async function copyRows(pool: Pool, expected: number): Promise<number> {
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

/** The same with nothing left to do but send and store: what was encoded is taken out of the table as it goes in again. */
async function copyEncoded(pool: Pool, expected: number, options: '' | '(FORMAT binary)'): Promise<number> {
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
