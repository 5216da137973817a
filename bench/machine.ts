/** What processes cost: CPU time and memory, from /proc. Elsewhere than on Linux nothing is measured: every figure is 0. */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'

const TICK_MICROS = 10_000 // USER_HZ is 100 on every Linux
const SAMPLE_MS = 500
const KIB_A_MIB = 1024

/** Process ids by what they are: several ingests are one `ingest`. `client` is this process, without its children. */
export type Pids = Record<string, number[]>

export interface Usage {
  /** CPU time a turn, µs, by process. */
  cpuMicros: Record<string, number>
  /** How many cores they kept busy, by process. */
  cores: Record<string, number>
  /** The same of the busiest of several: of PostgreSQL's connections, say. */
  busiest: Record<string, number>
  /** Peak resident memory, MiB. */
  peakMiB: Record<string, number>
  /** Busy cores of the machine, whoever used them. */
  machineCores: number
  /** Share of the time that a hypervisor gave to others. */
  stolen: number
}

/** What is in /proc/PID/<file>; undefined when the process has ended, or this is no Linux. */
function read(pid: number | 'self', file: string): string | undefined {
  try {
    return readFileSync(`/proc/${pid}/${file}`, 'utf8')
  } catch {
    return undefined
  }
}

/** Behind the command's name, which may hold anything: fields 3, 4, … of proc_pid_stat(5). */
function statFields(pid: number): string[] | undefined {
  const stat = read(pid, 'stat')
  return stat?.slice(stat.lastIndexOf(')') + 2).split(' ')
}

/** CPU time of a process, and of its children that have ended, µs. */
function processCpu(pid: number): { own: number; ended: number } {
  const [user = 0, system = 0, endedUser = 0, endedSystem = 0] = statFields(pid)?.slice(11, 15).map(Number) ?? []
  return { own: (user + system) * TICK_MICROS, ended: (endedUser + endedSystem) * TICK_MICROS }
}

function childrenByParent(): Map<number, number[]> {
  const children = new Map<number, number[]>()
  let names: string[] = []
  try {
    names = readdirSync('/proc')
  } catch {
    return children // no Linux
  }
  for (const name of names) {
    const parent = /^\d+$/.test(name) ? statFields(Number(name))?.[1] : undefined
    if (parent !== undefined) children.set(Number(parent), [...(children.get(Number(parent)) ?? []), Number(name)])
  }
  return children
}

/** The processes and all below them: PostgreSQL has one for each connection. Of this process: only itself. */
function trees(roots: number[]): number[] {
  const children = childrenByParent()
  const below = (pid: number): number[] =>
    pid === process.pid ? [pid] : [pid, ...(children.get(pid) ?? []).flatMap(below)]
  return roots.flatMap(below)
}

type CpuTimes = Map<number, ReturnType<typeof processCpu>>

function cpuOf(roots: number[]): CpuTimes {
  return new Map(trees(roots).map((pid) => [pid, processCpu(pid)]))
}

/** What each has used since; one that was not there began at 0. */
function cpuBetween(before: CpuTimes, after: CpuTimes): { all: number; busiest: number } {
  const own = [...after].map(([pid, { own }]) => own - (before.get(pid)?.own ?? 0))
  // This process's children are the others.
  const ended = [...after].map(([pid, { ended }]) => (pid === process.pid ? 0 : ended - (before.get(pid)?.ended ?? 0)))
  // Of a child that has ended meanwhile its parent has all that it ever used.
  const earlier = [...before].map(([pid, { own }]) => (after.has(pid) ? 0 : -own))
  return { all: [...own, ...ended, ...earlier].reduce((sum, micros) => sum + micros, 0), busiest: Math.max(0, ...own) }
}

function statusMiB(pid: number, field: string): number {
  const kib = new RegExp(`^${field}:\\s+(\\d+)`, 'm').exec(read(pid, 'status') ?? '')?.[1]
  return Number(kib ?? 0) / KIB_A_MIB
}

/** Resident memory of processes, MiB. */
export const residentMiB = (pids: number[]) => pids.reduce((sum, pid) => sum + statusMiB(pid, 'VmRSS'), 0)

/** Starts the peak anew. Where that is not allowed, VmHWM is the peak since the process began. */
function resetPeak(pid: number): void {
  try {
    writeFileSync(`/proc/${pid}/clear_refs`, '5')
  } catch {
    // another user's process, or no Linux
  }
}

/** What a server's processes take together: what they share counts once. */
function sharedTreeMiB(roots: number[]): number {
  const all = trees(roots)
  const own = all.reduce((sum, pid) => sum + statusMiB(pid, 'RssAnon'), 0)
  return own + Math.max(0, ...all.map((pid) => statusMiB(pid, 'RssShmem')))
}

