/** The spool with a Redis that does as it is told: what is on the disk, what of it is handed over, and in which order. */
import { appendFile, mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep, setImmediate as turnOfTheLoop } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { beforeEach, describe, expect, onTestFinished, test } from 'vitest'
import { OperatorError } from '../shared/config.js'
import { type CallEvent, Refusal, type Turn } from '../shared/events.js'
import { createIngestMetrics } from '../shared/metrics.js'
import { log, until } from '../test/support/stores.js'
import { turn } from '../test/support/streams.js'
import type { Origin } from './append.js'
import { Spool, type SpoolEntry, type SpoolOptions } from './spool.js'
import { encodeRecords, segmentName, segmentPlace } from './spool-segment.js'

let directory: string
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'calltape-spool-'))
  const made = directory
  onTestFinished(() => rm(made, { recursive: true, force: true }))
})

/** Takes events as Redis would, when told so. */
class Store {
  isAway = true
  isFull = false
  isFullFor = () => this.isFull
  /** Stores what it is given at once; else `settle` does. */
  isPrompt = true
  /** Counted, but not kept. */
  isForgetful = false
  taken: Turn[] = []
  count = 0
  private waiting: [Origin, number][] = []

  append(event: CallEvent, _payload: string, origin: Origin, position: number): void {
    this.count++
    if (!this.isForgetful) this.taken.push(event as Turn)
    this.waiting.push([origin, position])
    if (this.isPrompt && this.waiting.length === 1) setImmediate(() => this.settle())
  }

  settle(most = Number.POSITIVE_INFINITY): void {
    for (const [origin, position] of this.waiting.splice(0, most)) {
      const isWrong = this.taken.at(-1)?.text === 'refuse me'
      origin.settle(position, isWrong ? new Refusal('not_stored', 'Redis refused the event: WRONGTYPE') : undefined)
    }
  }

  get seqs(): (number | undefined)[] {
    return this.taken.map(({ seq }) => seq)
  }
}

type Fate = 'spooled' | 'passed' | 'failed'

class Given implements SpoolEntry {
  readonly bytes: number
  reason: string | undefined
  fate: Fate | undefined

  constructor(
    private readonly events: Turn[],
    private readonly whenPassed = () => {},
  ) {
    this.bytes = JSON.stringify(events).length + 16
  }

  payloads = () => this.events.map((event) => JSON.stringify(event))
  spooled = () => this.meets('spooled')
  passed = () => {
    this.whenPassed()
    this.meets('passed')
  }
  failed = (reason: string) => {
    this.reason = reason
    this.meets('failed')
  }

  private meets(fate: Fate): void {
    if (this.fate) throw new Error(`${fate}, after it was ${this.fate}`)
    this.fate = fate
  }
}

const metrics = createIngestMetrics()
const counted = async (metric: keyof typeof metrics) =>
  ((await (metrics[metric] as typeof metrics.spooled).get()).values[0]?.value ?? 0) as number

async function open(store: Store, options: Partial<SpoolOptions> = {}): Promise<Spool> {
  const spool = await Spool.open({ directory, maxBytes: 1e9, ...options }, store, metrics, log)
  onTestFinished(() => spool.close())
  return spool
}

/** Each turn a request of its own, one after the other. */
async function putTurns(spool: Spool, ...seqs: number[]): Promise<(Fate | undefined)[]> {
  const fates: (Fate | undefined)[] = []
  for (const seq of seqs) {
    const given = new Given([turn('CA1', seq)])
    spool.put(given)
    fates.push(await until('it is told what became of it', () => given.fate))
  }
  return fates
}

const segments = async () => (await readdir(directory)).filter((name) => segmentPlace(name) !== undefined).sort()

/** As a process that was killed leaves it. */
async function leave(...seqs: number[]): Promise<string> {
  const lines = seqs.map((seq) => [...encodeRecords([JSON.stringify(turn('CA1', seq))])][0]!)
  const name = segmentName((await segments()).length + 1, 'deadbeef')
  await writeFile(join(directory, name), Buffer.concat(lines))
  return join(directory, name)
}

async function replayed(store = new Store()): Promise<Store> {
  store.isAway = false
  const spool = await open(store)
  await until('all is handed over', () => !spool.isBehind)
  await until('all is stored', async () => (await segments()).length === 0)
  return store
}

