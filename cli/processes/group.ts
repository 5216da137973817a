/**
 * The processes of one service, and the one process that started them: it passes signals on, starts again what dies, and knows
 * what all of them say together. It is on no event's way.
 */

import type { Registry } from 'prom-client'
import type { Environment } from '../../shared/config.js'
import type { GroupStatus, MetricValues, Waiting } from '../../shared/group.js'
import type { Logger } from '../../shared/log.js'
import { createGroupMetrics } from '../../shared/metrics.js'
import { addUp } from './figures.js'
import { SupervisedProcess } from './supervised-process.js'
import { PATIENCE, type Patience } from './watchdog.js'

export interface GroupOptions {
  name: 'ingest' | 'sink'
  size: number
  /** Theirs, where it differs from ours. */
  environment: Environment
  /** With a process that does not answer; half a minute, if absent. */
  patience?: Patience
  log: Logger
}

export class ProcessGroup implements GroupStatus {
  private readonly processes: SupervisedProcess[] = []
  private isStopping = false
  private readonly own: Registry

  constructor(private readonly options: GroupOptions) {
    this.own = createGroupMetrics(options.name, options.size)
  }

  /**
   * The first one alone: what keeps it from starting would keep them all, and is told once.
   *
   * @returns where the first one listens
   * @throws NotStarted when one of them cannot start; the others are stopped
   */
  async start(): Promise<string> {
    try {
      const url = await this.add().start()
      const port = url === '' ? undefined : Number(new URL(url).port || (url.startsWith('https') ? 443 : 80))
      if (this.isStopping) return url
      const others = Array.from({ length: this.options.size - 1 }, () => this.add())
      if (port !== undefined) for (const child of this.processes) child.join(port)
      const started = await Promise.allSettled(others.map((child) => child.start()))
      for (const result of started) if (result.status === 'rejected') throw result.reason
      return url
    } catch (error) {
      await this.stop()
      throw error
    }
  }

  async stop(): Promise<void> {
    this.isStopping = true
    await Promise.all(this.processes.map((child) => child.stop()))
  }

  async metrics(): Promise<string> {
    const own = (await this.own.getMetricsAsJSON()) as MetricValues
    return addUp([own, ...(await Promise.all(this.processes.map((child) => child.metrics()))).flat()])
  }

  /** All that serve must be ready: whoever gets the next connection can do its job. One that is being started gets none. */
  async ready(): Promise<Waiting | undefined> {
    const serving = [...this.processes.entries()].filter(([, child]) => child.serves)
    if (serving.length === 0) throw new Error('no process serves')
    const ask = ([index, child]: [number, SupervisedProcess]) =>
      child.ready().catch((error: Error) => {
        throw new Error(`process ${index}: ${error.message}`)
      })
    return together((await Promise.all(serving.map(ask))).filter((waiting) => waiting !== undefined))
  }

  private add(): SupervisedProcess {
    const { name, size, environment, patience = PATIENCE, log } = this.options
    const index = this.processes.length
    const args = ['--member', `${index}/${size}`]
    const added = new SupervisedProcess({ name, index, args, environment, status: this, patience, log })
    this.processes.push(added)
    return added
  }
}

/** Several processes may have events of one partition, and the same to say of its server. */
function together(waiting: Waiting[]): Waiting | undefined {
  if (waiting.length === 0) return undefined
  const partitions = new Set(waiting.flatMap((each) => each.partitions))
  const reasons = new Set(waiting.map(({ reason }) => reason))
  return { partitions: [...partitions].sort((a, b) => a - b), reason: [...reasons].join('; ') }
}
