/**
 * `npm run test:containers`: the suites with Redis and with Valkey in containers, one after the other, each with PostgreSQL.
 * Wants a Docker on this machine. `-- --project redis:8.0` runs one of them, `-- test/lease.test.ts` one suite in each.
 *
 * testcontainers lets a container of its own, Ryuk, remove what a killed run leaves behind. Where that image cannot be pulled, or
 * may not have Docker's socket, set TESTCONTAINERS_RYUK_DISABLED=true; then what is left is yours to remove.
 */
import { defineConfig } from 'vitest/config'
import { expectDocker } from './test/containers/docker.js'
import { IN_CONTAINERS, imagePairs, NOT_IN_CONTAINERS } from './test/containers/images.js'
import { ContainersReporter } from './test/containers/reporter.js'
import base from './vitest.config.js'

export default defineConfig(async () => {
  await expectDocker()
  const { include: _, globalSetup, ...common } = base.test!
  const suites = { include: IN_CONTAINERS, exclude: Object.keys(NOT_IN_CONTAINERS) }
  return {
    test: {
      ...common,
      reporters: ['default', new ContainersReporter()],
      projects: imagePairs().map((images, groupOrder) => ({
        extends: true as const, // of what stands above: a globalSetup there would run once more, for nobody
        test: {
          ...suites,
          globalSetup: globalSetup!,
          name: images.redis,
          provide: { images },
          sequence: { groupOrder },
        },
      })),
    },
  }
})