describe('replay', () => {
  test('what_was_spooled_comes_in_its_order_and_then_the_disk_is_free', async () => {
    const store = new Store()
    const spool = await open(store, { segmentBytes: 500 })
    expect(new Set(await putTurns(spool, ...Array(50).keys()))).toEqual(new Set(['spooled']))
    expect(store.taken).toEqual([])
    expect((await segments()).length).toBeGreaterThan(5)
    store.isAway = false
    await until('all is handed over', () => !spool.isBehind)
    expect(store.seqs).toEqual([...Array(50).keys()])
    await until('all is stored', async () => (await segments()).length === 0)
    await until('its room is free', () => spool.bytes === 0)
  })

  test('a_segment_stays_until_Redis_has_all_of_it_and_is_replayed_again_by_the_next_process', async () => {
    const store = new Store()
    store.isPrompt = false
    const spool = await open(store)
    await putTurns(spool, 0, 1, 2)
    store.isAway = false
    await until('all is handed over', () => store.taken.length === 3)
    await spool.close()
    expect(await segments()).toHaveLength(1)
    expect((await replayed()).seqs).toEqual([0, 1, 2])
  })

  test('does_not_fill_the_queue_of_the_appender', async () => {
    await leave(...Array(10_000).keys())
    const store = new Store()
    store.isAway = false
    store.isPrompt = false
    store.isAway = true
    const spool = await open(store)
    await sleep(100)
    expect(store.taken, 'it is full with others’ events').toHaveLength(0)
    store.isAway = false
    let before = 0
    await until('no more come', async () => {
      await sleep(100)
      const isStill = before > 1000 && store.taken.length === before
      before = store.taken.length
      return isStill
    })
    expect(before).toBeLessThan(5000)
    const settling = setInterval(() => store.settle(), 1)
    await until('all is handed over', () => !spool.isBehind)
    clearInterval(settling)
    expect(store.seqs).toEqual([...Array(10_000).keys()])
  })

  test('what_comes_meanwhile_goes_behind_it_and_steady_traffic_does_not_keep_it_on_the_disk_for_ever', async () => {
    const store = new Store()
    const spool = await open(store, { segmentBytes: 20_000 })
    let seq = 0
    const all: Given[] = []
    const request = () => {
      const event = turn('CA1', seq++)
      const pass = () => store.append(event, '', { settle: () => {}, settled: () => {} }, 0)
      const given: Given = new Given([event], pass)
      all.push(given)
      if (spool.isBehind || store.isAway) spool.put(given)
      else given.passed()
    }
    let isOver = false
    const traffic = () => {
      request() // one in every turn of the event loop: when a write is through, others wait already
      if (!isOver) setImmediate(traffic)
    }
    traffic()
    onTestFinished(() => {
      isOver = true
    })
    await until('there is a backlog', () => seq > 3000)
    store.isAway = false
    await until('the way is free', () => !spool.isBehind)
    const then = seq
    await until('it stays free', () => seq > then + 1000)
    isOver = true
    await until('all have an answer', () => all.every(({ fate }) => fate !== undefined))
    expect(all.slice(then).filter(({ fate }) => fate === 'spooled')).toEqual([])
    expect(store.seqs).toEqual([...Array(seq).keys()])
  })

  test('what_can_never_be_stored_is_kept_with_the_reason_beside_the_others', async () => {
    const store = new Store()
    const spool = await open(store)
    spool.put(new Given([turn('CA1', 0), { ...turn('CA1', 1), text: 5 } as unknown as Turn, turn('CA1', 2)]))
    await until('it is on the disk', async () => (await segments()).length === 1 && spool.bytes > 0)
    await spool.close()
    const next = new Store()
    await replayed(next)
    expect(next.seqs).toEqual([0, 2])
    await leave(3)
    const wrong = new Store()
    await leave(4)
    await appendFile(
      join(directory, segmentName(9, 'deadbeef')),
      [...encodeRecords([JSON.stringify(turn('CA1', 5, 'refuse me'))])][0]!,
    )
    await replayed(wrong)
    const kept = (await readFile(join(directory, 'refused.ndjson'), 'utf8')).trimEnd().split('\n')
    expect(kept.map((line) => JSON.parse(line) as unknown)).toMatchObject([
      { code: 'invalid_field', message: expect.stringContaining('text wants a string'), event: { seq: 1, text: 5 } },
      { code: 'not_stored', message: expect.stringContaining('WRONGTYPE'), event: { seq: 5 } },
    ])
  })

  test('takes_no_more_memory_for_a_big_spool', async () => {
    setFlagsFromString('--expose-gc')
    const gc = runInNewContext('gc') as () => void
    const text = 'x'.repeat(4000)
    const body = Array.from({ length: 200 }, (_, seq) => turn('CA1', seq, text))
    const record = [...encodeRecords(body.map((event) => JSON.stringify(event)))]
    for (let i = 1; i <= 6; i++) {
      for (let n = 0; n < 12; n++) await appendFile(join(directory, segmentName(i, 'deadbeef')), Buffer.concat(record))
    }
    const used = () => {
      gc()
      const { heapUsed, arrayBuffers } = process.memoryUsage()
      return heapUsed + arrayBuffers
    }
    const before = used()
    const store = new Store()
    store.isAway = false
    store.isForgetful = true
    store.isPrompt = false
    let most = 0
    let turns = 0
    const settling = setInterval(() => {
      if (++turns % 10 === 0) most = Math.max(most, used() - before)
      store.settle(30) // Redis is slow
    }, 2)
    onTestFinished(() => clearInterval(settling))
    const spool = await open(store)
    expect(spool.bytes).toBeGreaterThan(50_000_000)
    await until('all is handed over', () => !spool.isBehind)
    expect(store.count).toBe(6 * 12 * 200)
    expect(turns).toBeGreaterThan(10)
    expect(most).toBeLessThan(25_000_000)
  })
})

