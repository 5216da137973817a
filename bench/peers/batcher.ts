/** Group commit: what arrives while a batch is being written makes up the next one. */
export class Batcher<T> {
  private waiting: T[] = []
  private resolvers: { resolve(): void; reject(error: unknown): void }[] = []
  private isWriting = false
  private scheduled = false

  /** @param most items of a batch */
  constructor(
    private readonly write: (items: T[]) => Promise<void>,
    private readonly most: number,
  ) {}

  /** Resolves when the item is written. */
  add(item: T): Promise<void> {
    const written = new Promise<void>((resolve, reject) => this.resolvers.push({ resolve, reject }))
    this.waiting.push(item)
    if (!this.scheduled) {
      this.scheduled = true
      setImmediate(() => {
        this.scheduled = false
        this.flush()
      })
    }
    return written
  }

  private flush(): void {
    if (this.isWriting || this.waiting.length === 0) return
    const items = this.waiting.splice(0, this.most)
    const resolvers = this.resolvers.splice(0, this.most)
    this.isWriting = true
    this.write(items)
      .then(
        () => {
          for (const { resolve } of resolvers) resolve()
        },
        (error) => {
          for (const { reject } of resolvers) reject(error)
        },
      )
      .finally(() => {
        this.isWriting = false
        this.flush()
      })
  }
}
