/** `npm run bench`, in its quick form: what it counts it has verified, and what it started is gone afterwards. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmod, mkdtemp, readdir, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { idealSpread } from '../bench/binomial.js'
import { Meter } from '../bench/machine.js'
import type { Row } from '../bench/report.js'
import { crc16 } from '../bench/skew.js'
import { judge, type Measured, type Verdict } from '../bench/targets.js'
import { childEnvironment } from '../shared/config.js'
import { PACKAGE_ROOT } from '../shared/package-root.js'
import { until } from './support/stores.js'

interface Figures {
  rows: Row[]
  targets: Verdict[]
  measured: Measured
  skew: { spreads: Spread[]; ideals: Ideal[] }
  failures: unknown[]
}
interface Spread {
  kind: string
  calls: number
  partitions: number
  maxToMean: number
}
type Ideal = ReturnType<typeof idealSpread> & { calls: number; partitions: number }

let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'calltape-test-bench-'))
  await chmod(folder, 0o711) // as root, PostgreSQL runs as another user, who has to get through
})
afterEach(async () => await rm(folder, { recursive: true, force: true }))

/** Whatever it makes is in `folder`, and whatever it starts has that in its environment. */
function startBench(...args: string[]) {
  const child = spawn(process.execPath, [join(PACKAGE_ROOT, 'dist/bench/bench.js'), ...args], {
    cwd: folder,
    env: childEnvironment({ TMPDIR: folder }),
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const output = { out: '', err: '' }
  child.stdout.on('data', (data) => {
    output.out += data
  })
  child.stderr.on('data', (data) => {
    output.err += data
  })
  return { child, output, ended: once(child, 'close').then(([code]) => code as number) }
}

/** Command lines of processes that were started by that bench. */
async function remaining(): Promise<string[]> {
  const found: string[] = []
  for (const pid of await readdir('/proc')) {
    if (!/^\d+$/.test(pid)) continue
    const read = (file: string) => readFile(join('/proc', pid, file), 'utf8').catch(() => '') // it has just ended
    if ((await read('environ')).includes(`TMPDIR=${folder}`)) found.push((await read('cmdline')).replaceAll('\0', ' '))
  }
  return found
}

const onLinux = test.skipIf(process.platform !== 'linux')

test('what_cannot_be_is_refused_before_anything_runs_with_2', async () => {
  for (const [args, reason] of [
    [['--calls', 'many'], /--calls <n>.*a whole number from 1 on/],
    [['--only', 'nothing'], /there is no nothing; there are end-to-end/],
    [['--json', join(PACKAGE_ROOT, 'package.json', 'x.json')], /--json \/.*x\.json': \w+: /],
    [['--json', folder], /--json \/.*': EISDIR/],
  ] as const) {
    const bench = startBench('--quick', '--only', 'skew', ...args)
    expect([await bench.ended, bench.output.err], args.join(' ')).toEqual([2, expect.stringMatching(reason)])
    expect(bench.output.out).toBe('')
  }
})

test('every_figure_is_of_rows_that_were_compared', async () => {
  const json = join(folder, 'figures', 'quick.json') // a folder that is not there
  const bench = startBench('--quick', '--only', 'end-to-end,peer-plain-loop,skew', '--json', json)
  expect(await bench.ended, bench.output.err).toBe(0)
  const { rows, targets, measured, skew, failures } = JSON.parse(await readFile(json, 'utf8')) as Figures
  expect(failures).toEqual([])
  expect(rows.map(({ scenario, verifiedRows }) => [scenario, verifiedRows])).toEqual([
    ['end to end, 40 × 25', 1000],
    ['peer: plain loop, 20 × 25', 500],
  ])
  for (const { turnsPerSecond, usage } of rows) {
    expect(turnsPerSecond).toBeGreaterThan(0)
    expect(Object.keys(usage!.cpuMicros).sort()).toEqual(['client', 'ingest', 'postgres', 'redis', 'sink'])
    if (process.platform === 'linux') for (const mib of Object.values(usage!.peakMiB)) expect(mib).toBeGreaterThan(1)
  }
  const loop = targets.find(({ target }) => target.includes('plain XADD'))!
  expect(loop.measured).toBeCloseTo(measured.peerMicros['plain-loop']! / measured.endToEndMicros!)
  expect(targets.find(({ target }) => target.includes('BullMQ'))).toMatchObject({ measured: null, met: null })
  expect(bench.output.err).toContain('[2/3] peer-plain-loop')
  expect(bench.output.out).toContain('Calls in the fullest partition')

  // The hash spreads calls as evenly as chance does, however they are named.
  expect(skew.spreads).toHaveLength(2 * 4 * 4)
  for (const { calls, partitions, kind, maxToMean } of skew.spreads) {
    const ideal = skew.ideals.find((each) => each.calls === calls && each.partitions === partitions)!
    expect(maxToMean, `${kind}, ${calls} in ${partitions}`).toBeLessThanOrEqual(ideal.rareMaxToMean)
  }
  expect((await readdir(folder)).filter((name) => name !== 'figures')).toEqual([])
})

onLinux('ctrl_c_leaves_no_process_and_no_file_behind', async () => {
  const bench = startBench('--quick', '--only', 'end-to-end', '--rounds', '1000')
  // Redis, PostgreSQL, ingest, sink, and what started them.
  const started = [/redis|valkey/, /postgres -D/, / ingest /, / sink /, /bench\.js/]
  const runs = async (name: RegExp) => (await remaining()).some((line) => name.test(line))
  await until('all of it runs', async () => !(await Promise.all(started.map(runs))).includes(false), 30_000)
  await until('it measures', () => bench.output.err.includes('round 1 of 1000'), 30_000)
  bench.child.kill('SIGINT')
  expect(await bench.ended).toBe(130)
  expect(await remaining()).toEqual([])
  expect(await readdir(folder)).toEqual([])
})

test('an_unknown_scenario_is_told_with_those_there_are', async () => {
  const bench = startBench('--only', 'drain,nonsense')
  expect(await bench.ended).not.toBe(0)
  expect(bench.output.err).toMatch(/there is no nonsense; there are end-to-end, .*peer-bullmq, skew/)
})

test.skipIf(process.platform !== 'linux')(
  'a_child_that_ends_meanwhile_counts_with_what_it_has_used_since',
  async () => {
    // As a server's connection that has worked a lot and is closed by and by. `read` in its subshell: it lives until it is told.
    const busyChild = '(for ((i = 0; i < 400000; i++)); do :; done; echo done; read) ; echo ended; read'
    const parent = spawn('bash', ['-c', busyChild], { stdio: ['pipe', 'pipe', 'inherit'] })
    try {
      await once(parent.stdout, 'data')
      const meter = new Meter({ server: [parent.pid!] })
      parent.stdin.write('\n')
      await once(parent.stdout, 'data')
      expect(meter.stop(1).cpuMicros.server, 'µs').toBeLessThan(200_000)
    } finally {
      parent.kill('SIGKILL')
    }
  },
)

test('a_target_is_judged_by_its_own_sense', () => {
  const verdict = (measured: Partial<Measured>, words: string) =>
    judge({ peerMicros: {}, ...measured }).find(({ target }) => target.includes(words))!
  expect(verdict({ endToEndTurns: 45_000 }, 'finalized').met).toBe(true)
  expect(verdict({ endToEndTurns: 44_999 }, 'finalized').met).toBe(false)
  expect(verdict({ latencyP99: 25 }, 'p99').met).toBe(true)
  expect(verdict({ latencyP99: 25.1 }, 'p99').met).toBe(false)
  expect(verdict({ peerMicros: { bullmq: 240 }, endToEndMicros: 30 }, 'BullMQ')).toMatchObject({
    measured: 8,
    met: true,
  })
  expect(verdict({ micros100k: 50, micros1k: 30 }, '100,000 open').met).toBe(false)
})

test('the_ideal_spread_is_that_of_dice', () => {
  // Two throws of a coin: both on one side in half of all cases.
  expect(idealSpread(2, 2)).toEqual({ maxToMean: 1, rareMaxToMean: 2, p99ToMean: 2 })
  const { maxToMean } = idealSpread(100_000, 64)
  const tries = Array.from({ length: 20 }, () => fullestOf(100_000, 64)).sort((a, b) => a - b)
  expect(maxToMean).toBeGreaterThan(tries[0]!)
  expect(maxToMean).toBeLessThan(tries.at(-1)!)
})

function fullestOf(balls: number, bins: number): number {
  const counts = new Array<number>(bins).fill(0)
  for (let i = 0; i < balls; i++) counts[Math.floor(Math.random() * bins)]!++
  return Math.max(...counts) / (balls / bins)
}

test('tags_hash_as_in_redis', () => {
  expect(crc16('123456789')).toBe(0x31c3) // of the Cluster specification
})
