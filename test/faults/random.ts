/** Chance that can be repeated, and what it does to processes and connections. */
import { setTimeout as sleep } from 'node:timers/promises'
import { childEnvironment } from '../../shared/config.js'
import type { KillableStore } from '../support/killable-stores.js'
import type { Service } from '../support/processes.js'
import type { Relay } from '../support/relay.js'
import type { Rig } from './rig.js'

/** From 0 up to 1. */
export type Chance = () => number

/** Says its seed; FAULTS_SEED gives the same sequence again. */
export function newChance(what: string): Chance {
  const seed = Number(childEnvironment().FAULTS_SEED ?? Math.floor(Math.random() * 2 ** 31))
  process.stderr.write(`${what}: FAULTS_SEED=${seed}\n`)
  let state = seed
  return () => {
    // mulberry32
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), state | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
}

export function pick<T>(chance: Chance, from: readonly T[]): T {
  return from[Math.floor(chance() * from.length)]!
}

export const between = (chance: Chance, least: number, most: number) => least + chance() * (most - least)

export const VICTIMS = ['ingest', 'sink', 'Redis', 'PostgreSQL'] as const
export type Victim = (typeof VICTIMS)[number]

const PAUSE_MS = 3000

/**
 * Kills a random one of all processes every 0.5 to 1.5 s, whatever state the others are in. Each is started again at once.
 * Now and then one is only stopped, for longer than its leases last, and goes on with what it had in hand.
 */
export class Killer {
  readonly kills = Object.fromEntries(VICTIMS.map((victim) => [victim, 0])) as Record<Victim, number>
  private readonly stopped = new AbortController()
  private spared: Victim[] = []
  private readonly restarts = new Set<Promise<void>>()

  constructor(
    private readonly rig: Rig,
    private readonly redis: KillableStore,
    private readonly postgres: KillableStore,
    private readonly chance: Chance,
  ) {}

  get total(): number {
    return Object.values(this.kills).reduce((a, b) => a + b, 0)
  }

  /** @throws (rejects) when a store does not come back */
  async run(): Promise<void> {
    while (!this.stopped.signal.aborted) {
      const pause = between(this.chance, 500, 1500)
      await sleep(pause, undefined, { signal: this.stopped.signal }).catch(() => undefined) // stopped: the loop ends
      if (this.stopped.signal.aborted) break
      if (this.chance() < 0.1) this.pause(pick(this.chance, [...this.rig.ingests, ...this.rig.sinks]))
      else this.strike(this.nextVictim())
    }
    await Promise.all(this.restarts)
  }

  stop(): void {
    this.stopped.abort()
  }

  private pause(service: Service): void {
    service.signal('SIGSTOP')
    setTimeout(() => service.signal('SIGCONT'), PAUSE_MS)
  }

  /** Each of them once, in any order; then again. So a short run meets all of them. */
  private nextVictim(): Victim {
    if (this.spared.length === 0) this.spared = [...VICTIMS]
    return this.spared.splice(Math.floor(this.chance() * this.spared.length), 1)[0]!
  }

  private strike(victim: Victim): void {
    if (victim === 'Redis') this.restart(victim, this.redis, 'SIGKILL')
    // SIGQUIT is `pg_ctl stop -m immediate`: no checkpoint, but no process is left behind either.
    else if (victim === 'PostgreSQL') this.restart(victim, this.postgres, pick(this.chance, ['SIGKILL', 'SIGQUIT']))
    else if (pick(this.chance, victim === 'ingest' ? this.rig.ingests : this.rig.sinks).kill()) this.kills[victim]++
  }

  private restart(victim: Victim, store: KillableStore, signal: NodeJS.Signals): void {
    if (!store.isUp) return // not back from the last time
    this.kills[victim]++
    const restart = store.restart(signal)
    this.restarts.add(restart)
    restart.then(
      () => this.restarts.delete(restart),
      () => this.stop(), // `run` rejects with it
    )
  }
}

/** Cuts, delays and holds up what passes a relay, for `ms` in all; then it is whole again. */
export async function disturb(relay: Relay, chance: Chance, ms: number): Promise<void> {
  const end = performance.now() + ms
  const faults = [
    async () => relay.cut(),
    async () => relay.cut(true),
    async () => relay.cutInReply(Math.floor(between(chance, 1, 3000))),
    async () => {
      relay.delayMs = between(chance, 5, 80)
      await sleep(between(chance, 100, 400))
      relay.delayMs = 0
    },
    async () => {
      relay.hold()
      await sleep(between(chance, 100, 1200))
      if (chance() < 0.5) relay.cut()
      else relay.release()
    },
  ]
  while (performance.now() < end) {
    await sleep(between(chance, 50, 300))
    await pick(chance, faults)()
  }
}