describe('a directory with', () => {
  test('a_torn_tail_gives_all_records_before_it', async () => {
    const path = await leave(0, 1, 2)
    await leave(3)
    const { size } = await stat(path)
    const [torn] = encodeRecords([JSON.stringify(turn('CA1', 99))])
    for (const cut of [1, 8, 9, 30, torn!.length - 2]) {
      await writeFile(path, Buffer.concat([(await readFile(path)).subarray(0, size), torn!.subarray(0, cut)]))
      const damaged = await counted('spoolDamaged')
      const store = await replayed()
      expect(store.seqs, `${cut} bytes`).toEqual([0, 1, 2, 3])
      expect(await counted('spoolDamaged')).toBe(damaged)
      expect(await readdir(directory)).toEqual(['owner'])
      await leave(0, 1, 2)
      await leave(3)
    }
  })

  test('a_record_that_lacks_only_its_line_feed_gives_it', async () => {
    const path = await leave(0, 1)
    await writeFile(path, (await readFile(path)).subarray(0, -1))
    expect((await replayed()).seqs).toEqual([0, 1])
  })

  test('a_flipped_bit_loses_that_record_says_so_and_keeps_the_file', async () => {
    const path = await leave(0, 1, 2, 3)
    const bytes = await readFile(path)
    const line = bytes.length / 4
    for (const at of [line + 2, 2 * line + 40]) bytes[at]! ^= 1
    await writeFile(path, bytes)
    const before = await counted('spoolDamaged')
    expect((await replayed()).seqs).toEqual([0, 3])
    expect(await counted('spoolDamaged')).toBe(before + 2)
    const kept = (await readdir(directory)).find((name) => name.endsWith('.damaged'))
    expect(await readFile(join(directory, kept!))).toEqual(bytes)
    expect((await replayed()).seqs, 'only once').toEqual([])
  })

  test('files_of_others_leaves_them_alone', async () => {
    const foreign = ['notes.txt', '1.segment', '000000000001-xyz.segment', '000000000001-deadbeef.segment.bak']
    for (const name of foreign) await writeFile(join(directory, name), 'not ours')
    await leave(0)
    expect((await replayed()).seqs).toEqual([0])
    for (const name of foreign) expect(await readFile(join(directory, name), 'utf8')).toBe('not ours')
  })

  test('a_segment_that_cannot_be_read_leaves_it_and_goes_on', async () => {
    await mkdir(join(directory, segmentName(1, 'deadbeef')))
    await leave(7)
    const store = new Store()
    store.isAway = false
    const spool = await open(store)
    await until('the way is free', () => !spool.isBehind)
    expect(store.seqs).toEqual([7])
    expect(await readdir(directory)).toContain(segmentName(1, 'deadbeef'))
  })
})

