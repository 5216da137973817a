/**
 * How evenly calls spread: over partitions by the hash of their call_sid, and with the partitions over the nodes of a Redis Cluster.
 * A simulation with the product's own hash; it needs no servers, and gives the same figures each time.
 */
import { createCipheriv } from 'node:crypto'
import { setImmediate as nextRound } from 'node:timers/promises'
import { table } from '../cli/live-view.js'
import { hash } from '../shared/keys.js'
import { idealSpread } from './binomial.js'
import type { Bench } from './context.js'
import { shown } from './report.js'

const SIZES = [1000, 100_000, 10_000_000]
const QUICK_SIZES = [1000, 100_000]
/** Powers of two: the count of each follows from that of the largest, hash % 64 from hash % 4096. */
const PARTITIONS = [64, 256, 1024, 4096]
const MOST_PARTITIONS = 4096
const NODES = [3, 6, 12, 24, 64]
const SLOTS = 16_384
const BLOCK = 50_000

/** Random bytes, the same each time: the key stream of AES in counter mode. */
class Chance {
  private readonly cipher = createCipheriv('aes-128-ctr', Buffer.alloc(16, 'calltape'), Buffer.alloc(16))

  /** So many identifiers of 32 hex digits. */
  hex(count: number): string[] {
    const digits = this.cipher.update(Buffer.alloc(count * 16)).toString('hex')
    return Array.from({ length: count }, (_, i) => digits.slice(i * 32, i * 32 + 32))
  }
}

const FIRST_NUMBER = 4_820_000_000

/** As providers and bots name their calls. @param from how many there were before */
const KINDS: Record<string, (chance: Chance, count: number, from: number) => string[]> = {
  'Twilio CA…': (chance, count) => chance.hex(count).map((hex) => `CA${hex}`),
  'Exotel hex': (chance, count) => chance.hex(count),
  UUID: (chance, count) =>
    chance
      .hex(count)
      .map((h) => `${h.slice(0, 8)}-${h.slice(8, 12)}-4${h.slice(13, 16)}-a${h.slice(17, 20)}-${h.slice(20)}`),
  'numbers in a row': (_, count, from) => Array.from({ length: count }, (_, i) => String(FIRST_NUMBER + from + i)),
}

interface Spread {
  kind: string
  calls: number
  partitions: number
  mean: number
  maxToMean: number
  p99ToMean: number
  /** The fullest node, relative to the mean, by the number of nodes. */
  nodes: Record<number, number>
}

export async function skew(bench: Bench): Promise<void> {
  const spreads: Spread[] = []
  const sizes = bench.options.quick ? QUICK_SIZES : SIZES
  const began = performance.now()
  let hashed = 0
  for (const calls of sizes) {
    for (const kind of Object.keys(KINDS)) {
      bench.progress.step(`${calls.toLocaleString('en-US')} calls, ${kind}`, calls)
      const counts = await countCalls(bench, kind, calls)
      hashed += calls
      for (const partitions of PARTITIONS) spreads.push(measure(kind, calls, folded(counts, partitions)))
    }
  }
  const seconds = (performance.now() - began) / 1000
  bench.progress.say(`skew: ${hashed.toLocaleString('en-US')} call_sids in ${seconds.toFixed(1)} s`)
  const ideals = sizes.flatMap((calls) =>
    PARTITIONS.map((partitions) => ({ calls, partitions, ...idealSpread(calls, partitions) })),
  )
  bench.extra.skew = { spreads, ideals, partitionsOfNodes: placements() }
  bench.appendix.push(partitionTable(spreads), nodeTable(spreads, sizes))
}

/** How many calls are in each of the most partitions. */
async function countCalls(bench: Bench, kind: string, calls: number): Promise<Uint32Array> {
  const counts = new Uint32Array(MOST_PARTITIONS)
  const chance = new Chance()
  for (let from = 0; from < calls; from += BLOCK) {
    const sids = KINDS[kind]!(chance, Math.min(BLOCK, calls - from), from)
    for (const sid of sids) counts[hash(sid) % MOST_PARTITIONS]!++
    bench.progress.at(from)
    await nextRound() // so that the progress is to be seen, and Ctrl-C heard
  }
  return counts
}

