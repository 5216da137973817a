/** `npm run test:faults`: the fault suites in their long form. */
import { defineConfig, mergeConfig } from 'vitest/config'
import base from './vitest.config.js'

const longFaults = { kills: 200, turns: 2_000_000, modelRuns: 2000 }

export default mergeConfig(base, defineConfig({ test: { provide: { longFaults } } }))
