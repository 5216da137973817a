/**
 * Which partitions have news, and the bell for workers that sleep until some has. The news comes over a sharded pub/sub
 * channel, which may lose it (a cut connection): `all` is called on every reconnect and now and then, so that a lost
 * message costs a moment, never an event.
 *
 * Where several sinks share the work (share.ts), only news of this sink's own partitions is a hint to go and ask. That of the
 * others is noted: whether somebody takes it is seen later. (A sink that shares could also keep its second worker asleep for as long
 * as a small batch takes: fewer batches, a fifth less CPU at 3,000 turns/s with two sinks, but 11 ms instead of 3 until a turn is
 * committed.)
 */
export class Wake {
  private hints = new Set<number>()
  private noted = new Set<number>()
  private sleepers: (() => void)[] = []
  /** Undefined: all. */
  private own: ReadonlySet<number> | undefined

  constructor(private readonly partitions: number) {
    this.all()
  }

  /** @param own the numbers of the partitions that are this sink's from now on; undefined: all */
  share(own: ReadonlySet<number> | undefined): void {
    const before = this.own
    this.own = own
    const begun = this.every().filter((p) => this.owns(p) && before !== undefined && !before.has(p))
    for (const p of begun) this.noted.delete(p)
    for (const p of [...this.hints].filter((hint) => !this.owns(hint))) {
      this.hints.delete(p)
      this.noted.add(p)
    }
    this.hint(begun) // what there was of news went to whose they were
  }

  owns(partition: number): boolean {
    return this.own === undefined || this.own.has(partition)
  }

  /** There is a worker to spare: one sleeps, and nothing is to be asked. */
  get isIdle(): boolean {
    return this.hints.size === 0 && this.sleepers.length > 0
  }

  all(): void {
    this.news(this.every())
  }

  /** Calls of these partitions are ready. */
  news(partitions: number[]): void {
    if (this.own === undefined) {
      this.hint(partitions)
      return
    }
    for (const partition of partitions) if (!this.own.has(partition)) this.noted.add(partition)
    this.hint(partitions.filter((partition) => this.own?.has(partition)))
  }

  /** Hints at these partitions, whosever they are. */
  hint(partitions: number[]): void {
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

  /** Takes away what was noted of other sinks' partitions. As with `take`, before asking. */
  takeNoted(): Set<number> {
    const taken = this.noted
    this.noted = new Set()
    return taken
  }

  /** Resolves at once when there are hints, else when some arrive (or `ring` is called). */
  wait(): Promise<void> {
    if (this.hints.size > 0) return Promise.resolve()
    return new Promise((resolve) => this.sleepers.push(resolve))
  }

  private every(): number[] {
    return Array.from({ length: this.partitions }, (_, p) => p)
  }
}
