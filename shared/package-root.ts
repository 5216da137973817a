import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'

/** The folder of package.json: Lua and SQL files lie at the same place below it whether we run from source or from dist. */
export const PACKAGE_ROOT = dirname(createRequire(import.meta.url).resolve('calltape/package.json'))

export function readPackageFile(path: string): string {
  return readFileSync(join(PACKAGE_ROOT, path), 'utf8')
}
