/** `replay --dry-run`: what it would write, found out by reading alone. */
import type { Pool } from '../../shared/postgres.js'
import { compareEntries } from '../verify/compare.js'
import { pair } from '../verify/rows.js'
import type { ChangedCall, ReplayReport } from './report.js'
import type { Piece } from './source.js'
import { withoutQuarantined } from './write.js'

const FIRST_CALLS = 10
const MOST_ENTRIES = 2000

export class DryRun {
  private pieces: Piece[] = []
  private entries = 0
  /** Of the call whose pieces come just now. */
  private call: ChangedCall | undefined

  constructor(
    private readonly pool: Pool,
    private readonly report: ReplayReport,
  ) {}

  async add(piece: Piece): Promise<void> {
    this.pieces.push(piece)
    this.entries += piece.entries.length
    if (this.entries >= MOST_ENTRIES) await this.inHand()
  }

  async finish(): Promise<void> {
    await this.inHand()
    this.endCall()
  }

  /** Looks at what has come. */
  async inHand(): Promise<void> {
    const { pool, report, pieces } = this
    this.pieces = []
    this.entries = 0
    const meant = await Promise.all(pieces.map((piece) => withoutQuarantined(pool, piece)))
    const compared = await compareEntries(
      pool,
      meant.map((walk) => ({ walk, entries: walk.entries })),
    )
    const seen = new Set<string>()
    for (const [i, piece] of meant.entries()) {
      const call = this.callOf(piece)
      report.entries += pieces[i]!.entries.length
      report.leftInQuarantine += pieces[i]!.entries.length - piece.entries.length
      for (const { outcome, table, key } of compared.get(piece)!) {
        const name = pair(piece.callSid, `${table} ${key}`)
        // (Misplaced: a later entry of the same key made the row, and the earlier one is to be stored instead.)
        if ((outcome !== 'absent' && outcome !== 'misplaced') || seen.has(name)) continue
        seen.add(name)
        if (table) call[table]++
        else report.quarantined++
      }
      if (piece.isLast && (!piece.stored.fits || call.turns + call.events > 0)) report.callRows++
    }
  }

  private callOf({ callSid }: Piece): ChangedCall {
    if (this.call?.call_sid === callSid) return this.call
    this.endCall()
    this.call = { call_sid: callSid, turns: 0, events: 0 }
    return this.call
  }

  private endCall(): void {
    const { call, report } = this
    this.call = undefined
    if (!call) return
    report.turns += call.turns
    report.events += call.events
    const isChanged = call.turns + call.events > 0
    if (isChanged && report.changed.length < FIRST_CALLS) report.changed.push(call)
  }
}
