/** What goes wrong again and again is worth a line in the log the first time, and then now and then, until it is right again. */
const AGAIN_MS = 30_000

export class Nagging {
  private readonly saidAt = new Map<string, number>()

  /** @param what goes wrong; one line for each @returns whether it is to be said now: then it counts as said */
  isDue(what: string): boolean {
    const now = performance.now()
    const saidAt = this.saidAt.get(what)
    if (saidAt !== undefined && now - saidAt < AGAIN_MS) return false
    this.saidAt.set(what, now)
    return true
  }

  /** It is right again. @returns whether it had been said that it was not */
  isOver(what: string): boolean {
    return this.saidAt.delete(what)
  }

  /** Whatever had been said is not so any more. */
  allOver(): void {
    this.saidAt.clear()
  }

  /** What had been said, and is not over. */
  get said(): string[] {
    return [...this.saidAt.keys()]
  }
}
