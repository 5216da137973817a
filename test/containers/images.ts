/** The images of `npm run test:containers`, and what is not run in them. */
import { childEnvironment } from '../../shared/config.js'
import type { Images } from '../support/store-server.js'

const REDIS_IMAGES = 'redis:8.0,valkey/valkey:8.0'
const POSTGRES_IMAGE = 'postgres:17'

/** The suites run once with each. TEST_REDIS_IMAGES (comma-separated) and TEST_POSTGRES_IMAGE name others. */
export function imagePairs(): Images[] {
  const { TEST_REDIS_IMAGES, TEST_POSTGRES_IMAGE } = childEnvironment()
  const postgres = TEST_POSTGRES_IMAGE || POSTGRES_IMAGE
  return (TEST_REDIS_IMAGES || REDIS_IMAGES).split(',').map((redis) => ({ redis: redis.trim(), postgres }))
}

/** Whatever `npm test` runs beyond this is in NOT_IN_CONTAINERS. */
export const IN_CONTAINERS = ['test/**/*.test.ts']

/** Patterns of suites that `npm test` runs and `npm run test:containers` does not, and why. */
export const NOT_IN_CONTAINERS: Record<string, string> = {
  'cli/local-servers.test.ts': 'it is about the servers that run without containers',
  'test/cluster/**/*.test.ts': 'a Cluster of servers that find each other on loopback; npm run test:cluster',
  '{cli,client,ingest,sink,shared}/**/*.test.ts': 'units: they use neither Redis nor PostgreSQL',
}
