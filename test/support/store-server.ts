/** A Redis or a PostgreSQL of the suites': a process of this machine, or under `npm run test:containers` a container. */

export interface StoreServer {
  /** Stays the same when it is started again. */
  readonly url: string
  /** Where another store reaches it: loopback, seen from a container, is that container. */
  readonly peer: { host: string; port: number }
  /** SIGSTOP keeps its connections, and nobody answers; until SIGCONT. Resolves when it is sent. */
  signal(signal: NodeJS.Signals): Promise<void>
  /** Resolves when its process is gone; its data stay. */
  kill(signal?: NodeJS.Signals): Promise<void>
  /** After `kill`, on the same data and port; resolves when it serves again. @throws when its port has been taken meanwhile */
  start(): Promise<void>
  /** For good, however it stands, and with its data. */
  stop(): Promise<void>
}

/** The stores' images of one run in containers. */
export interface Images {
  redis: string
  postgres: string
}

export interface RedisOptions {
  /** Beyond what each of ours is started with. */
  args?: string[]
  /** The only node of a Cluster, without slots yet. */
  cluster?: boolean
  say?: (line: string) => void
}

export interface PostgresOptions {
  settings?: Record<string, string>
  say?: (line: string) => void
}

/** @param images undefined: a process of this machine */
export async function launchRedis(images: Images | undefined, options: RedisOptions = {}): Promise<StoreServer> {
  if (images === undefined) return (await import('./local-stores.js')).localRedis(options)
  return (await import('./container-stores.js')).redisContainer(images.redis, options)
}

/** @param images undefined: a process of this machine */
export async function launchPostgres(images: Images | undefined, options: PostgresOptions = {}): Promise<StoreServer> {
  if (images === undefined) return (await import('./local-stores.js')).localPostgres(options)
  return (await import('./container-stores.js')).postgresContainer(images.postgres, options)
}
