/** What verify found, counted; the first of it in words. */
import { table } from '../live-view.js'

/** What may be wrong. `missing`: an entry's row; `unexpected`: a row that no entry of the stream makes. */
export const KINDS = ['missing', 'different', 'not finalized', 'wrong transcript', 'unexpected'] as const
export type Kind = (typeof KINDS)[number]

/** Never with what was said in the call: it names rows, entries and columns. */
export interface Finding {
  kind: Kind
  call_sid: string
  /** Where the row is, or should be. */
  table: string
  /** The stream entry; absent when it is about the call. */
  entry_id?: string
  /** The idempotency key. */
  key?: string
  /** A turn's place in the call. */
  seq?: number
  /** Which columns differ. */
  columns?: string[]
  detail: string
}

/** Kept in full, for `--json`; beyond that they are only counted. */
const MOST_FINDINGS = 1000
/** Shown in words. */
const MOST_SHOWN = 20

/** How many entries (or rows, or calls) came out how. */
const COUNTS = {
  calls: 0,
  entries: 0,
  /** Entries that are their row. */
  turns: 0,
  events: 0,
  /** Entries whose key came before in the same call. */
  duplicates: 0,
  quarantined: 0,
  dropped: 0,
  /** Rows whose entry Redis does not have any more: the stream was trimmed, or Redis emptied. */
  rows_without_entry: 0,
  /** Those of the missing that no sink has committed yet. */
  waiting: 0,
}

export class Report {
  readonly counts = { ...COUNTS }
  readonly kinds = Object.fromEntries(KINDS.map((kind) => [kind, 0])) as Record<Kind, number>
  readonly findings: Finding[] = []

  add(finding: Finding): void {
    this.kinds[finding.kind]++
    if (this.findings.length < MOST_FINDINGS) this.findings.push(finding)
  }

  get wrong(): number {
    return KINDS.reduce((sum, kind) => sum + this.kinds[kind], 0)
  }

  /** For machines. */
  toJSON(): object {
    const kinds = Object.fromEntries(KINDS.map((kind) => [kind.replaceAll(' ', '_'), this.kinds[kind]]))
    return { clean: this.wrong === 0, ...this.counts, ...kinds, findings: this.findings }
  }

  /** For people. */
  describe(): string {
    const { rows_without_entry: without, waiting, ...counts } = this.counts
    const notes: Partial<Record<string, string>> = {
      duplicates: 'the same key again: the first one counts',
      quarantined: 'see: calltape quarantine list',
      dropped: 'given up: calltape quarantine drop',
      'rows without entry': 'Redis does not have it any more',
      missing: waiting > 0 ? `${waiting} of them not committed yet` : '',
    }
    const rows = Object.entries({ ...counts, ...(without > 0 ? { 'rows without entry': without } : {}), ...this.kinds })
    const cells = rows.map(([name, n]) => [name, n, (n > 0 && notes[name]) || ''])
    const lines = [table(undefined, cells)]
    const shown = this.findings.slice(0, MOST_SHOWN)
    if (shown.length > 0) lines.push('', ...shown.map((finding) => `  ${inWords(finding)}`))
    if (this.wrong > shown.length) lines.push(`  … and ${this.wrong - shown.length} more`)
    lines.push('', this.verdict())
    return lines.join('\n')
  }

  private verdict(): string {
    if (this.counts.calls === 0) return 'There are no entries to compare.'
    if (this.wrong === 0) return 'Everything is there.'
    const { waiting } = this.counts
    if (waiting === this.wrong)
      return (
        'Not everything is committed yet: is a sink running? A longer --wait waits for it. ' +
        '(What no sink works on, `calltape orphans` lists.)'
      )
    return `Not everything is as it should be: ${this.wrong} ${this.wrong === 1 ? 'finding' : 'findings'}.`
  }
}

function inWords({ kind, call_sid, table, entry_id, key, seq, columns, detail }: Finding): string {
  const what = seq === undefined ? (key !== undefined && key !== entry_id ? ` (key ${key})` : '') : ` (turn ${seq})`
  const where = entry_id === undefined ? '' : ` entry ${entry_id}${what}`
  return `${kind}: call ${call_sid}${where}: ${table}${columns ? ` (${columns.join(', ')})` : ''}: ${detail}`
}
