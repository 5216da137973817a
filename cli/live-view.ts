/** What commands show of long work: redrawn in place on a terminal, else a line now and then. And tables, and numbers. */
import { createLogUpdate } from 'log-update'

export interface LiveView {
  /**
   * @param screen all that there is to see
   * @param line the same in one line
   */
  draw(screen: string, line: string): void
  /** Says something that stays, above what is drawn. */
  say(text: string): void
  /** Leaves the last screen standing. */
  done(): void
}

/** Between two lines, however often they are drawn. */
const LINE_MS = 1000
const TTY_DRAW_MS = 100
/** Where lines stay, as in a log. */
const LINE_DRAW_MS = 3000

export function createLiveView(out: NodeJS.WriteStream): LiveView {
  const write = (text: string) => out.write(`${text}\n`)
  if (out.isTTY && out.columns > 0) {
    const update = createLogUpdate(out)
    return { draw: (screen) => update(screen), say: (text) => update.persist(text), done: () => update.done() }
  }
  let last: { line: string; atMs: number } | undefined
  let pending: string | undefined
  return {
    draw(_screen, line) {
      pending = line
      if (last && performance.now() - last.atMs < LINE_MS) return
      if (line !== last?.line) write(line)
      last = { line, atMs: performance.now() }
      pending = undefined
    },
    say: write,
    done() {
      if (pending !== undefined && pending !== last?.line) write(pending)
      pending = undefined
    },
  }
}

/**
 * Draws what `line` gives, again and again, on standard error.
 *
 * @returns ends that, and leaves the last one standing
 */
export function keepDrawing(view: LiveView, line: () => string): () => void {
  const draw = () => {
    const text = line()
    view.draw(text, text)
  }
  const timer = setInterval(draw, process.stderr.isTTY ? TTY_DRAW_MS : LINE_DRAW_MS)
  return () => {
    clearInterval(timer)
    view.done()
  }
}

/** With its thousands set apart. */
export const number = (n: number) => n.toLocaleString('en-US')

/** Columns side by side, as wide as they need to be; numbers to the right. @param head undefined: the rows alone */
export function table(head: string[] | undefined, rows: (string | number)[][]): string {
  const lines = head ? [head, ...rows] : rows
  const widths = (lines[0] ?? []).map((_, i) => Math.max(...lines.map((line) => String(line[i]).length)))
  const isNumeric = widths.map((_, i) => rows.some((row) => typeof row[i] === 'number'))
  const printed = lines.map((line) => {
    const cells = line.map((value, i) => {
      const isToTheRight = line === head ? isNumeric[i] : typeof value === 'number'
      return isToTheRight ? String(value).padStart(widths[i]!) : String(value).padEnd(widths[i]!)
    })
    return `  ${cells.join('  ').trimEnd()}`
  })
  return printed.join('\n')
}
