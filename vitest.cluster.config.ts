/**
 * `npm run test:cluster`: the suites on a Redis Cluster, and those of test/cluster in their long form. Wants redis-server and
 * redis-cli (or Valkey's) in PATH. `-- test/lease.test.ts` runs one suite.
 */
import { defineConfig, mergeConfig } from 'vitest/config'
import { NOT_ON_A_CLUSTER, ON_A_CLUSTER, TEST_NAMES } from './test/cluster/suites.js'
import base from './vitest.config.js'

const { include: _, ...common } = base.test!

export default mergeConfig(
  { test: common },
  defineConfig({
    test: {
      include: ON_A_CLUSTER,
      exclude: Object.keys(NOT_ON_A_CLUSTER),
      testNamePattern: TEST_NAMES,
      provide: { cluster: true },
      maxWorkers: 2, // each has Clusters of its own, of six servers
    },
  }),
)
