/** A Cluster, of which a master is killed where a suite kills its Redis: a replica takes over, and the dead one comes back as one. */
import type { StoreServer } from './store-server.js'
import { TestCluster } from './test-cluster.js'

export async function killableCluster(): Promise<StoreServer> {
  const cluster = await TestCluster.start()
  const anyMaster = async () => {
    const masters = await cluster.masters()
    return masters[Math.floor(Math.random() * masters.length)]!
  }
  let frozen: StoreServer | undefined
  return {
    url: cluster.url,
    get peer(): never {
      throw new Error('a Cluster has no address')
    },
    async signal(signal) {
      frozen ??= cluster.server(await anyMaster())
      await frozen.signal(signal)
      if (signal === 'SIGCONT') frozen = undefined
    },
    kill: async () => void (await cluster.killMaster(await anyMaster())),
    start: () => cluster.restore(),
    stop: () => cluster.stop(),
  }
}
