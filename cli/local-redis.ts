/** Redis on this machine for `calltape up`, `calltape demo` and the tests; and how any local server is run and stopped. */
import { type ChildProcess, execFile, execFileSync, spawn, spawnSync } from 'node:child_process'
import { closeSync, existsSync, fstatSync, openSync, readFileSync } from 'node:fs'
import { mkdir, rm, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { delimiter, join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import getPort, { clearLockedPorts } from 'get-port'

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

/** Starts Redis (or Valkey) on loopback with its data in `dataDir`, synced to disk every second. */
export async function startRedis(o: LocalServerOptions & { args?: string[] }): Promise<LocalServer> {
  const say = o.say ?? (() => {})
  const dataDir = resolve(o.dataDir)
  const { command, version } = await findRedis({ say })
  await mkdir(dataDir, { recursive: true })
  const settings = '--bind 127.0.0.1 --protected-mode yes --daemonize no --databases 1024 --maxmemory-policy noeviction'
  const durable = ['--appendonly', 'yes', '--appendfsync', 'everysec', '--save', '']
  // With a process title of its own, `--dir` would vanish from the command line, where `marker` is looked for.
  const flags = ['--set-proc-title', 'no', ...settings.split(' '), ...durable, ...(o.args ?? [])]
  const { port, ...server } = await runServer({
    name: version,
    command,
    args: (port) => ['--dir', dataDir, '--port', `${port}`, ...flags],
    marker: `--dir ${dataDir} --port`,
    stopSignal: 'SIGTERM',
    files: dataDir,
    port: o.port,
    notReady,
    say,
  })
  const describe = `${version} on 127.0.0.1:${port}, data in ${dataDir}, log in ${dataDir}.log`
  return { url: `redis://127.0.0.1:${port}`, describe, ...server }
}

/** Whether it answers PING, and not -LOADING while it reads its data; and whether it is ours that answers. */
async function notReady(port: number, pid: number): Promise<string | undefined> {
  const answer = await new Promise<string>((done) => {
    let text = ''
    const socket = connect(port, '127.0.0.1', () => socket.write('INFO server\r\nPING\r\nQUIT\r\n'))
    socket.setTimeout(1000, () => socket.destroy(new Error('no answer to PING')))
    socket.on('data', (data) => {
      text += data.toString()
    })
    socket.once('error', (error) => done(error.message))
    socket.once('close', () => done(text))
  })
  return answer.includes(`process_id:${pid}\r`) && answer.includes('+PONG\r') ? undefined : answer
}

/** The first Redis or Valkey in `path` that is recent enough; as root on Debian or Ubuntu, installs one if there is none. */
export async function findRedis({
  path = process.env.PATH ?? '',
  isRoot = process.getuid?.() === 0,
  say = (_line: string) => {},
} = {}): Promise<{ command: string; version: string }> {
  const which = (name: string) =>
    path.split(delimiter).flatMap((dir) => (dir && existsSync(join(dir, name)) ? join(dir, name) : []))
  const find = () => [...which('redis-server'), ...which('valkey-server')]
  const has = (name: string) => which(name).length > 0
  if (find().length === 0 && isRoot && has('apt-get')) await installRedis(say)
  const found = find().map((command) => {
    const said = execFileSync(command, ['--version'], { encoding: 'utf8' })
    const [, product = command, number = '0'] = /^(\w+) server v=([\d.]+)/.exec(said) ?? []
    return { command, version: `${product} ${number}`, isRecent: Number.parseInt(number, 10) >= 7 }
  })
  const recent = found.find(({ isRecent }) => isRecent)
  if (recent) return recent
  if (found[0]) {
    const { version, command } = found[0]
    throw new Error(`${version} (${command}) is too old: install Redis 7.0 or later or Valkey, or set REDIS_URL to one`)
  }
  let install = 'install Redis 7.0 or later, or Valkey'
  if (has('apt-get')) install = 'run: sudo apt-get install redis-server'
  else if (has('dnf')) install = 'run: sudo dnf install valkey'
  else if (has('brew') || process.platform === 'darwin') install = 'run: brew install redis'
  throw new Error(`found no redis-server or valkey-server in PATH; ${install} (or set REDIS_URL to a server of yours)`)
}

async function installRedis(say: (line: string) => void) {
  say('found no redis-server; installing it: apt-get install redis-server')
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' }
  const apt = (...args: string[]) =>
    promisify(execFile)('apt-get', ['-qq', '-o', 'DPkg::Lock::Timeout=60', ...args], { env })
  const install = () => apt('install', '-y', '--no-install-recommends', 'redis-server')
  // Debian starts and enables a packaged server. Nobody asked for one on port 6379, unless it ran already.
  const service = (...verb: string[]) =>
    spawnSync('systemctl', [...verb, 'redis-server'], { stdio: 'ignore' }).status === 0
  const ranBefore = service('is-active')
  const policy = '/usr/sbin/policy-rc.d' // Debian asks this before it starts a service; an existing one is the owner's
  const isOurs = !existsSync(policy)
  if (isOurs) await writeFile(policy, '#!/bin/sh\ncase "$*" in *redis-server*) exit 101;; esac\n', { mode: 0o755 })
  try {
    // The package lists may be old or absent. If they are not what is wrong, the second try says what is.
    await install().catch(() => apt('update').then(install))
  } catch (cause) {
    throw new Error(`could not install redis-server (${cause}): install it yourself, or set REDIS_URL`, { cause })
  } finally {
    if (isOurs) await rm(policy)
  }
  if (!ranBefore && existsSync('/run/systemd/system')) service('disable', '--now')
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
      env: { ...process.env, LC_ALL: 'C' }, // English messages, and no locale that is not installed
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
