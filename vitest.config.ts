import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['{cli,client,ingest,sink,shared,test}/**/*.test.ts'],
    globalSetup: ['test/support/servers.ts'],
    pool: 'forks', // the WebSocket server is a native addon; a process each keeps one suite's crash its own
    testTimeout: 30_000,
    hookTimeout: 60_000,
  },
})
