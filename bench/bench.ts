/**
 * `npm run bench`: what calltape carries on this machine, and what it costs. All processes share the machine's cores, the
 * load generator too. Machines differ and are noisy: compare ratios, and CPU time a turn, within one run.
 */
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { availableParallelism, cpus, tmpdir } from 'node:os'
import { join } from 'node:path'
import { Command } from 'commander'
import { startPostgres } from '../cli/local-postgres.js'
import { startRedis } from '../cli/local-redis.js'
import { migrate } from '../shared/schema.js'
import { drain } from './drain.js'
import { endToEnd } from './end-to-end.js'
import { openCalls } from './open-calls.js'
import { replayTables } from './replay.js'
import { type Bench, databaseOf, type Result } from './scenario.js'

const options = new Command('bench')
  .description('measure calltape: end to end, latency, backlog drain against plain COPY, replay, many open calls')
  .option('--calls <n>', 'calls in a scenario', Number, 1000)
  .option('--turns <n>', 'turns a call', Number, 200)
  .option('--seconds <n>', 'how long the scenarios with a fixed rate last', Number, 10)
  .option('--only <name>', 'one scenario: end-to-end, drain, open-calls or replay')
  .option('--json <file>', 'where the figures go', 'bench.json')
  .parse()
  .opts<{ calls: number; turns: number; seconds: number; only?: string; json: string }>()

async function main(): Promise<void> {
  const say = (line: string) => console.error(`  ${line}`)
  const folder = await mkdtemp(join(tmpdir(), 'calltape-bench-'))
  await chmod(folder, 0o711) // as root, PostgreSQL runs as another user, who has to get through
  const redis = await startRedis({ dataDir: join(folder, 'redis'), say })
  // Commit timestamps tell when a row was there for others to see, to the microsecond.
  const settings = { track_commit_timestamp: 'on', max_wal_size: '4GB', checkpoint_timeout: '30min' }
  const postgres = await startPostgres({ dataDir: join(folder, 'postgres'), settings, say })
  const results: Result[] = []
  try {
    const bench: Bench = { ...options, redis, postgres, folder, say }
    await migrate(databaseOf(bench))
    const wanted = (name: string) => options.only === undefined || options.only === name
    if (wanted('end-to-end')) results.push(...(await endToEnd(bench)))
    if (wanted('drain')) results.push(...(await drain(bench)))
    if (wanted('replay')) results.push(...(await replayTables(bench)))
    if (wanted('open-calls')) results.push(...(await openCalls(bench)))
  } finally {
    await Promise.all([redis.stop(), postgres.stop()])
    await rm(folder, { recursive: true, force: true })
  }
  const machine = `${availableParallelism()} cores, ${cpus()[0]?.model ?? 'unknown CPU'}, Node ${process.versions.node}`
  console.log(`\n${machine}; ${redis.describe.split(' on ')[0]}, AOF everysec; ${postgres.describe.split(' on ')[0]}\n`)
  const columns = ['scenario', 'figure', 'value', 'unit'] as const
  const widths = columns.map((column) => Math.max(column.length, ...results.map((r) => r[column].length)))
  for (const row of [{ scenario: 'scenario', figure: 'figure', value: 'value', unit: 'unit' }, ...results]) {
    const cells = columns.map((column, i) =>
      column === 'value' ? row[column].padStart(widths[i]!) : row[column].padEnd(widths[i]!),
    )
    console.log(cells.join('  ').trimEnd())
  }
  await writeFile(options.json, `${JSON.stringify({ machine, options, results }, null, 2)}\n`)
  console.log(`\nas JSON: ${options.json}`)
}

await main()
