/** The closing table: what is aimed at, what this run measured, and whether that is enough. */
import { table } from '../cli/live-view.js'
import { shown } from './report.js'

export type PeerName = 'legacy' | 'insert' | 'batched-insert' | 'plain-loop' | 'bullmq'

/** By this run; absent: it has not measured that. Rates in turns/s, times in ms, CPU in µs a turn. */
export interface Measured {
  drainToCopy?: number | undefined
  endToEndTurns?: number | undefined
  endToEndMicros?: number | undefined
  latencyP50?: number | undefined
  latencyP99?: number | undefined
  peerMicros: Partial<Record<PeerName, number>>
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

type Figure = Target['measured']

const atLeast = (than: number, unit: string, what: string, measured: Figure): Target => ({
  what,
  sense: 'at least',
  than,
  unit,
  measured,
})
const atMost = (than: number, unit: string, what: string, measured: Figure): Target => ({
  what,
  sense: 'at most',
  than,
  unit,
  measured,
})
const lessCpu = (than: number, peer: PeerName, title: string) =>
  atLeast(than, '×', `CPU a turn: ${title} ÷ end to end`, (m) => ratio(m.peerMicros[peer], m.endToEndMicros))

const TARGETS: Target[] = [
  atLeast(0.85, '', 'backlog drain ÷ plain COPY of the same rows', (m) => m.drainToCopy),
  atLeast(45_000, 'turns/s', 'end to end, committed and finalized', (m) => m.endToEndTurns),
  atMost(35, 'µs/turn', 'end to end, CPU over all processes', (m) => m.endToEndMicros),
  atMost(5, 'ms', 'sent to committed at 5,000/s, p50', (m) => m.latencyP50),
  atMost(25, 'ms', 'sent to committed at 5,000/s, p99', (m) => m.latencyP99),
  lessCpu(10, 'legacy', 'the legacy way'),
  lessCpu(8, 'insert', 'INSERT a turn'),
  lessCpu(3, 'plain-loop', 'plain XADD/XREADGROUP loop'),
  lessCpu(8, 'bullmq', 'BullMQ'),
  atMost(1.25, '×', 'CPU an event: 100,000 open calls ÷ 1,000', (m) => ratio(m.micros100k, m.micros1k)),
  atMost(6144, 'bytes', 'Redis for an idle open call, 20 turns, text apart', (m) => m.bytesAnOpenCall),
  {
    ...atLeast(1.7, '×', 'drain with two sinks ÷ with one, PostgreSQL far away', (m) => m.twoSinksToOne),
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
