import { availableParallelism } from 'node:os'
import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['{cli,client,ingest,sink,shared,test}/**/*.test.ts'],
    globalSetup: ['test/support/servers.ts'],
    maxWorkers: Math.max(3, availableParallelism() - 1), // suites wait for leases and time limits more than they compute
    pool: 'forks', // the WebSocket server is a native addon; a process each keeps one suite's crash its own
    testTimeout: 30_000,
    hookTimeout: 60_000,
  },
})
