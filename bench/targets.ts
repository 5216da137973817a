/** The closing table: what is aimed at, what this run measured, and whether that is enough. */
import { table } from '../cli/live-view.js'
import { shown } from './report.js'

/** By this run; absent: it has not measured that. Rates in turns/s, times in ms, CPU in µs a turn. */
export interface Measured {
  drainToCopy?: number | undefined
  endToEndTurns?: number | undefined
  endToEndMicros?: number | undefined
  latencyP50?: number | undefined
  latencyP99?: number | undefined
  legacyMicros?: number | undefined
  insertMicros?: number | undefined
  batchedInsertMicros?: number | undefined
  plainLoopMicros?: number | undefined
  bullmqMicros?: number | undefined
  /** CPU at the same rate, and at full speed. */
  micros100k?: number | undefined
  micros1k?: number | undefined
  /** In Redis, without its text. */
  bytesAnOpenCall?: number | undefined
  twoSinksToOne?: number | undefined
  /** What had no more to give with two sinks. */
  twoSinksSaturated?: string | undefined
}

interface Target {
  what: string
  sense: 'at least' | 'at most'
  than: number
  unit: string
  measured(m: Measured): number | undefined
  note?(m: Measured): string | undefined
}

const ratio = (over: number | undefined, under: number | undefined) =>
  over === undefined || under === undefined ? undefined : over / under

const lessCpu = (peer: string, than: number, micros: (m: Measured) => number | undefined): Target => ({
  ...{ what: `CPU a turn: ${peer} ÷ end to end`, sense: 'at least', than, unit: '×' },
  measured: (m) => ratio(micros(m), m.endToEndMicros),
})

const TARGETS: Target[] = [
  {
    ...{ what: 'backlog drain ÷ plain COPY of the same rows', sense: 'at least', than: 0.85, unit: '' },
    measured: (m) => m.drainToCopy,
  },
  {
    ...{ what: 'end to end, committed and finalized', sense: 'at least', than: 45_000, unit: 'turns/s' },
    measured: (m) => m.endToEndTurns,
  },
  {
    ...{ what: 'end to end, CPU over all processes', sense: 'at most', than: 35, unit: 'µs/turn' },
    measured: (m) => m.endToEndMicros,
  },
  {
    ...{ what: 'sent to committed at 5,000/s, p50', sense: 'at most', than: 5, unit: 'ms' },
    measured: (m) => m.latencyP50,
  },
  {
    ...{ what: 'sent to committed at 5,000/s, p99', sense: 'at most', than: 25, unit: 'ms' },
    measured: (m) => m.latencyP99,
  },
  lessCpu('the legacy way', 10, (m) => m.legacyMicros),
  lessCpu('INSERT a turn', 8, (m) => m.insertMicros),
  lessCpu('plain XADD/XREADGROUP loop', 3, (m) => m.plainLoopMicros),
  lessCpu('BullMQ', 8, (m) => m.bullmqMicros),
  {
    ...{ what: 'CPU an event: 100,000 open calls ÷ 1,000', sense: 'at most', than: 1.25, unit: '×' },
    measured: (m) => ratio(m.micros100k, m.micros1k),
  },
  {
    ...{ what: 'Redis for an idle open call, 20 turns, text apart', sense: 'at most', than: 6144, unit: 'bytes' },
    measured: (m) => m.bytesAnOpenCall,
  },
  {
    ...{ what: 'drain with two sinks ÷ with one', sense: 'at least', than: 1.7, unit: '×' },
    measured: (m) => m.twoSinksToOne,
    note: (m) => m.twoSinksSaturated && `saturated: ${m.twoSinksSaturated}`,
  },
]

export interface Verdict {
  target: string
  wanted: string
  measured: number | null
  met: boolean | null
  note?: string | undefined
}

export function judge(measured: Measured): Verdict[] {
  return TARGETS.map(({ what, sense, than, unit, measured: of, note }) => {
    const value = of(measured)
    const isMet = sense === 'at least' ? (value ?? 0) >= than : (value ?? 0) <= than
    return {
      target: what,
      wanted: `${sense === 'at least' ? '≥' : '≤'} ${shown(than)} ${unit}`.trim(),
      measured: value ?? null,
      met: value === undefined ? null : isMet,
      note: value === undefined ? undefined : note?.(measured),
    }
  })
}

export function targetsTable(verdicts: Verdict[]): string {
  const rows = verdicts.map(({ target, wanted, measured, met, note }) => [
    target,
    wanted,
    measured === null ? 'not measured' : shown(measured),
    met === null ? '' : met ? 'met' : 'NOT MET',
    note ?? '',
  ])
  return table(['target', 'wanted', 'measured', '', ''], rows)
}