describe('a bound', () => {
  test('is_kept_and_what_is_beyond_it_is_refused', async () => {
    const store = new Store()
    const spool = await open(store, { maxBytes: 2000, segmentBytes: 600 })
    const given = Array.from({ length: 50 }, (_, seq) => new Given([turn('CA1', seq)]))
    for (const each of given) {
      spool.put(each) // also while others are being written
      await turnOfTheLoop()
    }
    await until('all have an answer', () => given.every(({ fate }) => fate !== undefined))
    const fates = given.map(({ fate }) => fate)
    const taken = fates.filter((fate) => fate === 'spooled').length
    expect(taken).toBeGreaterThan(5)
    expect(fates.slice(taken).every((fate) => fate === 'failed')).toBe(true)
    let onDisk = 0
    for (const name of await segments()) onDisk += (await stat(join(directory, name))).size
    expect(onDisk).toBeLessThanOrEqual(2000)
    store.isAway = false
    await until('there is room again', () => spool.bytes === 0)
    store.isAway = true
    expect(await putTurns(spool, 50)).toEqual(['spooled'])
  })

  test('holds_for_what_is_just_being_written', async () => {
    const spool = await open(new Store(), { maxBytes: 2000 })
    const put = () => {
      const given = Array.from({ length: 15 }, (_, seq) => new Given([turn('CA1', seq)]))
      for (const each of given) spool.put(each)
      return given
    }
    const first = put()
    await turnOfTheLoop()
    await turnOfTheLoop()
    const second = put()
    await until('all have an answer', () => [...first, ...second].every(({ fate }) => fate !== undefined))
    expect(new Set(first.map(({ fate }) => fate))).toEqual(new Set(['spooled']))
    expect(second.at(-1)!.fate).toBe('failed')
    expect(spool.bytes).toBeLessThanOrEqual(2000)
  })

  test('of_what_an_earlier_process_left_counts', async () => {
    await leave(...Array(50).keys())
    const spool = await open(new Store(), { maxBytes: 2000 })
    expect(await putTurns(spool, 50)).toEqual(['failed'])
  })
})

describe('of two owners', () => {
  test('the_former_acks_nothing_more_and_the_latter_has_all_it_had_acked', async () => {
    const former = await open(new Store())
    expect(await putTurns(former, 0, 1)).toEqual(['spooled', 'spooled'])
    const store = new Store()
    const latter = await open(store)
    expect(await putTurns(former, 2)).toEqual(['failed'])
    const told = new Given([turn('CA1', 3)])
    former.put(told)
    expect(told).toMatchObject({ fate: 'failed', reason: expect.stringContaining('another process') })
    expect(former.isBehind, 'what Redis can take goes there').toBe(false)
    expect(await putTurns(latter, 10)).toEqual(['spooled'])
    store.isAway = false
    await until('all is handed over', () => !latter.isBehind)
    expect(store.seqs.filter((seq) => seq !== 2)).toEqual([0, 1, 10])
  })

  test('whatever_the_moment_of_taking_over_what_was_acked_is_replayed', async () => {
    const acked: number[] = []
    const takenOver: Store[] = []
    let seq = 0
    for (let round = 0; round < 30; round++) {
      const spool = await open(new Store(), { segmentBytes: 300 })
      const given = Array.from({ length: 20 }, () => [seq, new Given([turn('CA1', seq++)])] as const)
      for (const [, each] of given) {
        spool.put(each)
        if (Math.random() < 0.5) await turnOfTheLoop()
      }
      const store = new Store()
      store.isAway = false
      takenOver.push(store)
      const next = await open(store)
      await until('all have an answer', () => given.every(([, { fate }]) => fate !== undefined))
      acked.push(...given.filter(([, { fate }]) => fate === 'spooled').map(([number]) => number))
      await until('all is handed over', () => !next.isBehind)
    }
    const stored = new Set(takenOver.flatMap(({ seqs }) => seqs))
    expect(acked.filter((number) => !stored.has(number))).toEqual([])
    expect(acked.length).toBeGreaterThan(0)
  })
})

test('a_directory_that_cannot_be_used_is_a_clear_error', async () => {
  const file = join(directory, 'file')
  await writeFile(file, '')
  for (const wrong of [file, join(file, 'below'), '/proc/calltape']) {
    const opened = open(new Store(), { directory: wrong })
    await expect(opened).rejects.toThrow(OperatorError)
    await expect(opened).rejects.toThrow(new RegExp(`^SPOOL_DIR: ${wrong} cannot be used: E`))
  }
})

test('what_comes_together_is_written_together', async () => {
  const spool = await open(new Store())
  const all = Array.from({ length: 1000 }, (_, seq) => new Given([turn('CA1', seq)]))
  for (const each of all) spool.put(each)
  const told = () => all.filter(({ fate }) => fate === 'spooled').length
  const steps = new Set<number>()
  while (told() < 1000) {
    await turnOfTheLoop()
    steps.add(told())
  }
  steps.delete(0)
  expect(steps.size, 'syncs').toBeLessThan(5)
})
