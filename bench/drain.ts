/** A backlog that has grown while no sink ran, drained at full speed; against plain COPY of the very same rows. */

import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { from as copyFrom, to as copyTo } from 'pg-copy-streams'
import type { Pool } from '../shared/postgres.js'
import { TURN_COLUMNS } from '../sink/copy.js'
import { cpuNow, cpuSince } from './machine.js'
import { type Bench, cpuRows, makeLoad, openPool, type Result, row, start, untilFinalized, verify } from './scenario.js'

const ROUNDS = 3

export async function drain(bench: Bench): Promise<Result[]> {
  const pool = openPool(bench)
  const rounds: { drained: number; copied: number; binary: number; cpu: Record<string, number> }[] = []
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

      const binary = await plainCopy(pool, load.turns, '(FORMAT binary)')
      const copied = await plainCopy(pool, load.turns, '')
      rounds.push({ drained, copied, binary, cpu: cost })
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
    row(scenario, 'plain COPY, binary format', middle.binary, 'rows/s'),
    row(scenario, 'ratio to the binary format', middle.drained / middle.binary, ''),
    ...cpuRows(scenario, middle.cpu),
  ]
}

/** A sink's transactions are about this large, too. */
const ROWS_A_COMMIT = 5000

/**
 * Takes the rows out, empties the table, and copies them back in the order they had, over one connection, nothing to decode
 * or encode.
 *
 * @param options of COPY: none is the text format that plain COPY speaks
 * @returns rows/s
 */
async function plainCopy(pool: Pool, expected: number, options: '' | '(FORMAT binary)'): Promise<number> {
  const client = await pool.connect()
  try {
    const batches: Buffer[] = []
    for (let from = 0; from < expected; from += ROWS_A_COMMIT) {
      const some = `SELECT ${TURN_COLUMNS} FROM call_transcript_turns ORDER BY ctid OFFSET ${from} LIMIT ${ROWS_A_COMMIT}`
      const chunks: Buffer[] = []
      for await (const chunk of client.query(copyTo(`COPY (${some}) TO STDOUT ${options}`)))
        chunks.push(chunk as Buffer)
      batches.push(Buffer.concat(chunks))
    }
    await client.query('TRUNCATE call_transcript_turns')
    await client.query('CHECKPOINT')
    let rows = 0
    const began = performance.now()
    for (const batch of batches) {
      const copy = client.query(copyFrom(`COPY call_transcript_turns (${TURN_COLUMNS}) FROM STDIN ${options}`))
      await pipeline(Readable.from([batch]), copy)
      rows += copy.rowCount
    }
    const seconds = (performance.now() - began) / 1000
    if (rows !== expected) throw new Error(`plain COPY took ${rows} rows of ${expected}`)
    return expected / seconds
  } finally {
    client.release()
  }
}