/** Jiffies of all cores: busy, stolen, all. */
function machineTimes(): { busy: number; stolen: number; all: number } {
  const stat = read('self', '../stat')?.split('\n')[0]?.trim().split(/\s+/).slice(1, 9).map(Number) ?? []
  const [user = 0, nice = 0, system = 0, idle = 0, wait = 0, irq = 0, softIrq = 0, stolen = 0] = stat
  const busy = user + nice + system + irq + softIrq
  return { busy, stolen, all: busy + idle + wait + stolen }
}

/** Measures from its construction on. */
export class Meter {
  private readonly began = performance.now()
  private readonly machine = machineTimes()
  private readonly cpu: Record<string, CpuTimes>
  private postgresMiB = 0
  private readonly timer: NodeJS.Timeout

  constructor(private readonly pids: Pids) {
    // Redis without its children: a rewrite of the append-only file would count what it shares twice.
    for (const [name, roots] of Object.entries(pids)) for (const pid of this.measured(name, roots)) resetPeak(pid)
    this.sample()
    this.timer = setInterval(() => this.sample(), SAMPLE_MS)
    this.timer.unref()
    this.cpu = Object.fromEntries(Object.entries(pids).map(([name, roots]) => [name, cpuOf(roots)]))
  }

  /** The same as `read`, for the last time. */
  stop(units: number): Usage {
    clearInterval(this.timer)
    return this.read(units)
  }

  /** @param units what was done so far, usually turns */
  read(units: number): Usage {
    const used = Object.fromEntries(
      Object.entries(this.pids).map(([name, roots]) => [name, cpuBetween(this.cpu[name]!, cpuOf(roots))]),
    )
    const elapsedMicros = (performance.now() - this.began) * 1000
    const now = machineTimes()
    this.sample()
    const each = <T>(from: Record<string, T>, to: (value: T, name: string) => number) =>
      Object.fromEntries(Object.entries(from).map(([name, value]) => [name, to(value, name)]))
    const all = Math.max(1, now.all - this.machine.all)
    return {
      cpuMicros: each(used, ({ all }) => all / Math.max(1, units)),
      cores: each(used, ({ all }) => all / elapsedMicros),
      busiest: each(used, ({ busiest }) => busiest / elapsedMicros),
      peakMiB: each(this.pids, (roots, name) => this.peakMiB(name, roots)),
      machineCores: ((now.busy - this.machine.busy) / all) * availableParallelism(),
      stolen: (now.stolen - this.machine.stolen) / all,
    }
  }

  private measured(name: string, roots: number[]): number[] {
    return name === 'redis' ? roots : trees(roots)
  }

  private peakMiB(name: string, roots: number[]): number {
    if (name === 'postgres') return this.postgresMiB
    return this.measured(name, roots).reduce((sum, pid) => sum + statusMiB(pid, 'VmHWM'), 0)
  }

  private sample(): void {
    if (this.pids.postgres) this.postgresMiB = Math.max(this.postgresMiB, sharedTreeMiB(this.pids.postgres))
  }
}

export interface Speed {
  turnsPerSecond: number
  usage: Usage
}

/** How fast `work` does so many turns, and what it costs. */
export async function measure(pids: Pids, turns: number, work: () => Promise<void>): Promise<Speed> {
  const meter = new Meter(pids)
  const began = performance.now()
  await work()
  const seconds = (performance.now() - began) / 1000
  return { turnsPerSecond: turns / seconds, usage: meter.stop(turns) }
}

/** CPU µs a turn over all processes but the load generator. */
export function pipelineMicros({ cpuMicros }: Usage): number {
  return Object.entries(cpuMicros).reduce((sum, [name, micros]) => sum + (name === 'client' ? 0 : micros), 0)
}

/** Of a core. */
const SATURATED = 0.85
/** Of the time; taken away by a hypervisor. */
const NOTICED = 0.02

/** In words: how busy the machine was, and which processes had no more to give. */
export function saturated({ busiest, machineCores, stolen }: Usage): string {
  const full = Object.entries(busiest).filter(([, cores]) => cores >= SATURATED)
  const parts = full.sort(([, a], [, b]) => b - a).map(([name, cores]) => `${name} ${cores.toFixed(2)}`)
  const machine = `machine ${machineCores.toFixed(1)}/${availableParallelism()}`
  return [stolen > NOTICED ? `${machine} (${Math.round(stolen * 100)} % stolen)` : machine, ...parts].join(', ')
}
