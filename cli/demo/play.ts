/** Plays a show against ingest and PostgreSQL, shows how it goes, and compares what landed with what was sent. */
import { setTimeout as sleep } from 'node:timers/promises'
import { type DatabaseConfig, givenEnvironment, readConfig } from '../../shared/config.js'
import { createPool, type Pool } from '../../shared/postgres.js'
import { readLatency, verifyCalls } from '../compare.js'
import { type LiveView, number } from '../live-view.js'
import { Patience } from '../patience.js'
import { isClean, sessionTable, transcriptOf, verdict } from './report.js'
import { loadShow, type Show, sampleShow } from './shows.js'

/** Where the demo plays. */
export interface Stage {
  database: DatabaseConfig
  ingestUrl: string
  /** Absent: nobody is asked how far behind it is. */
  sinkUrl?: string | undefined
  /** With nothing happening for so long, nothing more will. */
  stallMs: number
  /** How long its servers may be away. */
  patienceMs: number
}

export interface Play {
  /** Generated calls instead of the sample calls. */
  calls?: number
  /** Turns a second, of all generated calls together. */
  rate?: number
  /** Of each generated call. */
  turns: number
}

/** Whose transcript is printed: the one with interruptions. */
const SHOWN_CALL = 'es'
const LOOK_MS = 200
/** Less often when looking takes long, because there are many rows: it must not slow down what it looks at. */
const LOOK_PAUSE = 4
const LOOK_MAX_MS = 2000

/** @returns whether everything is as it should be */
export async function playAndCheck(stage: Stage, play: Play, view: LiveView, signal: AbortSignal): Promise<boolean> {
  const pool = createPool(stage.database, 'demo', 3)
  const patience = new Patience(stage.patienceMs, view.say, signal)
  // An idle connection was lost. If that matters, the next query says so.
  pool.on('error', (error) => view.say(`PostgreSQL: ${error.message}`))
  try {
    const where = { ingest: { url: stage.ingestUrl, token: readConfig().INGEST_TOKENS[0], patience }, pool }
    const { calls, turns, rate } = play
    const show = calls === undefined ? sampleShow(where) : loadShow(where, { calls, turns, rate })
    view.say(`Playing ${number(show.calls)} calls with ${number(show.turns)} turns to ${stage.ingestUrl}:`)
    const isComplete = await watch(show, stage, patience, view, signal)
    view.done()
    if (!isComplete) console.log('\nNothing has happened for a while, although not every call is finalized: giving up.')
    return await report(show, pool, calls === undefined, patience, signal)
  } finally {
    await pool.end()
  }
}

/** Plays and shows how it goes; @returns false when it got stuck before every call was finalized */
async function watch(
  show: Show,
  stage: Stage,
  patience: Patience,
  view: LiveView,
  signal: AbortSignal,
): Promise<boolean> {
  const stop = new AbortController()
  let played = false
  let failure: Error | undefined
  void show.play(AbortSignal.any([signal, stop.signal])).then(
    () => {
      played = true
    },
    (error: Error) => {
      failure = error
    },
  )
  const began = performance.now()
  let before = ''
  let movedAt = began
  let landedMs: number | undefined
  try {
    for (;;) {
      const lookedAt = performance.now()
      const [lag] = await Promise.all([readLag(stage.sinkUrl), patience.insist('PostgreSQL', () => show.look())])
      const now = performance.now()
      if (failure) throw failure
      const progress = show.progress()
      if (landedMs === undefined && progress.inPostgres === show.turns) landedMs = now - began
      const speed = (progress.inPostgres / (landedMs ?? now - began)) * 1000
      draw(show, `${number(Math.round(speed))} turns/s, ${lag}`, now - began, view)
      if (played && progress.finalized === show.calls) return true

      const state = JSON.stringify(progress)
      if (state !== before) movedAt = now
      before = state
      if (now - movedAt > stage.stallMs) return false
      await sleep(Math.max(LOOK_MS, Math.min(LOOK_MAX_MS, (now - lookedAt) * LOOK_PAUSE)), undefined, { signal })
    }
  } finally {
    stop.abort()
  }
}

function draw(show: Show, pace: string, elapsedMs: number, view: LiveView): void {
  const { sent, acked, inPostgres, finalized } = show.progress()
  const turns = `${number(sent)} of ${number(show.turns)} turns sent, ${number(acked)} acked, ${number(inPostgres)} in PostgreSQL`
  const calls = `${number(finalized)} of ${number(show.calls)} calls finalized`
  const line = `${turns}; ${calls}; ${pace}`
  view.draw(
    `\n${show.screen()}\n\n  ${turns}\n  ${calls}; ${pace}\n`,
    `${(elapsedMs / 1000).toFixed(1).padStart(6)} s  ${line}`,
  )
}

/** The age of the oldest event that is not in PostgreSQL, as the sink says, in words. */
async function readLag(sinkUrl: string | undefined): Promise<string> {
  if (sinkUrl === undefined) return 'lag unknown'
  try {
    const response = await fetch(`${sinkUrl}/metrics`, { signal: AbortSignal.timeout(1000) })
    const seconds = /^calltape_sink_lag_seconds (\S+)/m.exec(await response.text())?.[1]
    return seconds === undefined ? 'lag unknown' : `lag ${Math.round(Number(seconds) * 1000)} ms`
  } catch {
    return 'the sink does not answer' // it may have been killed, to see what happens: the demo goes on
  }
}

async function report(
  show: Show,
  pool: Pool,
  isSample: boolean,
  patience: Patience,
  signal: AbortSignal,
): Promise<boolean> {
  const ask = <T>(work: () => Promise<T>) => patience.insist('PostgreSQL', work)
  if (isSample) {
    const callSid = show.prefix + SHOWN_CALL
    const transcript = await ask(() => transcriptOf(pool, callSid))
    console.log(`\ncall_sessions.full_transcript of ${callSid}:\n\n${transcript}`)
    console.log(`\ncall_sessions:\n\n${await ask(() => sessionTable(pool, show.prefix))}\n`)
  }
  const found = await ask(() => verifyCalls(pool, show.prefix, show.expected(), signal))
  const refusals = show.refusals()
  console.log(verdict(found, refusals, await show.repeats(), await ask(() => readLatency(pool, show.prefix))))
  const { REDIS_URL, DATABASE_URL } = givenEnvironment()
  if (REDIS_URL || DATABASE_URL) {
    console.log(
      `\nIn the stores that are yours, the calls are left where they are: their call_sid begins with ${show.prefix}`,
    )
  }
  return isClean(found) && refusals.length === 0
}
