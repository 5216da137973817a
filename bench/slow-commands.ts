/** Redis' slow log: how many commands kept all others waiting, and which was the worst. */
import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import type { Redis } from 'ioredis'
import { PACKAGE_ROOT } from '../shared/package-root.js'
import { Script } from '../shared/script.js'
import { type Figure, figure } from './report.js'

const SLOW_MICROS = 10_000
const MOST_ENTRIES = 1000
const SCRIPT_FOLDERS = ['ingest', 'sink']

/** id, epoch seconds, µs, command and arguments, … */
type Entry = [id: number, at: number, micros: number, command: string[]]

export async function watchSlowCommands(client: Redis): Promise<void> {
  await client.config('SET', 'slowlog-log-slower-than', SLOW_MICROS, 'slowlog-max-len', MOST_ENTRIES)
  await client.call('SLOWLOG', 'RESET')
}

/** Since `watchSlowCommands`. */
export async function readSlowCommands(client: Redis): Promise<Figure[]> {
  const entries = (await client.call('SLOWLOG', 'GET', MOST_ENTRIES)) as Entry[]
  const count = figure(`Redis commands over ${SLOW_MICROS / 1000} ms`, entries.length, '')
  if (entries.length === 0) return [count]
  const worst = entries.reduce((a, b) => (b[2] > a[2] ? b : a))
  return [count, figure(`the slowest, ${nameOf(worst[3])}`, worst[2] / 1000, 'ms')]
}

/** A script by its file. */
function nameOf([command = '', sha = '']: string[]): string {
  if (command.toLowerCase() !== 'evalsha') return command
  const files = SCRIPT_FOLDERS.flatMap((folder) =>
    readdirSync(join(PACKAGE_ROOT, folder)).flatMap((name) => (name.endsWith('.lua') ? `${folder}/${name}` : [])),
  )
  return files.find((file) => new Script(file).sha === sha) ?? 'a script'
}
