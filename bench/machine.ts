/** What processes cost: CPU time and memory, from /proc. Elsewhere than on Linux nothing is measured. */
import { readdirSync, readFileSync } from 'node:fs'

const TICK_MICROS = 10_000 // USER_HZ is 100 on every Linux

/** Of a process and of its children that have ended, µs. */
function processCpu(pid: number): number {
  const fields = statFields(pid)
  return fields ? fields.slice(11, 15).reduce((sum, ticks) => sum + Number(ticks), 0) * TICK_MICROS : 0
}

/** Behind the command's name, which may hold anything: fields 3, 4, … of proc_pid_stat(5). */
function statFields(pid: number): string[] | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')
  } catch {
    return undefined // it has ended, or this is no Linux
  }
}

/** CPU time of a process and all its children, µs: PostgreSQL has a process for each connection. */
function treeCpu(pid: number): number {
  const children = (parent: number) => processes().filter((each) => each.parent === parent)
  return processCpu(pid) + children(pid).reduce((sum, child) => sum + treeCpu(child.pid), 0)
}

function processes(): { pid: number; parent: number }[] {
  let names: string[]
  try {
    names = readdirSync('/proc')
  } catch {
    return [] // no Linux
  }
  return names.flatMap((name) => {
    const fields = /^\d+$/.test(name) ? statFields(Number(name)) : undefined
    return fields ? [{ pid: Number(name), parent: Number(fields[1]) }] : []
  })
}

/** Resident memory of one process, MiB. */
export function residentMiB(pid: number): number {
  try {
    return Number(/^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? 0) / 1024
  } catch {
    return 0 // it has ended, or this is no Linux
  }
}

/** By name; our own process is counted without its children, which are the others. */
export type Pids = Record<string, number>

const cpuOf = (pid: number) => (pid === process.pid ? processCpu(pid) : treeCpu(pid))

/** CPU µs a unit of work of each process, since `start`. */
export function cpuSince(start: Record<string, number>, pids: Pids, units: number): Record<string, number> {
  return Object.fromEntries(
    Object.entries(pids).map(([name, pid]) => [name, (cpuOf(pid) - (start[name] ?? 0)) / units]),
  )
}

export function cpuNow(pids: Pids): Record<string, number> {
  return Object.fromEntries(Object.entries(pids).map(([name, pid]) => [name, cpuOf(pid)]))
}
