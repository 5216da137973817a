/** A Redis Cluster of processes of this machine: three masters with a replica each, to be killed, failed over, resharded. */
import { execFile } from 'node:child_process'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { Redis } from 'ioredis'
import { findRedis } from '../../cli/local-redis.js'
import { localRedis } from './local-stores.js'
import type { StoreServer } from './store-server.js'
import { until } from './until.js'

const run = promisify(execFile)

const MASTERS = 3
/** For a machine that has other things to do; a failover takes about this long and a second or two. */
const NODE_TIMEOUT_MS = 1500
const SETTLES_WITHIN_MS = 30_000

export interface ClusterOptions {
  /** Of each master: 1, or none. */
  replicas?: 0 | 1
  /** Beyond what each server is started with. */
  args?: string[]
}

/** A server as CLUSTER NODES has it. */
interface NodeState {
  id: string
  port: number
  flags: string[]
  master: string
  slots: [number, number][]
}

export class TestCluster {
  private readonly down = new Set<number>()

  private constructor(
    readonly servers: readonly StoreServer[],
    /** Of REDIS_URL: all of them, comma-separated. */
    readonly url: string,
    private readonly clients: Map<number, Redis>,
    private readonly hasReplicas: boolean,
  ) {}

  static async start({ replicas = 1, args = [] }: ClusterOptions = {}): Promise<TestCluster> {
    const settings = [
      ...['--cluster-node-timeout', String(NODE_TIMEOUT_MS)],
      ...['--cluster-require-full-coverage', 'no'], // a shard that is down takes no other one with it
      ...['--cluster-allow-replica-migration', 'no', '--cluster-replica-validity-factor', '0'],
      ...['--repl-diskless-sync-delay', '0', '--repl-ping-replica-period', '1'],
      ...args,
    ]
    const count = MASTERS * (1 + replicas)
    const servers: StoreServer[] = []
    // One after the other: two that looked for a free port at the same time would find the same one.
    for (let i = 0; i < count; i++) servers.push(await localRedis({ cluster: true, args: settings }))
    const addresses = servers.map(({ peer }) => `${peer.host}:${peer.port}`)
    const cli = (await findRedis()).command.replace(/-server$/, '-cli')
    await run(cli, ['--cluster', 'create', ...addresses, '--cluster-replicas', String(replicas), '--cluster-yes'])
    const clients = new Map(servers.map((server) => [server.peer.port, clientOf(server)]))
    const cluster = new TestCluster(servers, servers.map(({ url }) => url).join(','), clients, replicas > 0)
    await cluster.untilWhole()
    return cluster
  }

  /** A connection to that server alone. */
  client(port: number): Redis {
    return this.clients.get(port)!
  }

  server(port: number): StoreServer {
    return this.servers.find(({ peer }) => peer.port === port)!
  }

  /** As those see it who answer; an older view loses against a newer one. */
  async nodes(port?: number): Promise<NodeState[]> {
    const asked = port === undefined ? [...this.clients.values()] : [this.client(port)]
    const views = await Promise.allSettled(asked.map((client) => viewOf(client)))
    const found = views.flatMap((view) => (view.status === 'fulfilled' ? [view.value] : []))
    const [newest] = found.sort((a, b) => b.epoch - a.epoch)
    if (!newest) throw new Error('no server of the Cluster answers')
    return newest.nodes
  }

  /** The ports of those that have slots. */
  async masters(): Promise<number[]> {
    const nodes = await this.nodes()
    return nodes.filter(({ flags, slots }) => flags.includes('master') && slots.length > 0).map(({ port }) => port)
  }

  async masterOf(slot: number): Promise<number> {
    const nodes = await this.nodes()
    const owner = nodes.find(({ slots }) => slots.some(([from, to]) => slot >= from && slot <= to))
    if (!owner) throw new Error(`nobody has slot ${slot}`)
    return owner.port
  }

  async replicaOf(port: number): Promise<number> {
    const nodes = await this.nodes()
    const id = nodes.find((node) => node.port === port)?.id
    const replica = nodes.find(({ master, flags }) => master === id && !flags.some((flag) => flag.startsWith('fail')))
    if (!replica) throw new Error(`${port} has no replica`)
    return replica.port
  }

  /** Every slot has a master, and every master a replica that is in step. */
  async untilWhole(): Promise<void> {
    await until('the Cluster is whole', () => this.isWhole().catch(() => false), SETTLES_WITHIN_MS)
  }

  private async isWhole(): Promise<boolean> {
    for (const client of this.clients.values()) {
      const info = String(await client.call('CLUSTER', 'INFO'))
      if (!/cluster_state:ok/.test(info) || !/cluster_slots_ok:16384/.test(info)) return false
      const { nodes } = await viewOf(client)
      const masters = nodes.filter(({ flags, slots }) => flags.includes('master') && slots.length > 0)
      if (masters.length !== MASTERS || nodes.some(({ flags }) => flags.some((flag) => flag.startsWith('fail'))))
        return false
      const replication = await client.info('replication')
      if (/role:slave/.test(replication) && !/master_link_status:up/.test(replication)) return false
      const inStep = /role:slave/.test(replication) || /slave0:.*state=online/.test(replication)
      if (this.hasReplicas && !inStep) return false
    }
    return true
  }

