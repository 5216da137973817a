/**
 * Which partitions have news, and the bell for workers that sleep until some has. The news comes over a sharded pub/sub
 * channel, which may lose it (a cut connection): `all` is called on every reconnect and now and then, so that a lost
 * message costs a moment, never an event.
 */
export class Wake {
  private hints = new Set<number>()
  private sleepers: (() => void)[] = []

  constructor(private readonly partitions: number) {
    this.all()
  }

  all(): void {
    this.add(Array.from({ length: this.partitions }, (_, p) => p))
  }

  add(partitions: number[]): void {
    if (partitions.length === 0) return
    for (const partition of partitions) this.hints.add(partition)
    this.sleepers.shift()?.()
  }

  /** Wakes every sleeper, news or not: for shutting down. */
  ring(): void {
    for (const wake of this.sleepers.splice(0)) wake()
  }

  /**
   * Takes the hints away. To be called before asking Redis, not after its answer: news that arrives in between must stay.
   */
  take(): Set<number> {
    const taken = this.hints
    this.hints = new Set()
    return taken
  }

  /** Resolves at once when there are hints, else when some arrive (or `ring` is called). */
  wait(): Promise<void> {
    if (this.hints.size > 0) return Promise.resolve()
    return new Promise((resolve) => this.sleepers.push(resolve))
  }
}
