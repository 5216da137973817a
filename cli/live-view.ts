/** What commands show of long work: redrawn in place on a terminal, else a line a second. And tables. */
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

const LINE_MS = 1000

export function createLiveView(out: NodeJS.WriteStream): LiveView {
  const write = (text: string) => out.write(`${text}\n`)
  if (out.isTTY) {
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

/** Columns side by side, as wide as they need to be; numbers to the right. */
export function table(head: string[], rows: (string | number)[][]): string {
  const widths = head.map((name, i) => Math.max(name.length, ...rows.map((row) => String(row[i]).length)))
  const cell = (value: string | number, i: number) =>
    typeof value === 'number' ? String(value).padStart(widths[i]!) : value.padEnd(widths[i]!)
  const rightOf = head.map((_, i) => rows.some((row) => typeof row[i] === 'number'))
  const titles = head.map((name, i) => (rightOf[i] ? name.padStart(widths[i]!) : name.padEnd(widths[i]!)))
  return [titles, ...rows.map((row) => row.map(cell))].map((cells) => `  ${cells.join('  ').trimEnd()}`).join('\n')
}
