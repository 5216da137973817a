/** What a replay has done, and how it says so. */
import { number } from '../live-view.js'

export interface Difference {
  call_sid: string
  table: string
  /** In neither of both it is the same: only in DATABASE_SCHEMA, only in the other one, in both. */
  kind: 'missing' | 'extra' | 'different'
  /** The turn's or event's key; absent for a call's row. */
  key?: string
}

export interface Comparison {
  /** Calls whose rows were compared. */
  calls: number
  missing: number
  extra: number
  different: number
  /** Calls that went on meanwhile: they were not judged. */
  live: number
  examples: Difference[]
}

export interface ChangedCall {
  call_sid: string
  turns: number
  events: number
}

export class ReplayReport {
  calls = 0
  /** Calls that were in PostgreSQL already, all of them, and their entries. */
  wholeCalls = 0
  wholeEntries = 0
  /** Entries that were read and written, or found there. */
  entries = 0
  turns = 0
  events = 0
  /** Put into quarantine. */
  quarantined = 0
  /** In quarantine, or dropped from there, and left so. */
  leftInQuarantine = 0
  /** Behind the sinks' cursor. */
  leftCalls = 0
  leftEntries = 0
  /** Erased, or removed by retention, before what had been read of them was stored; and it was not. */
  readonly goneCalls = new Set<string>()
  goneEntries = 0
  /** --dry-run: rows of call_sessions that would be made or changed. */
  callRows = 0
  /** --dry-run: the first ones. */
  changed: ChangedCall[] = []
  seconds = 0
  stopped = false
  comparison: Comparison | undefined

  constructor(private readonly kind: 'replay' | 'dry run') {}

  toJson(): object {
    const { calls, wholeCalls, wholeEntries, entries, turns, events, quarantined, leftInQuarantine } = this
    return {
      calls,
      whole_calls: wholeCalls,
      whole_entries: wholeEntries,
      entries,
      turns,
      events,
      quarantined,
      left_in_quarantine: leftInQuarantine,
      left_to_sinks: { calls: this.leftCalls, entries: this.leftEntries },
      gone: { calls: this.goneCalls.size, entries: this.goneEntries },
      ...(this.kind === 'dry run' ? { call_rows: this.callRows, first_calls: this.changed } : {}),
      seconds: Math.round(this.seconds * 1000) / 1000,
      stopped: this.stopped,
      ...(this.comparison ? { comparison: this.comparison } : {}),
    }
  }

  describe(): string {
    const would = this.kind === 'dry run' ? 'would be written' : 'written'
    const facts: [string, number, string][] = [
      ['calls', this.calls, ''],
      ['there already', this.wholeCalls, `${number(this.wholeEntries)} entries`],
      [
        'entries read',
        this.entries,
        this.seconds > 0 ? `${number(Math.round(this.entries / this.seconds))} a second` : '',
      ],
      [`turns ${would}`, this.turns, ''],
      [`events ${would}`, this.events, ''],
      ...(this.kind === 'dry run'
        ? [['call rows made or changed', this.callRows, ''] as [string, number, string]]
        : []),
      ['quarantined', this.quarantined, ''],
      ['in quarantine, left there', this.leftInQuarantine, ''],
      ['gone meanwhile', this.goneEntries, `entries of ${number(this.goneCalls.size)} calls, erased or past retention`],
      ['left to the sinks', this.leftEntries, `entries of ${number(this.leftCalls)} calls that are not committed yet`],
    ]
    const shown = facts.filter(([name, n], i) => i < 5 || n > 0 || name.startsWith('call rows'))
    const lines = shown.map(
      ([name, n, note]) => `  ${name.padEnd(26)}${number(n).padStart(12)}${note ? `   ${note}` : ''}`,
    )
    const first = this.changed.map((call) => `  ${call.call_sid}: ${call.turns} turns, ${call.events} events`)
    if (first.length > 0) lines.push('', 'The first calls:', '', ...first)
    return [...lines, '', this.conclusion(), ...this.describeComparison()].join('\n')
  }

  private conclusion(): string {
    if (this.stopped) return 'Stopped before the end. Run it again: it goes on where it was.'
    if (this.kind === 'dry run') return 'Nothing was written.'
    if (this.entries + this.wholeEntries + this.leftEntries === 0) return 'There is no entry of what was meant.'
    if (this.leftEntries > 0) return 'All that was meant is in PostgreSQL, but for what is left to the sinks.'
    return 'All that was meant is in PostgreSQL.'
  }

  private describeComparison(): string[] {
    const { comparison } = this
    if (!comparison) return []
    const { calls, missing, extra, different, live, examples } = comparison
    const lines = ['', `Compared with DATABASE_SCHEMA: ${number(calls)} calls.`]
    if (live > 0) lines.push(`${number(live)} calls differ that went on meanwhile: they say nothing.`)
    if (missing + extra + different === 0) return [...lines, 'They are the same.']
    lines.push(
      `They differ: ${number(missing)} rows are missing in the new one, ${number(extra)} are only there, ${number(different)} are different.`,
      '',
    )
    for (const { call_sid, table, kind, key } of examples) {
      lines.push(`  ${kind.padEnd(10)}${call_sid}  ${table}${key === undefined ? '' : `  ${key}`}`)
    }
    return lines
  }
}
