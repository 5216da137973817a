/** `npm run test:faults`: the fault suites in their long form. */
import { defineConfig, mergeConfig } from 'vitest/config'
import base from './vitest.config.js'

export default mergeConfig(base, defineConfig({ test: { provide: { longFaults: { kills: 200, turns: 2_000_000 } } } }))
