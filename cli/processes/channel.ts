/** Questions and answers between a group's processes and the one that started them, over Node's IPC. */
import type { ChildProcess } from 'node:child_process'

export type Question = 'metrics' | 'ready' | 'alive'
type Message = { ask: number; what: Question } | { answer: number; value: unknown } | { answer: number; error: string }
type End = Pick<ChildProcess, 'on' | 'send'> | (NodeJS.Process & { send: NonNullable<NodeJS.Process['send']> })

export class Channel {
  private asked = 0
  private readonly waiting = new Map<number, { resolve(value: unknown): void; reject(error: Error): void }>()

  /** @param answers what else the other side may ask; what they throw is thrown there, as its message */
  constructor(
    private readonly end: End,
    private readonly answers: Record<Exclude<Question, 'alive'>, () => Promise<unknown>>,
  ) {
    const onMessage = (message: unknown) => this.receive(message as Partial<Message>)
    ;(end as ChildProcess).on('message', onMessage)
    ;(end as ChildProcess).on('disconnect', () => this.gone())
  }

  /** @throws what the other side throws; or that it is gone, or has not answered within `timeoutMs` */
  async ask(what: Question, timeoutMs: number): Promise<unknown> {
    const id = this.asked++
    let timer: NodeJS.Timeout | undefined
    try {
      return await new Promise((resolve, reject) => {
        this.waiting.set(id, { resolve, reject })
        const giveUp = () => reject(new Error(`no answer within ${timeoutMs} ms`))
        // Not before what has come is read: when this process is late itself, the answer may have been there for long.
        timer = setTimeout(() => setImmediate(giveUp), timeoutMs)
        this.send({ ask: id, what }, reject)
      })
    } finally {
      clearTimeout(timer)
      this.waiting.delete(id)
    }
  }

  private receive(message: Partial<Message>): void {
    if ('ask' in message) void this.reply(message as { ask: number; what: Question })
    if (!('answer' in message)) return
    const waiting = this.waiting.get(message.answer!)
    if ('error' in message) waiting?.reject(new Error(String(message.error)))
    else waiting?.resolve((message as { value: unknown }).value)
  }

  private async reply({ ask, what }: { ask: number; what: Question }): Promise<void> {
    const answer = what === 'alive' ? Promise.resolve() : this.answers[what]() // who can answer at all is alive
    const message = await answer.then(
      (value): Message => ({ answer: ask, value }),
      (error: Error): Message => ({ answer: ask, error: error.message }),
    )
    this.send(message, () => undefined) // who asked is gone
  }

  private send(message: Message, failed: (error: Error) => void): void {
    ;(this.end as ChildProcess).send(message, (error) => error && failed(error))
  }

  private gone(): void {
    for (const { reject } of this.waiting.values()) reject(new Error('it has ended'))
  }
}
