/** What is to be seen while it runs, on standard error: which scenario of how many, what it does, how far it is. */
import { createLiveView, keepDrawing } from '../cli/live-view.js'

const BAR = 20

export class Progress {
  private readonly view = createLiveView(process.stderr)
  private readonly began = performance.now()
  private readonly endDrawing: () => void
  private scenario = 'starting'
  private doing = ''
  private done = 0
  private of = 0

  constructor() {
    this.endDrawing = keepDrawing(this.view, () => this.line())
  }

  /** A scenario begins. @param index from 1 */
  begin(index: number, count: number, name: string): void {
    this.scenario = `[${index}/${count}] ${name}`
    this.doing = ''
    this.of = 0
    if (!process.stderr.isTTY) this.view.say(this.scenario) // on a terminal the line that is redrawn says it
  }

  /** @param of how much there is to do; absent when nobody knows */
  step(doing: string, of = 0): void {
    this.doing = doing
    this.of = of
    this.done = 0
  }

  /** Of what the last `step` said. */
  at(done: number): void {
    this.done = done
  }

  /** Says something that stays. */
  say(line: string): void {
    this.view.say(`  ${line}`)
  }

  end(): void {
    this.doing = ''
    this.of = 0
    this.scenario = 'done'
    this.endDrawing()
  }

  private line(): string {
    const seconds = Math.round((performance.now() - this.began) / 1000)
    const elapsed = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`
    return [this.scenario, this.doing, this.bar(), `${elapsed} elapsed`].filter(Boolean).join(' · ')
  }

  private bar(): string {
    if (this.of === 0) return ''
    const share = Math.min(1, this.done / this.of)
    const filled = Math.round(share * BAR)
    return `${'█'.repeat(filled)}${'░'.repeat(BAR - filled)} ${Math.floor(share * 100)} %`
  }
}
