/** What a replay shows while it runs: how far it is, how fast, and how long it will take. */
import { createLiveView, keepDrawing, number } from '../live-view.js'

const MOST_BAR_CHARS = 30
const LEAST_BAR_CHARS = 10
const USUAL_COLUMNS = 120

export class ProgressLine {
  /** Entries in all; undefined when nobody knows. */
  total: number | undefined
  /** How much of the work is done, 0–1, where entries do not tell. */
  share: number | undefined
  /** It gives way to live calls. */
  isPaused = false
  private readonly view = createLiveView(process.stderr)
  private stop = () => {}
  private began = 0

  /** @param done how many entries are done */
  start(done: () => number): void {
    this.began = performance.now()
    this.stop = keepDrawing(this.view, () => this.line(done()))
  }

  say(text: string): void {
    this.view.say(text)
  }

  done(): void {
    this.stop()
    this.stop = () => {}
  }

  private line(done: number): string {
    const seconds = (performance.now() - this.began) / 1000
    const share = this.share ?? (this.total ? Math.min(1, done / this.total) : undefined)
    const counted = `${number(done)}${this.total === undefined ? '' : ` of ${number(this.total)}`} entries`
    const rate = `${number(Math.round(done / Math.max(seconds, 0.001)))} entries/s`
    const paused = this.isPaused ? ', waiting for the sinks' : ''
    if (share === undefined) return `${counted}, ${rate}${paused}`
    const left = share > 0 ? `, ${duration((seconds / share) * (1 - share))} left` : ''
    const text = ` ${Math.floor(share * 100)} %  ${counted}, ${rate}${left}${paused}`
    return bar(share, (process.stderr.columns || USUAL_COLUMNS) - text.length - 1) + text
  }
}

/** @param room the columns that there are for it, so that the line is not broken */
function bar(share: number, room: number): string {
  const chars = Math.min(MOST_BAR_CHARS, Math.max(LEAST_BAR_CHARS, room))
  const filled = Math.round(share * chars)
  return '█'.repeat(filled) + '░'.repeat(chars - filled)
}

function duration(seconds: number): string {
  const whole = Math.ceil(seconds)
  if (whole < 60) return `${whole} s`
  const minutes = Math.floor(whole / 60)
  return minutes < 60 ? `${minutes} min ${whole % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`
}
