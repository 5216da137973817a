/**
 * How long to wait before trying again: doubling with each failure in a row, and random between half and all of that, so that
 * those who failed together do not come back together.
 *
 * @param failures in a row, from 1
 * @returns ms
 */
export function backoffMs(failures: number, firstMs: number, maxMs: number): number {
  return Math.min(firstMs * 2 ** Math.min(failures - 1, 30), maxMs) * (0.5 + Math.random() / 2)
}
