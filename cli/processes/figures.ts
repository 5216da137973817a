/**
 * One /metrics of several processes. Each metric says itself how its values become one (`aggregator`: most add up).
 *
 * Counters must never go back: Prometheus would take what is left of the sum for new. So what a process had counted when it was
 * last asked stays counted after its death, and while it does not answer.
 */
import { AggregatorRegistry, type PrometheusContentType } from 'prom-client'
import type { MetricValues } from '../../shared/group.js'
import { ONE_SERIES } from '../../shared/metrics.js'

/** What only ever grows. */
export const counted = (metrics: MetricValues): MetricValues =>
  metrics.filter(({ type }) => ['counter', 'histogram'].includes(String(type)))

/** @returns in Prometheus' text format */
export function addUp(all: MetricValues[]): Promise<string> {
  return AggregatorRegistry.aggregate<PrometheusContentType>(withoutRivals(all)).metrics()
}

/** @returns what stays of processes that have died */
export function keepCounts(all: MetricValues[]): Promise<MetricValues> {
  const sums = AggregatorRegistry.aggregate<PrometheusContentType>(all.map(counted))
  return sums.getMetricsAsJSON()
}

/** Of a metric that has only the worst series, each process may name another one: that of the worst counts. */
function withoutRivals(all: MetricValues[]): MetricValues[] {
  const worst = new Map<string, number>()
  const valuesOf = (name: string) => all.flat().flatMap((metric) => (metric.name === name ? metric.values : []))
  for (const name of ONE_SERIES) worst.set(name, Math.max(...valuesOf(name).map(({ value }) => value)))
  const isTaken = new Set<string>()
  return all.map((metrics) =>
    metrics.map((metric) => {
      const most = worst.get(metric.name)
      if (most === undefined) return metric
      const values = metric.values.filter(({ value }) => value === most && !isTaken.has(metric.name))
      if (values.length > 0) isTaken.add(metric.name)
      return { ...metric, values }
    }),
  )
}
