/**
 * `npm run bench`: what calltape carries on this machine, what it costs, and what others would cost. All processes share the
 * machine's cores, the load generator too. Machines differ and are noisy: compare ratios, and CPU time a turn, within one run.
 *
 * Where to read on: scenarios.ts lists what is measured. The plainest scenario, end-to-end.ts, has all that the others are made of:
 * what is sent (load.ts), to which processes (processes.ts; the stores are context.ts), what they cost (machine.ts), whether every
 * row is as it was sent (verify.ts), and the line of the table (report.ts). backlog.ts is how sinks are handed a backlog at one
 * moment; peers.ts runs the programs in peers/; targets.ts has what is aimed at.
 */
import { closeSync, existsSync, mkdirSync, openSync, rmSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { availableParallelism, cpus } from 'node:os'
import { dirname } from 'node:path'
import { Command, InvalidArgumentError } from 'commander'
import { Bench, type BenchOptions } from './context.js'
import { killAll } from './processes.js'
import { Progress } from './progress.js'
import { rowsTable } from './report.js'
import { SCENARIOS, type Scenario } from './scenarios.js'
import { judge, targetsTable } from './targets.js'

interface Options {
  calls?: number
  turns?: number
  seconds?: number
  rounds?: number
  open?: number[]
  only?: Scenario[]
  quick?: true
  json: string
}

const FULL = { calls: 1000, turns: 200, seconds: 10, rounds: 3, open: [1000, 10_000, 100_000] }
const QUICK = { calls: 40, turns: 25, seconds: 1, rounds: 1, open: [100, 400] }
const EXIT_CODES = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 }
const EXIT_OPERATOR = 2
const EXIT_BUG = 70

function positive(text: string): number {
  if (!/^[1-9]\d{0,6}$/.test(text)) throw new InvalidArgumentError('a whole number from 1 on.')
  return Number(text)
}

function named(text: string): Scenario[] {
  const names = text.split(',').map((name) => name.trim())
  const unknown = names.filter((name) => !SCENARIOS.some((scenario) => scenario.name === name))
  if (unknown.length > 0) {
    const known = SCENARIOS.map(({ name }) => name).join(', ')
    throw new InvalidArgumentError(`there is no ${unknown.join(', ')}; there are ${known}.`)
  }
  return SCENARIOS.filter(({ name }) => names.includes(name))
}

const command = new Command('npm run bench --')
  .description(
    'Measures calltape, its ceilings and its peers on this machine. Everything it starts is its own, and goes with it.',
  )
  .option('--only <names>', 'some scenarios, comma-separated', named)
  .option('--calls <n>', `calls of a scenario (${FULL.calls})`, positive)
  .option('--turns <n>', `turns of a call (${FULL.turns})`, positive)
  .option('--seconds <n>', `how long a fixed rate lasts (${FULL.seconds})`, positive)
  .option('--rounds <n>', `at full speed: the median of so many counts (${FULL.rounds})`, positive)
  .option('--open <counts>', `calls that are open at once, comma-separated (${FULL.open})`, (text) =>
    text.split(',').map(positive),
  )
  .option('--quick', 'as little as shows that all of it works; no figure of it means anything')
  .option('--json <file>', 'where the figures go', 'bench.json')
  .addHelpText(
    'after',
    `\nScenarios:\n${SCENARIOS.map(({ name, about }) => `  ${name.padEnd(20)} ${about}`).join('\n')}`,
  )
  .exitOverride(({ exitCode }) => process.exit(exitCode && EXIT_OPERATOR))
  .parse()
const { json, only, quick, ...given } = command.opts<Options>()

// Before the run: the figures of a quarter of an hour must not be lost to a path that cannot be written. Those of the last run stay.
try {
  mkdirSync(dirname(json), { recursive: true })
  const isNew = !existsSync(json)
  closeSync(openSync(json, 'a'))
  if (isNew) rmSync(json) // who interrupts the run finds no empty file
} catch (error) {
  command.error(`error: option '--json ${json}': ${(error as Error).message}`)
}

const options: BenchOptions = { ...(quick ? QUICK : FULL), ...given, quick: quick === true }
const progress = new Progress()
const bench = new Bench(options, progress)
const failures: { scenario: string; reason: string }[] = []
let isInterrupted = false

function endWith(code: number, why: string): void {
  isInterrupted = true
  progress.say(`${why}: stopping everything that was started`)
  void bench.dispose().finally(() => process.exit(code))
}

// Handled for as long as the process lives: npm passes Ctrl-C on, so that it comes twice.
for (const [signal, code] of Object.entries(EXIT_CODES)) process.on(signal, () => endWith(code, signal))
process.on('uncaughtException', (error) => endWith(EXIT_BUG, error.stack ?? error.message))

async function runAll(scenarios: Scenario[]): Promise<void> {
  if (scenarios.some((scenario) => !scenario.isAlone)) await bench.startStores()
  bench.atEnd(killAll)
  for (const [index, { name, run }] of scenarios.entries()) {
    progress.begin(index + 1, scenarios.length, name)
    try {
      await run(bench)
    } catch (error) {
      if (isInterrupted) return
      const reason = (error as Error).message
      failures.push({ scenario: name, reason })
      progress.say(`${name} FAILED: ${reason}`)
      await killAll()
      if (bench.isBroken) return
    }
  }
}

function describeMachine(): string {
  const machine = `${availableParallelism()} cores, ${cpus()[0]?.model ?? 'unknown CPU'}, Node ${process.versions.node}`
  return [machine, ...bench.versions].join('; ')
}

async function report(seconds: number): Promise<void> {
  const machine = describeMachine()
  const targets = judge(bench.measured)
  const { rows, measured, extra, appendix } = bench
  console.log(`\n${machine}\n`)
  if (options.quick) console.log('--quick: all of it works, or not; no figure means anything.\n')
  if (rows.length > 0) {
    console.log(rowsTable(rows))
    console.log(
      '\nCPU time is that of all processes of a kind; a peer has its server under ingest, its worker under sink.',
    )
    if (!options.quick) console.log(`\n${targetsTable(targets)}`)
  }
  for (const each of appendix) console.log(`\n${each}`)
  for (const { scenario, reason } of failures) console.log(`\n${scenario} FAILED, its figures do not count: ${reason}`)
  const all = { machine, options, seconds, rows, targets, measured, ...extra, failures }
  await writeFile(json, `${JSON.stringify(all, null, 2)}\n`)
  console.log(`\nas JSON: ${json}`)
}

const began = performance.now()
try {
  await runAll(only ?? SCENARIOS)
} finally {
  await bench.dispose()
  progress.end()
}
if (!isInterrupted) {
  await report((performance.now() - began) / 1000)
  process.exit(failures.length > 0 ? 1 : 0) // a scenario that failed may have left connections that would keep it alive
}
