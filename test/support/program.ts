/** `calltape …` as a process. Needs a built dist/. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { childEnvironment, type Environment } from '../../shared/config.js'
import { PACKAGE_ROOT } from '../../shared/package-root.js'

export const PROGRAM = join(PACKAGE_ROOT, 'dist/cli/calltape.js')

/** Runs it to its end. */
export async function calltape(args: string[], environment: Environment) {
  const child = spawn(process.execPath, [PROGRAM, ...args], {
    env: childEnvironment(environment),
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  let [out, err] = ['', '']
  child.stdout.on('data', (data) => (out += data))
  child.stderr.on('data', (data) => (err += data))
  const [code] = (await once(child, 'close')) as [number]
  return { code, out, err }
}
