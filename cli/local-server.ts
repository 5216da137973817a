/** How a local database server is run, watched and stopped, and what a killed calltape left running is found. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { closeSync, existsSync, fstatSync, openSync, readFileSync } from 'node:fs'
import { rm, writeFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import getPort, { clearLockedPorts } from 'get-port'
import { childEnvironment } from '../shared/config.js'

/** A database server that this process started on loopback. */
export interface LocalServer {
  url: string
  pid: number
  /** One line: what, version, port, data directory. */
  describe: string
  /** Resolves with the reason if the server ends without `stop()`; otherwise never. */
  exited: Promise<string>
  stop(): Promise<void>
}

/** What a caller may choose about a local server; `port` is a preference, another is used if it is taken. */
export interface LocalServerOptions {
  dataDir: string
  port?: number
  say?: (line: string) => void
}

/** What `runServer` needs to know of a server. */
export interface ServerPlan {
  name: string
  command: string
  args: (port: number) => string[]
  /** Part of its command line and of no other's: tells an orphan of ours from a stranger with a recycled pid. */
  marker: string
  stopSignal: 'SIGINT' | 'SIGTERM'
  /** Path beside which its log (`.log`) and pid file (`.pid`) lie. */
  files: string
  port: number | undefined
  user?: { uid: number; gid: number } | undefined
  /** Undefined once this server, and not another on the port, serves; else why not yet. Throws if waiting will not help. */
  notReady: (port: number, pid: number) => Promise<string | undefined>
  say: (line: string) => void
}

const STOP_MS = 10_000
const START_MS = 120_000 // replaying a long log after a crash takes its time
const RETRY_MS = 30_000

/** Starts a server and waits until it serves; an orphan on the same data is stopped first. */
export async function runServer(plan: ServerPlan): Promise<Omit<LocalServer, 'url' | 'describe'> & { port: number }> {
  await stopOrphan(plan)
  const lastTry = Date.now() + RETRY_MS
  for (;;) {
    clearLockedPorts() // get-port keeps back what it gave out for 15 s, and so a restarted server would lose its port
    const port = await getPort(plan.port === undefined ? {} : { port: plan.port })
    const log = openSync(`${plan.files}.log`, 'a')
    const logStart = fstatSync(log).size
    const child = spawn(plan.command, plan.args(port), {
      ...plan.user,
      cwd: '/', // ours may be closed to plan.user
      detached: true, // a process group of its own: the terminal's Ctrl-C is for us, who stop the stores last
      env: childEnvironment({ LC_ALL: 'C' }), // English messages, and no locale that is not installed
      stdio: ['ignore', log, log],
    })
    closeSync(log)
    const ended = new Promise<string>((done) => {
      child.once('error', (error) => done(error.message))
      child.once('exit', (code, signal) => done(signal ? `killed by ${signal}` : `exit code ${code}`))
    })
    if (child.pid) await writeFile(`${plan.files}.pid`, `${child.pid} ${process.pid}\n`)
    const failure = await failureToServe(child, ended, () => plan.notReady(port, child.pid ?? 0))
    const lines = () => readFileSync(`${plan.files}.log`).subarray(logStart).toString().trimEnd()
    const tail = () => `${plan.files}.log ends:\n${lines().split('\n').slice(-15).join('\n')}`
    if (failure === undefined) {
      if (plan.port && port !== plan.port) plan.say(`port ${plan.port} is taken: ${plan.name} listens on ${port}`)
      let isStopping = false
      return {
        port,
        pid: child.pid!,
        exited: new Promise((tell) => {
          ended.then((reason) => isStopping || tell(`${plan.name} ended unexpectedly (${reason}); ${tail()}`))
        }),
        async stop() {
          isStopping = true
          await terminate(
            (signal) => child.kill(signal),
            plan.stopSignal,
            () => isRunning(child),
          )
          await rm(`${plan.files}.pid`, { force: true })
        },
      }
    }
    // Two things that pass: another process took the port first, or a killed postmaster's child is not through yet.
    const mayPass = /address already in use|still in use/i.test(lines())
    if (!mayPass || Date.now() > lastTry) throw new Error(`${plan.name} did not start (${failure}); ${tail()}`)
    await sleep(300)
  }
}

const isRunning = (child: ChildProcess) => !!child.pid && child.exitCode === null && child.signalCode === null

/** Undefined once the server serves; or why it will not, and then it is gone. */
async function failureToServe(
  child: ChildProcess,
  ended: Promise<string>,
  notReady: () => Promise<string | undefined>,
) {
  const deadline = Date.now() + START_MS
  let failure: string | undefined
  for (let pause = 25; failure === undefined; pause = Math.min(pause * 1.2, 500)) {
    try {
      const reason = await notReady()
      if (!isRunning(child)) return ended
      if (reason === undefined) return undefined
      if (Date.now() > deadline) failure = `not ready after ${START_MS / 1000} s: ${reason}`
    } catch (error) {
      failure = error instanceof Error ? error.message : String(error)
    }
    await sleep(pause)
  }
  await terminate(
    (signal) => child.kill(signal),
    'SIGKILL',
    () => isRunning(child),
  )
  return failure
}

async function terminate(kill: (signal: NodeJS.Signals) => void, signal: NodeJS.Signals, isAlive: () => boolean) {
  const deadline = Date.now() + STOP_MS
  for (let next: NodeJS.Signals | undefined = signal; isAlive(); await sleep(10)) {
    if (next) kill(next)
    next = Date.now() > deadline ? 'SIGKILL' : undefined
  }
}

/** A calltape that was killed leaves its servers running. Those of one that lives are its own. */
async function stopOrphan({ name, files, marker, stopSignal, say }: ServerPlan) {
  if (!existsSync(`${files}.pid`)) return
  const [pid = 0, parent = 0] = readFileSync(`${files}.pid`, 'utf8').split(' ').map(Number)
  const isAlive = () => processInfo(pid).args.includes(marker)
  if (!isAlive()) return
  if (processInfo(pid).parent === parent) {
    throw new Error(
      `${files} is in use by another calltape (pid ${parent}): stop that one, or choose another directory`,
    )
  }
  say(`stopping ${name} (pid ${pid}), which a killed calltape left running`)
  await terminate((signal) => process.kill(pid, signal), stopSignal, isAlive)
}

/** A process's command line and parent; an empty command line if there is no such process or it is a zombie. */
export function processInfo(pid: number): { args: string; parent: number } {
  if (process.platform === 'linux') {
    try {
      const parent = /^PPid:\s*(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]
      return { args: readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' '), parent: Number(parent) }
    } catch {
      return { args: '', parent: 0 } // these files are missing only if the process is
    }
  }
  const { stdout } = spawnSync('ps', ['-ww', '-o', 'ppid=,args=', '-p', `${pid}`], { encoding: 'utf8' })
  const [, parent, args = ''] = /^\s*(\d+) (.*)$/m.exec(stdout) ?? []
  return { args, parent: Number(parent) }
}
