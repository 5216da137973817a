/** Stores in containers, set up like the local ones. They want a Docker on this machine: suites connect to loopback. */
import { GenericContainer, getContainerRuntimeClient, type StartedTestContainer, Wait } from 'testcontainers'
import { POSTGRES_SETTINGS } from '../../cli/local-postgres.js'
import { REDIS_SETTINGS } from '../../cli/local-redis.js'
import { lastingPort } from './processes.js'
import type { PostgresOptions, RedisOptions, StoreServer } from './store-server.js'

const POSTGRES_PORT = 5432
const POSTGRES_DATA = '/var/lib/postgresql/data'
/** To PostgreSQL itself, which need not be the container's first process. */
const signalPostgres = (name: NodeJS.Signals) =>
  `kill -s ${name.slice('SIG'.length)} "$(head -n 1 ${POSTGRES_DATA}/postmaster.pid)"`
const START_MS = 120_000
/** Somebody else may take a free port before Docker does. */
const PORT_TRIES = 5

export async function redisContainer(image: string, { args = [], cluster }: RedisOptions): Promise<StoreServer> {
  const product = image.includes('valkey') ? 'valkey' : 'redis'
  const node = cluster ? ['--cluster-enabled', 'yes', '--cluster-announce-ip', '127.0.0.1'] : []
  return startContainer((port) => ({
    url: `redis://127.0.0.1:${port}`,
    inside: port, // a node of a Cluster tells its clients the port that it has itself
    container: new GenericContainer(image)
      .withCommand([
        ...[`${product}-server`, '--port', String(port), '--protected-mode', 'no', '--dir', '/data'],
        ...[...REDIS_SETTINGS, ...node, ...args],
      ])
      // Not by its log: Docker may say that it has started after it has said that it is ready, and then that line is not seen.
      .withWaitStrategy(Wait.forSuccessfulCommand(`${product}-cli -p ${port} ping | grep -q PONG`)),
  }))
}

export async function postgresContainer(image: string, { settings }: PostgresOptions): Promise<StoreServer> {
  const all = Object.entries({ ...POSTGRES_SETTINGS, ...settings })
  return startContainer((port) => ({
    url: `postgres://calltape:calltape@127.0.0.1:${port}/calltape`,
    inside: POSTGRES_PORT,
    container: new GenericContainer(image)
      .withEnvironment({ POSTGRES_USER: 'calltape', POSTGRES_PASSWORD: 'calltape', POSTGRES_DB: 'calltape' })
      .withEnvironment({ PGDATA: POSTGRES_DATA, LANG: 'C.UTF-8' }) // the databases' encoding and order
      .withCommand(['postgres', ...all.flatMap(([name, value]) => ['-c', `${name}=${value}`])])
      .withSharedMemorySize(256 * 1024 * 1024) // Docker's 64 MiB are too little for parallel queries
      // By TCP: while it initialises its data, it listens on a socket only.
      .withWaitStrategy(Wait.forSuccessfulCommand(`pg_isready -h 127.0.0.1 -p ${POSTGRES_PORT} -d calltape`)),
    signalWith: signalPostgres,
  }))
}

interface ContainerPlan {
  url: string
  /** The port within the container. */
  inside: number
  container: GenericContainer
  /** The shell command that sends a signal to the server; absent: it is the container's first process. */
  signalWith?: (signal: NodeJS.Signals) => string
}

/** On a port that we choose: with one that Docker chooses, it would come back on another after `kill`. */
async function startContainer(planFor: (port: number) => ContainerPlan): Promise<StoreServer> {
  for (let tries = 1; ; tries++) {
    const port = await lastingPort()
    const plan = planFor(port)
    plan.container.withExposedPorts({ container: plan.inside, host: port }).withStartupTimeout(START_MS)
    try {
      return await asStore(await plan.container.start(), plan)
    } catch (error) {
      const isTaken = /port is already allocated|address already in use/.test((error as Error).message)
      if (!isTaken || tries === PORT_TRIES) throw error
    }
  }
}

async function asStore(container: StartedTestContainer, plan: ContainerPlan): Promise<StoreServer> {
  const runtime = await getContainerRuntimeClient()
  const handle = runtime.container.getById(container.getId())
  const signal = async (name: NodeJS.Signals) => {
    if (name === 'SIGKILL' || !plan.signalWith) return void (await handle.kill({ signal: name }))
    const { exitCode, output } = await container.exec(['sh', '-c', plan.signalWith(name)])
    // Dying of it, the container may take the shell along.
    if (exitCode !== 0 && exitCode !== 137) throw new Error(`${name} was not sent (${exitCode}): ${output}`)
  }
  return {
    url: plan.url,
    get peer() {
      return { host: container.getIpAddress(container.getNetworkNames()[0]!), port: plan.inside }
    },
    signal,
    async kill(name = 'SIGKILL') {
      await signal(name)
      await handle.wait()
    },
    start: () => container.restart(),
    stop: async () => void (await container.stop()),
  }
}
