/** PgBouncer in transaction mode, in front of the suites' PostgreSQL: found in PATH or installed. */
import { existsSync } from 'node:fs'
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { installPackage } from '../../cli/debian-package.js'
import { type LocalServer, runServer } from '../../cli/local-server.js'
import { childEnvironment } from '../../shared/config.js'
import { lastingPort } from './processes.js'

const say = (line: string) => process.stderr.write(`${line}\n`)
/** As root it refuses to run. */
const NOBODY = { uid: 65_534, gid: 65_534 }

/**
 * `pgbouncer` of PATH; as root on Debian or Ubuntu it is installed if it is missing.
 *
 * @returns undefined when there is none: it has been said why, and the suites then skip
 * @throws with CI=true, when it could not be installed where it can be
 */
export async function findPgBouncer(): Promise<string | undefined> {
  const which = (name: string) => {
    const path = `${childEnvironment().PATH ?? ''}${delimiter}/usr/sbin`
    const found = path.split(delimiter).find((dir) => dir !== '' && existsSync(join(dir, name)))
    return found && join(found, name)
  }
  const found = which('pgbouncer')
  if (found) return found
  let why = 'there is no pgbouncer in PATH'
  if (process.getuid?.() === 0 && which('apt-get')) {
    try {
      await installPackage('pgbouncer', say)
      const installed = which('pgbouncer')
      if (installed) return installed
    } catch (cause) {
      why = `pgbouncer could not be installed: ${cause}`
    }
    if (childEnvironment().CI === 'true') throw new Error(why)
  }
  say(`SKIPPED: nothing is tested through a pooler, because ${why}; run: sudo apt-get install pgbouncer`)
  return undefined
}

export class PgBouncer {
  private constructor(
    private readonly folder: string,
    private readonly port: number,
    private readonly launch: () => Promise<LocalServer>,
    private server: LocalServer,
  ) {}

  /**
   * Every database of the server behind it, each with a few connections that take turns: whoever expects to find again what it has
   * left on one does not.
   *
   * @param databaseUrl whose user and password log in, on both sides of it
   * @param settings of pgbouncer.ini
   */
  static async start(command: string, databaseUrl: string, settings: Record<string, string> = {}): Promise<PgBouncer> {
    const { hostname, port: behind, username, password } = new URL(databaseUrl)
    const folder = await mkdtemp(join(tmpdir(), 'calltape-test-pgbouncer-'))
    await chmod(folder, 0o755)
    const [users, config] = [join(folder, 'users.txt'), join(folder, 'pgbouncer.ini')]
    await writeFile(users, `"${decodeURIComponent(username)}" "${decodeURIComponent(password)}"\n`)
    const port = await lastingPort()
    const all = {
      listen_addr: '127.0.0.1',
      listen_port: String(port),
      unix_socket_dir: '',
      auth_type: 'plain',
      auth_file: users,
      pool_mode: 'transaction',
      default_pool_size: '2',
      max_client_conn: '200',
      server_round_robin: '1',
      ...settings,
    }
    const lines = Object.entries(all).map(([name, value]) => `${name} = ${value}`)
    const databases = `[databases]\n* = host=${hostname} port=${behind || 5432}\n`
    await writeFile(config, `${databases}[pgbouncer]\n${lines.join('\n')}\n`)
    const launch = async () => {
      const server = await runServer({
        name: 'PgBouncer',
        command,
        args: () => ['-q', config],
        marker: config,
        stopSignal: 'SIGTERM',
        files: join(folder, 'pgbouncer'),
        port,
        ...(process.getuid?.() === 0 ? { user: NOBODY } : {}),
        notReady,
        say,
      })
      if (server.port !== port) throw new Error(`port ${port} has been taken`)
      return { ...server, url: '', describe: '' }
    }
    return new PgBouncer(folder, port, launch, await launch())
  }

  /** @returns the same database through it */
  in(databaseUrl: string): string {
    const url = new URL(databaseUrl)
    url.host = `127.0.0.1:${this.port}`
    return url.href
  }

  /** Resolves when its process is gone. */
  async kill(): Promise<void> {
    process.kill(this.server.pid, 'SIGKILL')
    await this.server.exited
  }

  /** After `kill`, on the same port. */
  async restart(): Promise<void> {
    this.server = await this.launch()
  }

  async stop(): Promise<void> {
    await this.server.stop()
    await rm(this.folder, { recursive: true, force: true })
  }
}

function notReady(port: number): Promise<string | undefined> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1', () => {
      socket.destroy()
      resolve(undefined)
    })
    socket.once('error', (error) => resolve(error.message))
  })
}
