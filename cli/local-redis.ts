/** Redis on this machine, for `calltape up`, `calltape demo` and the tests. */
import { execFileSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdir } from 'node:fs/promises'
import { connect } from 'node:net'
import { delimiter, join, resolve } from 'node:path'
import { childEnvironment } from '../shared/config.js'
import { installPackage } from './debian-package.js'
import { type LocalServer, type LocalServerOptions, runServer } from './local-server.js'

/** All of them, wherever it runs: nothing is evicted, and what it has said is on disk within a second. */
export const REDIS_SETTINGS = [
  ...'--databases 1024 --maxmemory-policy noeviction --appendonly yes --appendfsync everysec'.split(' '),
  // Compressing what it rewrites of its append-only file costs 1.5 µs a turn, a sixth of all that Redis does for it.
  '--rdbcompression',
  'no',
  ...['--save', ''],
]

/** Starts Redis (or Valkey) on loopback with its data in `dataDir`, synced to disk every second. */
export async function startRedis(o: LocalServerOptions & { args?: string[] }): Promise<LocalServer> {
  const say = o.say ?? (() => {})
  const dataDir = resolve(o.dataDir)
  const { command, version } = await findRedis({ say })
  await mkdir(dataDir, { recursive: true })
  const local = '--bind 127.0.0.1 --protected-mode yes --daemonize no'.split(' ')
  // With a process title of its own, `--dir` would vanish from the command line, where `marker` is looked for.
  const flags = ['--set-proc-title', 'no', ...local, ...REDIS_SETTINGS, ...(o.args ?? [])]
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
  path = childEnvironment().PATH ?? '',
  isRoot = process.getuid?.() === 0,
  say = (_line: string) => {},
} = {}): Promise<{ command: string; version: string }> {
  const which = (name: string) =>
    path.split(delimiter).flatMap((dir) => (dir && existsSync(join(dir, name)) ? join(dir, name) : []))
  const find = () => [...which('redis-server'), ...which('valkey-server')]
  const has = (name: string) => which(name).length > 0
  if (find().length === 0 && isRoot && has('apt-get')) {
    await installPackage('redis-server', say).catch((cause) => {
      throw new Error(`could not install redis-server (${cause}): install it yourself, or set REDIS_URL`, { cause })
    })
  }
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
