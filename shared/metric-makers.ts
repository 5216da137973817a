/** What makes metrics: how those of several processes become one, and what they say before anything has happened. */
import {
  type Aggregator,
  Counter,
  type CounterConfiguration,
  collectDefaultMetrics,
  Gauge,
  Histogram,
  Registry,
} from 'prom-client'

const SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
const SIZES = [1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000]

/** From the first scrape on there is a rate: a counter that appears with its first event hides that one from `rate` and `increase`. */
export function fromZero<L extends string>(counter: Counter<L>, label: L, values: readonly string[]): Counter<L> {
  for (const value of values) counter.inc({ [label]: value } as Record<L, string>, 0)
  return counter
}

/** A gauge that never changes. */
export function always(gauge: Gauge, value: number): Gauge {
  gauge.set(value)
  return gauge
}

/** Of a gauge without labels. */
const currentOf = async (gauge: Gauge): Promise<number> => (await gauge.get()).values[0]!.value

/** A gauge that says nothing until it is set: what nobody knows is not 0. */
export function unset<G extends Gauge>(gauge: G): G {
  gauge.remove()
  return gauge
}

/** Of Node's own, what would say nothing as the mean over several processes, or is left out by prom-client: a restart must show. */
const HIGHEST_OF_NODE = /^(nodejs_eventloop_lag_(?!min_).*seconds|process_start_time_seconds)$/

/** Node's own metrics. */
function collectOfNode(registry: Registry): void {
  collectDefaultMetrics({ register: registry })
  for (const metric of registry.getMetricsAsArray()) {
    if (HIGHEST_OF_NODE.test(metric.name)) (metric as { aggregator?: Aggregator }).aggregator = 'max'
  }
}

/** What makes metrics of one process, Node's own among them: the names of the others begin with `prefix`. */
export function metricsOf(prefix: string) {
  const registry = new Registry()
  collectOfNode(registry)
  return metricsIn(registry, prefix)
}

export type Makers = ReturnType<typeof metricsIn>

export function metricsIn(registry: Registry, prefix: string) {
  const registers = [registry]
  const named = (name: string, help: string) => ({ name: `${prefix}_${name}`, help, registers })
  /** @param aggregator how those of several processes become one */
  const gaugeBy =
    (aggregator: Aggregator) =>
    <L extends string = never>(name: string, help: string, ...labelNames: L[]) =>
      new Gauge<L>({ ...named(name, help), labelNames, aggregator })
  return {
    registry,
    counter: <L extends string = never>(name: string, help: string, ...labelNames: L[]) =>
      new Counter<L>({ ...named(name, help), labelNames } as CounterConfiguration<L>),
    gauge: gaugeBy('sum'),
    highest: gaugeBy('max'),
    lowest: gaugeBy('min'),
    /**
     * Each process has a limit of its own: one that refuses events already would not show beside others that are empty, if what
     * they have and what they may have were added up first.
     */
    filled: (what: string, used: Gauge, max: Gauge) =>
      new Gauge({
        ...named(`${what}_filled_ratio`, `How full the ${what} is; of several processes, the fullest`),
        aggregator: 'max',
        async collect() {
          this.set((await currentOf(used)) / (await currentOf(max)) || 0) // without a spool, 0 of 0
        },
      }),
    seconds: (name: string, help: string) => new Histogram({ ...named(name, help), buckets: SECONDS }),
    sizes: (name: string, help: string) => new Histogram({ ...named(name, help), buckets: SIZES }),
  }
}