  /** Ordered: the master hands over to its replica, and nothing is lost. @returns the new master's port */
  async failOver(master: number): Promise<number> {
    const replica = await this.replicaOf(master)
    await this.client(replica).call('CLUSTER', 'FAILOVER')
    await this.untilMaster(replica)
    return replica
  }

  /**
   * By SIGKILL: its replica takes over. It stays away.
   *
   * @param aheadMs for how long nothing that the master executed has come to the replica
   * @returns the new master's port
   */
  async killMaster(master: number, aheadMs = 0): Promise<number> {
    const replica = await this.replicaOf(master)
    if (aheadMs > 0) {
      await this.server(replica).signal('SIGSTOP')
      await this.client(master).call('CLIENT', 'KILL', 'TYPE', 'replica') // what it has sent would be read later on
      await sleep(aheadMs)
    }
    await this.kill(master)
    if (aheadMs > 0) await this.server(replica).signal('SIGCONT')
    await this.untilMaster(replica)
    return replica
  }

  /** It hangs until its replica has taken over, and then wakes up. @returns the new master's port */
  async hangMaster(master: number): Promise<number> {
    const replica = await this.replicaOf(master)
    await this.server(master).signal('SIGSTOP')
    try {
      await this.untilMaster(replica)
    } finally {
      await this.server(master).signal('SIGCONT')
    }
    return replica
  }

  async kill(port: number): Promise<void> {
    this.down.add(port)
    await this.server(port).kill()
  }

  /** Starts again what was killed, and waits until all are in step. */
  async restore(): Promise<void> {
    for (const port of this.down) await this.server(port).start()
    this.down.clear()
    await this.untilWhole()
  }

  private async untilMaster(port: number): Promise<void> {
    const isMaster = async () => (await this.nodes(port)).find((node) => node.port === port)?.flags.includes('master')
    await until(`${port} is a master`, () => isMaster().catch(() => false), SETTLES_WITHIN_MS)
  }

  /**
   * Moves a slot as `redis-cli --cluster reshard` does it, key by key.
   *
   * @param first these keys, before the others
   * @param onHalf when half of its keys have moved; with `first`, when those have
   */
  async moveSlot(
    slot: number,
    to: number,
    { first = [], onHalf }: { first?: string[]; onHalf?: () => Promise<void> } = {},
  ): Promise<void> {
    const nodes = await this.nodes()
    const idOf = (port: number) => nodes.find((node) => node.port === port)!.id
    const from = await this.masterOf(slot)
    if (from === to) return
    const [source, target] = [this.client(from), this.client(to)]
    const move = (keys: string[]) => source.call('MIGRATE', '127.0.0.1', to, '', 0, 5000, 'KEYS', ...keys)
    await target.call('CLUSTER', 'SETSLOT', slot, 'IMPORTING', idOf(from))
    await source.call('CLUSTER', 'SETSLOT', slot, 'MIGRATING', idOf(to))
    for (const key of first) await move([key])
    const half = first.length > 0 ? 0 : Number(await source.call('CLUSTER', 'COUNTKEYSINSLOT', slot)) / 2
    for (let moved = 0, isHalf = false; ; moved++) {
      if (!isHalf && moved >= half) {
        isHalf = true
        await onHalf?.()
      }
      const keys = (await source.call('CLUSTER', 'GETKEYSINSLOT', slot, 1)) as string[]
      if (keys.length === 0) break
      await move(keys)
    }
    for (const client of [target, source]) await client.call('CLUSTER', 'SETSLOT', slot, 'NODE', idOf(to))
  }

  async flush(): Promise<void> {
    for (const port of await this.masters()) await this.client(port).flushall()
  }

  async stop(): Promise<void> {
    for (const client of this.clients.values()) client.disconnect()
    await Promise.all(this.servers.map((server) => server.stop()))
  }
}

/** For the test's own questions: it comes back as the server does, and asks a replica as well as a master. */
function clientOf({ peer }: StoreServer): Redis {
  const client = new Redis({
    ...peer,
    maxRetriesPerRequest: 0,
    socketTimeout: 2000,
    enableOfflineQueue: true,
    retryStrategy: () => 100,
  })
  client.on('error', () => undefined) // whoever asks is told
  return client
}

async function viewOf(client: Redis): Promise<{ epoch: number; nodes: NodeState[] }> {
  const info = String(await client.call('CLUSTER', 'INFO'))
  const text = String(await client.call('CLUSTER', 'NODES'))
  const nodes = text
    .trim()
    .split('\n')
    .map((line) => {
      const [id = '', address = '', flags = '', master = '', , , , , ...slots] = line.split(' ')
      const ranges = slots.filter((range) => !range.startsWith('[')).map((range) => range.split('-').map(Number))
      return {
        id,
        port: Number(/:(\d+)@/.exec(address)?.[1]),
        flags: flags.split(','),
        master,
        slots: ranges.map(([from = 0, to = from]): [number, number] => [from, to]),
      }
    })
  return { epoch: Number(/cluster_current_epoch:(\d+)/.exec(info)?.[1]), nodes }
}
