/** Waiting for what will be so. */
import { setTimeout as sleep } from 'node:timers/promises'

/** Waits until `check` gives something else than undefined or false. @throws after `timeoutMs`, saying what was waited for */
export async function until<T>(
  what: string,
  check: () => Promise<T | undefined | false> | T | undefined | false,
  timeoutMs = 10_000,
): Promise<T> {
  const deadline = Date.now() + timeoutMs
  for (;;) {
    const result = await check()
    if (result !== undefined && result !== false) return result
    if (Date.now() > deadline) throw new Error(`waited ${timeoutMs} ms in vain until ${what}`)
    await sleep(5)
  }
}
