/** A Redis and a PostgreSQL of a test's own, to be killed and started again on the same data and port, or stopped for a while. */
import { inject } from 'vitest'
import { killableCluster } from './killable-cluster.js'
import { launchPostgres, launchRedis, type StoreServer } from './store-server.js'

export class KillableStore {
  private isDown = false

  private constructor(private readonly server: StoreServer) {}

  /** Syncs every write before it answers: what it has said survives whatever happens to its process. */
  static async redis(): Promise<KillableStore> {
    if (inject('cluster')) return new KillableStore(await killableCluster())
    return new KillableStore(await launchRedis(inject('images'), { args: ['--appendfsync', 'always'] }))
  }

  static async postgres(): Promise<KillableStore> {
    return new KillableStore(await launchPostgres(inject('images'), { settings: { shared_buffers: '64MB' } }))
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
    await this.server.kill(signal)
  }

  /** After `kill`; resolves when it serves again. @throws when its port has been taken meanwhile */
  async start(): Promise<void> {
    await this.server.start()
    this.isDown = false
  }

  async restart(signal: NodeJS.Signals): Promise<void> {
    await this.kill(signal)
    await this.start()
  }

  /** Its connections stay, and nobody answers. */
  async freeze(): Promise<void> {
    await this.server.signal('SIGSTOP')
  }

  async thaw(): Promise<void> {
    await this.server.signal('SIGCONT')
  }

  /** At the test's end, however it stands. */
  async end(): Promise<void> {
    await this.server.stop()
  }
}

/** The DURABILITY with which an ack outlives a `KillableStore.redis` that is killed. */
export const outlivesItsRedis = () => (inject('cluster') ? 'replicas:1' : 'fsync')
