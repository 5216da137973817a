/**
 * Crash points: named places at which a test makes the process die as by `kill -9`, to see what the others make of it. Off
 * unless `CRASH_AT` is set: `POINT` (the first time), `POINT:3` (the third time) or `POINT@TEXT` (whenever what is in hand
 * contains TEXT: only `decode`, which sees each entry, has something in hand).
 */
export const CRASH_POINTS = [
  'before-append',
  'after-append', // Redis has executed it, nobody was told
  'before-spool',
  'after-spool',
  'before-replay',
  'after-replay',
  'before-lease',
  'after-lease',
  'decode',
  'before-copy',
  'after-copy',
  'before-finalize',
  'after-finalize',
  'before-commit',
  'after-commit',
  'before-settle',
  'after-settle',
  'before-archived',
  'after-archived', // the archive is whole and has its name, nothing is removed
  'after-purge',
] as const

export type CrashPoint = (typeof CRASH_POINTS)[number]

export interface Crash {
  point: CrashPoint
  /** Which time, from 1. */
  nth: number
  text: string | undefined
}

/** @returns undefined when `spec` is none */
export function parseCrash(spec: string): Crash | undefined {
  const [, name, nth, text] = /^([a-z-]+)(?::([1-9]\d{0,8})|@(.+))?$/.exec(spec) ?? []
  const point = CRASH_POINTS.find((each) => each === name)
  return point && { point, nth: Number(nth ?? 1), text }
}

let armed: Crash | undefined
let passed = 0

export function armCrash(crash: Crash | undefined): void {
  armed = crash
}

/** @param inHand what `POINT@TEXT` looks into */
export function crashPoint(point: CrashPoint, inHand?: string): void {
  if (armed === undefined || armed.point !== point) return
  if (armed.text !== undefined ? !inHand?.includes(armed.text) : ++passed < armed.nth) return
  process.kill(process.pid, 'SIGKILL')
}
