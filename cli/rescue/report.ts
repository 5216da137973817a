/** What rescue found and did, counted; what could not be read, by key. */
import { table } from '../live-view.js'

/** Never with what was said in the call. */
export interface Finding {
  key: string
  reason: string
}

/** Kept in full, for `--json`; beyond that they are only counted. */
const MOST_FINDINGS = 1000
/** Shown in words. */
const MOST_SHOWN = 20

/** How a key's value was when it was last looked at. */
export type Condition = 'readable' | 'truncated' | 'unreadable'

const COUNTS = {
  /** Keys that were looked at. */
  sessions: 0,
  /** Those whose value broke off: saved up to there. */
  truncated: 0,
  /** Those of which nothing became an event. */
  unreadable: 0,
  /** Different turns that were seen. */
  turns: 0,
  /** Those that were appended (in a dry run: would be). */
  new: 0,
  /** Those that were in the call's stream before. */
  already_there: 0,
  /** Items of transcripts that are no turns. */
  unreadable_turns: 0,
  /** Calls that were presumed over: their key is gone, or they went silent. */
  ended: 0,
  /** Keys that were gone before they could be read. */
  expired: 0,
}

export class Report {
  readonly counts = { ...COUNTS }
  private readonly findings = new Map<string, Finding>()
  isDryRun = false
  /** It was told to stop before it had seen every key, and stored what it had seen. */
  isInterrupted = false
  /** Turns that PostgreSQL does not have yet; undefined: it was not asked. */
  missing: number | undefined
  /** Why PostgreSQL could not be asked. */
  databaseFailure: string | undefined

  /** @param of what of the key it is about: a later word on the same replaces the earlier one. */
  find(key: string, of: 'value' | 'turns', reason: string): void {
    const name = `${of} ${key}`
    if (this.findings.has(name) || this.findings.size < MOST_FINDINGS) this.findings.set(name, { key, reason })
  }

  /** It has become readable. */
  lose(key: string, of: 'value' | 'turns'): void {
    this.findings.delete(`${of} ${key}`)
  }

  /** All that is readable is saved, and nothing is unreadable. */
  get isClean(): boolean {
    const { truncated, unreadable, unreadable_turns } = this.counts
    const isStored = this.databaseFailure === undefined && (this.missing ?? 0) === 0
    return truncated + unreadable + unreadable_turns === 0 && isStored && !this.isInterrupted
  }

  /** For machines. */
  toJSON(): object {
    return {
      clean: this.isClean,
      dry_run: this.isDryRun,
      interrupted: this.isInterrupted,
      ...this.counts,
      not_in_postgresql: this.missing ?? null,
      ...(this.databaseFailure === undefined ? {} : { database_failure: this.databaseFailure }),
      findings: [...this.findings.values()],
    }
  }

  /** For people. */
  describe(): string {
    const { new: appended, already_there, unreadable_turns, ...others } = this.counts
    const notes: Record<string, string> = {
      truncated: 'saved up to where they break off',
      ended: 'their key is gone, or they went silent',
      expired: 'gone before they could be read',
      'turns new': this.isDryRun ? 'would be appended' : 'appended',
    }
    const rows = [
      ...Object.entries(others).slice(0, 4),
      ['turns new', appended] as const,
      ['turns already there', already_there] as const,
      ['turns unreadable', unreadable_turns] as const,
      ...Object.entries(others).slice(4),
    ].map(([name, n]) => [name, n, (n > 0 && notes[name]) || ''])
    const lines = [table(undefined, rows)]
    const findings = [...this.findings.values()]
    const shown = findings.slice(0, MOST_SHOWN)
    if (shown.length > 0) lines.push('', ...shown.map(({ key, reason }) => `  ${key}: ${reason}`))
    if (findings.length > shown.length) lines.push(`  … and ${findings.length - shown.length} more`)
    lines.push('', this.verdict())
    return lines.join('\n')
  }

  private verdict(): string {
    const { counts, missing, databaseFailure } = this
    const said: string[] = []
    if (this.isInterrupted) said.push('Stopped before all of it was stored: run it again, it appends only what is new.')
    if (counts.sessions === 0) said.push('There are no sessions to rescue.')
    else if (this.isDryRun) said.push('Nothing was appended: this was a dry run.')
    else if (databaseFailure !== undefined) {
      said.push(`Appended, but whether it is in PostgreSQL yet cannot be said: ${databaseFailure}`)
    } else if (missing === 0) said.push('Every turn that could be read is in PostgreSQL.')
    else if (missing === undefined) said.push('Appended: the sinks bring it into PostgreSQL.')
    else
      said.push(
        `Appended, but ${missing} turns are not in PostgreSQL yet: is a sink running? A longer --wait waits for it.`,
      )
    return said.join('\n')
  }
}
