/** A server's package of Debian or Ubuntu, installed without the service that comes with it. */
import { execFile, spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { rm, writeFile } from 'node:fs/promises'
import { promisify } from 'node:util'
import { childEnvironment } from '../shared/config.js'

/**
 * As root, with apt-get. A service of this name that runs already is left running.
 *
 * @throws when it cannot be installed
 */
export async function installPackage(name: string, say: (line: string) => void): Promise<void> {
  say(`found no ${name}; installing it: apt-get install ${name}`)
  const env = childEnvironment({ DEBIAN_FRONTEND: 'noninteractive' })
  const apt = (...args: string[]) =>
    promisify(execFile)('apt-get', ['-qq', '-o', 'DPkg::Lock::Timeout=60', ...args], { env })
  const install = () => apt('install', '-y', '--no-install-recommends', name)
  // Debian starts and enables a packaged server. Nobody asked for one on its usual port, unless it ran already.
  const service = (...verb: string[]) => spawnSync('systemctl', [...verb, name], { stdio: 'ignore' }).status === 0
  const ranBefore = service('is-active')
  const policy = '/usr/sbin/policy-rc.d' // Debian asks this before it starts a service; an existing one is the owner's
  const isOurs = !existsSync(policy)
  if (isOurs) await writeFile(policy, `#!/bin/sh\ncase "$*" in *${name}*) exit 101;; esac\n`, { mode: 0o755 })
  try {
    // The package lists may be old or absent. If they are not what is wrong, the second try says what is.
    await install().catch(() => apt('update').then(install))
  } finally {
    if (isOurs) await rm(policy)
  }
  if (!ranBefore && existsSync('/run/systemd/system')) service('disable', '--now')
}
