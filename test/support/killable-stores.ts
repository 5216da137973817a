/** A Redis and a PostgreSQL of a test's own, to be killed and started again on the same data and port. */
import { chmod, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { startPostgres } from '../../cli/local-postgres.js'
import { startRedis } from '../../cli/local-redis.js'
import type { LocalServer } from '../../cli/local-server.js'
import { lastingPort } from './processes.js'

export class KillableStore {
  restarts = 0
  private isDown = false

  private constructor(
    private server: LocalServer,
    private readonly launch: () => Promise<LocalServer>,
    private readonly folder: string,
  ) {}

  /** Syncs every write before it answers: what it has said survives whatever happens to its process. */
  static redis(): Promise<KillableStore> {
    const args = ['--appendfsync', 'always']
    return KillableStore.start('redis', (dataDir, port) => startRedis({ dataDir, port, args }))
  }

  static postgres(): Promise<KillableStore> {
    const settings = { shared_buffers: '64MB' }
    return KillableStore.start('postgres', (dataDir, port) => startPostgres({ dataDir, port, settings }))
  }

  private static async start(name: string, run: (dataDir: string, port: number) => Promise<LocalServer>) {
    const folder = await mkdtemp(join(tmpdir(), `calltape-faults-${name}-`))
    await chmod(folder, 0o711) // as root, PostgreSQL runs as another user, who has to get through
    const port = await lastingPort()
    const launch = () => run(join(folder, name), port)
    return new KillableStore(await launch(), launch, folder)
  }

  get url(): string {
    return this.server.url
  }

  get isUp(): boolean {
    return !this.isDown
  }

  /** Ends it with a signal, for as long as `downMs`, and starts it again; resolves when it serves. */
  async restart(signal: NodeJS.Signals, downMs = 0): Promise<void> {
    this.isDown = true
    const { url } = this.server
    process.kill(this.server.pid, signal)
    await this.server.exited
    if (downMs > 0) await new Promise((resolve) => setTimeout(resolve, downMs))
    this.server = await this.launch()
    if (this.server.url !== url) throw new Error(`${url} has come back as ${this.server.url}`)
    this.restarts++
    this.isDown = false
  }

  async end(): Promise<void> {
    await this.server.stop()
    await rm(this.folder, { recursive: true, force: true })
  }
}
