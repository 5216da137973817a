/** What the demo prints in the end, all of it read back from PostgreSQL. */
import type { Pool } from '../../shared/postgres.js'
import { type Difference, KINDS, type Latency, type Report } from '../compare.js'
import { number, table } from '../live-view.js'

/** The call's transcript as its row in call_sessions has it; the turns' table knows who was interrupted. */
export async function transcriptOf(pool: Pool, callSid: string): Promise<string> {
  const { rows } = await pool.query<{ offset: number; speaker: string; text: string; interrupted: boolean | null }>(
    `SELECT greatest(0, extract(epoch FROM (said->>'timestamp')::timestamptz - s.initiated_at))::float8 AS offset,
       said->>'speaker' AS speaker, said->>'text' AS text, t.interrupted
     FROM call_sessions s
     CROSS JOIN jsonb_array_elements(s.full_transcript) WITH ORDINALITY AS e(said, place)
     LEFT JOIN call_transcript_turns t ON t.call_sid = s.call_sid AND t.turn_id = said->>'seq'
     WHERE s.call_sid = $1 ORDER BY place`,
    [callSid],
  )
  const line = ({ offset, speaker, text, interrupted }: (typeof rows)[number]) =>
    `  [${clock(offset)}] ${speaker}: ${text}${interrupted ? ' (interrupted)' : ''}`
  return rows.length > 0 ? rows.map(line).join('\n') : '  (none)'
}

function clock(seconds: number): string {
  const whole = Math.floor(seconds)
  return `${String(Math.floor(whole / 60)).padStart(2, '0')}:${String(whole % 60).padStart(2, '0')}`
}

interface SessionLine {
  call_sid: string
  provider: string | null
  direction: string | null
  status: string | null
  outcome: string | null
  end_reason: string | null
  turn_count: number | null
  complete: boolean | null
  duration_seconds: number | null
  finalized: string | null
}

export async function sessionTable(pool: Pool, prefix: string): Promise<string> {
  const { rows } = await pool.query<SessionLine>(
    `SELECT call_sid, provider, direction, status, outcome, end_reason, turn_count, complete, duration_seconds,
       to_char(finalized_at, 'HH24:MI:SS') AS finalized
     FROM call_sessions WHERE starts_with(call_sid, $1) ORDER BY finalized_at, call_sid`,
    [prefix],
  )
  const cell = (value: string | number | boolean | null) =>
    value === null ? '–' : typeof value === 'boolean' ? (value ? 'yes' : 'NO') : value
  return table(
    [
      'call_sid',
      'provider',
      'direction',
      'status',
      'outcome',
      'end_reason',
      'turns',
      'complete',
      'seconds',
      'finalized',
    ],
    rows.map((row) => Object.values(row).map(cell)),
  )
}

/** @param repeats in words: what was sent more than once */
export function verdict(report: Report, refusals: string[], repeats: string, latency: Latency | undefined): string {
  const { counts } = report
  const numbers: [string, string][] = [
    ['calls', number(report.calls)],
    ['turns sent', number(report.turns)],
    ['rows', number(report.rows)],
    ['missing', number(counts.missing)],
    ['doubled', `${number(counts.doubled)}   (${repeats})`],
    ['changed', number(counts.changed)],
    ['out of order', number(counts['out of order'])],
    ['unexpected', number(counts.unexpected)],
    ['wrong call rows', number(counts['call row'])],
  ]
  const lines = ['Every turn compared with what was sent:', '']
  for (const [name, value] of numbers) lines.push(`  ${name.padEnd(18)}${value}`)
  if (latency) {
    const { p50Ms, p99Ms } = latency
    lines.push(
      '',
      `  From a turn's arrival in Redis to the start of the transaction that put it into PostgreSQL:`,
      `  half within ${p50Ms.toFixed(1)} ms (p50), 99 of 100 within ${p99Ms.toFixed(1)} ms (p99).`,
    )
  }
  if (isClean(report) && refusals.length === 0) {
    lines.push('', 'Everything is there, each turn once.')
    return lines.join('\n')
  }
  lines.push('', 'SOMETHING IS WRONG:', ...refusals.map((refusal) => `  refused: ${refusal}`))
  lines.push(...report.differences.map((difference) => `  ${describe(difference)}`))
  const more = KINDS.reduce((sum, kind) => sum + counts[kind], 0) - report.differences.length
  if (more > 0) lines.push(`  … and ${number(more)} more`)
  return lines.join('\n')
}

export function isClean(report: Report): boolean {
  return KINDS.every((kind) => report.counts[kind] === 0)
}

function describe({ callSid, kind, seq, where, detail }: Difference): string {
  return `${callSid}${seq === undefined ? '' : ` turn ${seq}`}: ${kind} (${where.join(' and ')}): ${detail}`
}
