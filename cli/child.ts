/** A program of ours as a child process, which tells its URL over IPC once it serves. */
import { type ChildProcess, fork, type StdioOptions } from 'node:child_process'
import { closeSync, openSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { childEnvironment, type Environment } from '../shared/config.js'
import { PACKAGE_ROOT } from '../shared/package-root.js'

/** `calltape` itself. */
export const PROGRAM = 'dist/cli/calltape.js'

/** Above what a service gives itself to finish. */
const STOP_TIMEOUT_MS = 15_000

/** It ended before it served; why, it has said itself. */
export class NotStarted extends Error {
  constructor(
    readonly exitCode: number | null,
    how: string,
  ) {
    super(how)
  }
}

export interface Child {
  process: ChildProcess
  /** Where it listens; empty for one that listens nowhere. Rejects with NotStarted, or the system's error. */
  serving: Promise<string>
}

/**
 * @param path of the program, below the package's root
 * @param output a file that what it prints is appended to, or `inherit`
 */
export function startChild(path: string, args: string[], environment: Environment, output: string): Child {
  const log = output === 'inherit' ? output : openSync(output, 'a')
  const stdio: StdioOptions = ['ignore', log, log, 'ipc']
  const child = fork(join(PACKAGE_ROOT, path), args, {
    env: childEnvironment(environment),
    execArgv: [],
    stdio,
    serialization: 'advanced', // JSON has no NaN, which metrics have
    detached: true, // Ctrl-C is for us: we stop all of them, in their order
  })
  if (typeof log === 'number') closeSync(log)
  const serving = new Promise<string>((resolve, reject) => {
    child.on('message', ({ url }: { url?: string }) => url !== undefined && resolve(url))
    child.once('exit', (code, signal) => reject(new NotStarted(code, describeEnd(code, signal))))
    child.once('error', reject)
  })
  return { process: child, serving }
}

export const describeEnd = (code: number | null, signal: NodeJS.Signals | null) => signal ?? `exit code ${code}`

export const hasEnded = (child: ChildProcess) =>
  child.pid === undefined || child.exitCode !== null || child.signalCode !== null

/**
 * Ends it, by SIGKILL if it does not go in time, and resolves when it is gone.
 *
 * @returns whether it went by itself
 */
export async function stopChild(
  child: ChildProcess,
  signal: NodeJS.Signals = 'SIGTERM',
  timeoutMs = STOP_TIMEOUT_MS,
): Promise<boolean> {
  if (hasEnded(child)) return true
  const exited = new Promise<true>((resolve) => child.once('exit', () => resolve(true)))
  child.kill(signal)
  // Unreferenced, so that the timer that is no longer needed does not keep the process alive.
  if (await Promise.race([exited, sleep(timeoutMs, false, { ref: false })])) return true
  child.kill('SIGKILL')
  await exited
  return false
}

/** What it has printed to that file at last. */
export function lastLines(file: string): string {
  return readFileSync(file, 'utf8').trim().split('\n').slice(-8).join('\n')
}
