/** Whether containers can be had, and nothing stands in their way. */
import { getContainerRuntimeClient, getReaper } from 'testcontainers'
import { givenEnvironment } from '../../shared/config.js'

/** @throws with one line, and no stack: nothing is wrong where that would lead */
export async function expectDocker(): Promise<void> {
  const refuse = (reason: string): never => {
    const error = new Error(`npm run test:containers: ${reason}`)
    error.stack = ''
    throw error
  }
  const given = Object.keys(givenEnvironment()).filter((name) => name === 'REDIS_URL' || name === 'DATABASE_URL')
  if (given.length > 0) refuse(`${given.join(' and ')} would take the containers' place: unset it`)
  const docker = await getContainerRuntimeClient().catch(({ message }: Error) =>
    refuse(`no Docker answers (${message}): start it, or set DOCKER_HOST; npm test needs none`),
  )
  await getReaper(docker).catch(({ message }: Error) =>
    refuse(
      `Ryuk does not start (${message.trim()}): TESTCONTAINERS_RYUK_DISABLED=true does without, see vitest.containers.config.ts`,
    ),
  )
}
