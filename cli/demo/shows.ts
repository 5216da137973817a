/** What the demo can play: the sample calls, or generated ones as a load. Each knows its progress and what must come of it. */
import { setMaxListeners } from 'node:events'
import type { Pool } from '../../shared/postgres.js'
import { type ExpectedCall, readLanded } from '../compare.js'
import { number, table } from '../live-view.js'
import { expectedCalls, newProgress, newRun, newRunId, playCalls } from '../load.js'
import { countDuplicates, expectedOf, lookAtSamples, type PlayedCall, playSample, sampleRun } from '../sample-run.js'
import type { Ingest } from './client.js'

export interface Show {
  /** What its call_sids begin with. */
  readonly prefix: string
  readonly calls: number
  readonly turns: number
  /** Resolves when all is sent and answered. */
  play(signal: AbortSignal): Promise<void>
  /** Finds out what is in PostgreSQL. */
  look(): Promise<void>
  progress(): ShowProgress
  /** For the live view, above the totals. */
  screen(): string
  expected(): Iterable<ExpectedCall>
  /** Events that were refused, in words. */
  refusals(): string[]
  /** In words: what was sent more than once. */
  repeats(): Promise<string>
}

export interface ShowProgress {
  sent: number
  acked: number
  inPostgres: number
  finalized: number
}

export interface Where {
  ingest: Ingest
  pool: Pool
}

const BAR_WIDTH = 60
/** As wide as the longest state, so that the columns stand still. */
const STATE_WIDTH = 18

export function sampleShow({ ingest, pool }: Where): Show {
  const prefix = `demo-${newRunId()}-`
  const calls = sampleRun(prefix)
  const sum = (of: (call: PlayedCall) => number) => calls.reduce((all, call) => all + of(call), 0)
  return {
    prefix,
    calls: calls.length,
    turns: sum((call) => call.turns),
    play: async (signal) => {
      setMaxListeners(0, signal) // each player listens
      await Promise.all(calls.map((call) => playSample(call, ingest, signal)))
    },
    look: () => lookAtSamples(pool, calls),
    progress: () => ({
      sent: sum((call) => call.sent),
      acked: sum((call) => call.acked),
      inPostgres: sum((call) => call.inPostgres),
      finalized: calls.filter((call) => call.finalized).length,
    }),
    screen: () =>
      table(
        ['call', 'language', 'state', 'turns', 'sent', 'acked', 'stored'],
        calls.map((call) => {
          const state = call.finalized ? `${call.state}; finalized` : call.state
          return [
            call.callSid,
            call.sample.language,
            state.padEnd(STATE_WIDTH),
            call.turns,
            call.sent,
            call.acked,
            call.inPostgres,
          ]
        }),
      ),
    expected: () => calls.map(expectedOf),
    refusals: () => calls.flatMap((call) => call.refusals),
    async repeats() {
      const arrived = await countDuplicates(calls, ingest)
      return `${sum((call) => call.resent)} events were sent a second time, ${arrived} of them came to Redis a second time`
    },
  }
}

/** @param load.rate turns a second; absent: full speed */
export function loadShow(
  { ingest, pool }: Where,
  load: { calls: number; turns: number; rate?: number | undefined },
): Show {
  const run = newRun(load.calls, load.turns)
  const turns = run.calls * run.turns
  const sent = newProgress()
  let landed = { turns: 0, finalized: 0 }
  return {
    prefix: run.prefix,
    calls: run.calls,
    turns,
    async play(signal) {
      await playCalls(ingest, { run, rate: load.rate, signal }, sent)
    },
    async look() {
      landed = await readLanded(pool, run.prefix)
    },
    progress: () => ({
      sent: sent.turnsSent,
      acked: sent.turnsAcked,
      inPostgres: landed.turns,
      finalized: landed.finalized,
    }),
    screen() {
      return `  ${'█'.repeat(Math.floor((landed.turns / turns) * BAR_WIDTH)).padEnd(BAR_WIDTH, '░')}`
    },
    expected: () => expectedCalls(run),
    refusals: () => sent.refusals,
    repeats: async () => `${number(sent.resent)} events were sent a second time`,
  }
}
