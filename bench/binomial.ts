/** What a perfect hash would do: `calls` balls into `bins` bins, each bin a binomial. */

/** Beyond so many standard deviations there is nothing that a double would still add. */
const SPREAD = 12

export interface Ideal {
  /** Of the fullest bin, relative to the mean: in the middle of all cases, and what one case in a thousand exceeds. */
  maxToMean: number
  rareMaxToMean: number
  p99ToMean: number
}

/** Bins are taken for independent, which with so many of them changes no digit that is shown. */
export function idealSpread(calls: number, bins: number): Ideal {
  const mean = calls / bins
  const deviation = Math.sqrt(mean * (1 - 1 / bins))
  const first = Math.max(0, Math.floor(mean - SPREAD * deviation))
  const last = Math.min(calls, Math.ceil(mean + SPREAD * deviation + SPREAD))
  const cumulated = cumulate(calls, 1 / bins, first, last)
  const quantile = (share: number) =>
    first +
    Math.max(
      0,
      cumulated.findIndex((sum) => sum >= share),
    )
  const ofMax = (share: number) => quantile(share ** (1 / bins)) / mean
  return { maxToMean: ofMax(0.5), rareMaxToMean: ofMax(0.999), p99ToMean: quantile(0.99) / mean }
}

/** P(first … k) for each k up to `last`. The ratio of neighbours is simple; their size follows from their sum, which is 1. */
function cumulate(n: number, p: number, first: number, last: number): number[] {
  const logs = [0]
  for (let k = first + 1; k <= last; k++) logs.push(logs.at(-1)! + Math.log(((n - k + 1) / k) * (p / (1 - p))))
  const most = logs.reduce((a, b) => Math.max(a, b))
  const weights = logs.map((log) => Math.exp(log - most))
  const all = weights.reduce((sum, weight) => sum + weight, 0)
  let sum = 0
  return weights.map((weight) => (sum += weight / all))
}
