/** A Redis and a PostgreSQL of a test's own, to be killed and started again on the same data and port, or stopped for a while. */
import { chmod, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { startPostgres } from '../../cli/local-postgres.js'
import { startRedis } from '../../cli/local-redis.js'
import type { LocalServer } from '../../cli/local-server.js'
import { lastingPort } from './processes.js'

export class KillableStore {
  private isDown = false
  private isFrozen = false

  private constructor(
    private server: LocalServer,
    private readonly launch: () => Promise<LocalServer>,
    private readonly folder: string,
  ) {}

  /** Syncs every write before it answers: what it has said survives whatever happens to its process. */
  static redis(): Promise<KillableStore> {
    const args = ['--appendfsync', 'always']
    return KillableStore.open('redis', (dataDir, port) => startRedis({ dataDir, port, args }))
  }

  static postgres(): Promise<KillableStore> {
    const settings = { shared_buffers: '64MB' }
    return KillableStore.open('postgres', (dataDir, port) => startPostgres({ dataDir, port, settings }))
  }

  private static async open(name: string, run: (dataDir: string, port: number) => Promise<LocalServer>) {
    const folder = await mkdtemp(join(tmpdir(), `calltape-test-${name}-`))
    await chmod(folder, 0o711) // as root, PostgreSQL runs as another user, who has to get through
    const port = await lastingPort()
    const launch = () => run(join(folder, name), port)
    return new KillableStore(await launch(), launch, folder)
  }

  get url(): string {
    return this.server.url
  }

  /** Not so from `kill` until it has started again. */
  get isUp(): boolean {
    return !this.isDown
  }

  /** Resolves when its process is gone. */
  async kill(signal: NodeJS.Signals = 'SIGKILL'): Promise<void> {
    this.isDown = true
    process.kill(this.server.pid, signal)
    await this.server.exited
  }

  /** After `kill`; resolves when it serves again. @throws when its port has been taken meanwhile */
  async start(): Promise<void> {
    const { url } = this.server
    this.server = await this.launch()
    if (this.server.url !== url) throw new Error(`${url} has come back as ${this.server.url}`)
    this.isDown = false
  }

  async restart(signal: NodeJS.Signals): Promise<void> {
    await this.kill(signal)
    await this.start()
  }

  /** Its connections stay, and nobody answers. */
  freeze(): void {
    this.isFrozen = process.kill(this.server.pid, 'SIGSTOP')
  }

  thaw(): void {
    process.kill(this.server.pid, 'SIGCONT')
    this.isFrozen = false
  }

  /** At the test's end, however it stands. */
  async end(): Promise<void> {
    if (this.isFrozen) this.thaw() // frozen, it would not hear that it is to stop
    await this.server.stop()
    await rm(this.folder, { recursive: true, force: true })
  }
}