function folded(counts: Uint32Array, partitions: number): Uint32Array {
  const fewer = new Uint32Array(partitions)
  counts.forEach((count, p) => {
    fewer[p % partitions]! += count
  })
  return fewer
}

function measure(kind: string, calls: number, counts: Uint32Array): Spread {
  const partitions = counts.length
  const sorted = counts.toSorted()
  const mean = calls / partitions
  const nodes = NODES.filter((count) => count <= partitions).map((count) => {
    const loads = new Array<number>(count).fill(0)
    counts.forEach((load, p) => {
      loads[nodeOf(p, count)]! += load
    })
    return [count, Math.max(...loads) / (calls / count)]
  })
  return {
    ...{ kind, calls, partitions, mean },
    maxToMean: sorted.at(-1)! / mean,
    p99ToMean: sorted[Math.ceil(partitions * 0.99) - 1]! / mean,
    nodes: Object.fromEntries(nodes) as Record<number, number>,
  }
}

/** Where a Cluster with the usual even ranges of slots has the keys with the tag {p}. */
const nodeOf = (p: number, nodes: number) => Math.floor(((crc16(String(p)) % SLOTS) * nodes) / SLOTS)

/** Redis' CRC16 (XMODEM). */
export function crc16(tag: string): number {
  let crc = 0
  for (const byte of Buffer.from(tag)) {
    crc ^= byte << 8
    for (let bit = 0; bit < 8; bit++) crc = ((crc << 1) ^ (crc & 0x8000 ? 0x1021 : 0)) & 0xffff
  }
  return crc
}

/** How many partitions the emptiest and the fullest node have. */
function placements(): { partitions: number; nodes: number; fewest: number; most: number }[] {
  return PARTITIONS.flatMap((partitions) =>
    NODES.filter((nodes) => nodes <= partitions).map((nodes) => {
      const counts = new Array<number>(nodes).fill(0)
      for (let p = 0; p < partitions; p++) counts[nodeOf(p, nodes)]!++
      return { partitions, nodes, fewest: Math.min(...counts), most: Math.max(...counts) }
    }),
  )
}

/** The fullest partition of each kind, beside what a perfect hash would give. */
function partitionTable(spreads: Spread[]): string {
  const kinds = Object.keys(KINDS)
  const first = spreads.filter(({ kind }) => kind === kinds[0])
  const rows = first.map(({ calls, partitions, mean }) => {
    const ideal = idealSpread(calls, partitions)
    const each = kinds.map((kind) => find(spreads, kind, calls, partitions))
    const p99 = Math.max(...each.map((spread) => spread.p99ToMean))
    return [
      ...[calls.toLocaleString('en-US'), partitions, shown(mean)],
      ...each.map(({ maxToMean }) => ratio(maxToMean)),
      ...[ratio(ideal.maxToMean), ratio(ideal.rareMaxToMean), ratio(p99), ratio(ideal.p99ToMean)],
    ]
  })
  const head = ['calls', 'partitions', 'mean', ...kinds, 'ideal', '1 in 1,000', 'p99, worst', 'p99, ideal']
  return `Calls in the fullest partition ÷ mean, by the kind of call_sid\n\n${table(head, rows)}`
}

function nodeTable(spreads: Spread[], sizes: number[]): string {
  const rows = placements().map(({ partitions, nodes, fewest, most }) => {
    const worst = sizes.map((calls) =>
      Math.max(...Object.keys(KINDS).map((kind) => find(spreads, kind, calls, partitions).nodes[nodes]!)),
    )
    const even = most / (partitions / nodes)
    return [partitions, nodes, `${fewest}–${most}`, ratio(even), ...worst.map(ratio)]
  })
  const ofSizes = sizes.map((calls) => `${calls.toLocaleString('en-US')} calls`)
  const head = ['partitions', 'nodes', 'partitions a node', 'most ÷ mean', ...ofSizes]
  return `Calls on the fullest Redis node ÷ mean, the worst kind\n\n${table(head, rows)}`
}

const find = (spreads: Spread[], kind: string, calls: number, partitions: number) =>
  spreads.find((each) => each.kind === kind && each.calls === calls && each.partitions === partitions)!

const ratio = (value: number) => value.toFixed(value >= 1.1 ? 2 : 3)
