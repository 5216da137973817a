/** What is measured, as a table. */
import { table } from '../cli/live-view.js'
import { pipelineMicros, saturated, type Usage } from './machine.js'

/** From sending an event to the COMMIT that made it visible, ms. */
export interface Latency {
  p50: number
  p99: number
  p999: number
}

export interface Figure {
  name: string
  value: number
  unit: string
}

/** One line of the table. */
export interface Row {
  scenario: string
  /** Or, of a ceiling, rows or commands a second. */
  turnsPerSecond?: number | undefined
  latencyMs?: Latency | undefined
  usage?: Usage | undefined
  /** Rows that were read back and compared with what was sent. No row without: then it is not a figure but a failure. */
  verifiedRows: number
  figures?: Figure[] | undefined
}

export const figure = (name: string, value: number, unit: string): Figure => ({ name, value, unit })

/** Digits as far as they mean something. */
export function shown(value: number): string {
  const size = Math.abs(value)
  if (size >= 1000) return Math.round(value).toLocaleString('en-US')
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2)
}

const HEAD = [
  ...['scenario', 'turns/s', 'p50 ms', 'p99', 'p99.9'],
  ...['CPU µs/turn: ingest', 'redis', 'sink', 'postgres', 'all', 'client'],
  ...['peak MiB: ingest', 'redis', 'sink', 'postgres', 'busy', 'rows verified'],
]
const PROCESSES = ['ingest', 'redis', 'sink', 'postgres'] as const

/** A line of cells for each row; what has no column stands below it. */
export function rowsTable(rows: Row[]): string {
  const lines = table(HEAD, rows.map(cells)).split('\n')
  const [head = '', ...body] = lines.map((line) => line.replace(/^ {2}/, ''))
  const below = rows.map(({ figures = [] }) =>
    figures.map(({ name, value, unit }) => `${name} ${shown(value)} ${unit}`.trim()).join('; '),
  )
  return [head, ...body.flatMap((line, i) => (below[i] ? [line, `    ${below[i]}`] : [line]))].join('\n')
}

function cells({ scenario, turnsPerSecond, latencyMs, usage, verifiedRows }: Row): string[] {
  const cell = (value: number | undefined) => (value === undefined ? '' : shown(value))
  const { cpuMicros = {}, peakMiB = {} } = usage ?? {}
  return [
    scenario,
    cell(turnsPerSecond),
    ...[latencyMs?.p50, latencyMs?.p99, latencyMs?.p999].map(cell),
    ...PROCESSES.map((name) => cell(cpuMicros[name])),
    cell(usage && pipelineMicros(usage)),
    cell(cpuMicros.client),
    ...PROCESSES.map((name) => (peakMiB[name] === undefined ? '' : String(Math.round(peakMiB[name])))),
    usage ? saturated(usage) : '',
    verifiedRows.toLocaleString('en-US'),
  ]
}
