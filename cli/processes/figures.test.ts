import { expect, test } from 'vitest'
import type { MetricValues } from '../../shared/group.js'
import {
  createGroupMetrics,
  createIngestMetrics,
  createSinkMetrics,
  type IngestMetrics,
  type SinkMetrics,
} from '../../shared/metrics.js'
import { addUp, counted, keepCounts } from './figures.js'

const valuesOf = ({ registry }: SinkMetrics | IngestMetrics): Promise<MetricValues> => registry.getMetricsAsJSON()

/** Each sink is given other figures by `change`. */
async function sinks(...changes: ((metrics: SinkMetrics) => void)[]) {
  return Promise.all(
    changes.map((change) => {
      const metrics = createSinkMetrics()
      change(metrics)
      return valuesOf(metrics)
    }),
  )
}

const line = (text: string, series: string) =>
  text
    .split('\n')
    .find((each) => each.startsWith(`${series} `))
    ?.slice(series.length + 1)

test('counters_histograms_and_gauges_of_a_process_add_up', async () => {
  const text = await addUp(
    await sinks(
      (m) => {
        m.turns.inc(3)
        m.retries.inc({ class: 'redis' })
        m.batchRows.observe(2)
        m.batchesInHand.set(1)
      },
      (m) => {
        m.turns.inc(4)
        m.batchRows.observe(7)
        m.batchesInHand.set(2)
      },
    ),
  )
  expect(line(text, 'calltape_sink_turns_total')).toBe('7')
  expect(line(text, 'calltape_sink_retries_total{class="redis"}')).toBe('1')
  expect(line(text, 'calltape_sink_batch_rows_bucket{le="2"}')).toBe('1')
  expect(line(text, 'calltape_sink_batch_rows_bucket{le="+Inf"}')).toBe('2')
  expect(line(text, 'calltape_sink_batch_rows_sum')).toBe('9')
  expect(line(text, 'calltape_sink_batches_in_hand')).toBe('3')
  expect(line(text, 'calltape_sink_processes')).toBe('2')
})

test('a_group_says_how_many_processes_there_should_be_also_while_none_answers', async () => {
  const group = await createGroupMetrics('sink', 3).getMetricsAsJSON()
  const ofTwo = await sinks(
    () => undefined,
    () => undefined,
  )
  for (const [processes, members] of [[2, ofTwo] as const, [0, []] as const]) {
    const text = await addUp([group, ...members])
    expect(line(text, 'calltape_sink_processes')).toBe(String(processes))
    expect(line(text, 'calltape_sink_processes_wanted')).toBe('3')
  }
  expect(line(await addUp(await sinks(() => undefined)), 'calltape_sink_processes_wanted'), 'one alone').toBe('1')
})

test('what_is_up_is_up_only_if_it_is_so_everywhere', async () => {
  const text = await addUp(
    await sinks(
      (m) => {
        m.redisUp.set(1)
        m.gateOpen.set(1)
      },
      (m) => {
        m.redisUp.set(0)
        m.gateOpen.set(1)
      },
    ),
  )
  expect(line(text, 'calltape_sink_redis_up')).toBe('0')
  expect(line(text, 'calltape_sink_gate_open')).toBe('1')
})

test('a_queue_and_a_spool_that_are_full_show_beside_empty_ones', async () => {
  const ingest = (queued: number, spooled: number, spoolMax: number) => {
    const metrics = createIngestMetrics()
    metrics.queuedBytes.set(queued)
    metrics.queueMaxBytes.set(100)
    metrics.spoolBytes.set(spooled)
    metrics.spoolMaxBytes.set(spoolMax)
    return valuesOf(metrics)
  }
  const text = await addUp(await Promise.all([ingest(3, 900, 1000), ingest(75, 0, 1000), ingest(0, 0, 1000)]))
  expect(line(text, 'calltape_ingest_queued_bytes')).toBe('78')
  expect(line(text, 'calltape_ingest_queue_filled_ratio')).toBe('0.75')
  expect(line(text, 'calltape_ingest_spool_filled_ratio')).toBe('0.9')
  const without = await addUp([await ingest(0, 0, 0), await ingest(0, 0, 0)])
  expect(line(without, 'calltape_ingest_spool_filled_ratio'), 'without a spool').toBe('0')
})

test('what_each_says_of_the_stores_does_not_add_up_and_the_worst_partition_is_one', async () => {
  const text = await addUp(
    await sinks(
      (m) => {
        m.shared.openCalls.set(100)
        m.shared.lagSeconds.set(2)
        m.shared.worstPartition.set({ partition: '3' }, 2)
        m.lastCommit.set(1000)
      },
      (m) => {
        m.shared.openCalls.set(101)
        m.shared.lagSeconds.set(5)
        m.shared.worstPartition.set({ partition: '9' }, 5)
        m.lastCommit.set(999)
      },
    ),
  )
  expect(line(text, 'calltape_sink_open_calls')).toBe('101')
  expect(line(text, 'calltape_sink_lag_seconds')).toBe('5')
  expect(line(text, 'calltape_sink_worst_partition_lag_seconds{partition="9"}')).toBe('5')
  expect(text).not.toContain('{partition="3"}')
  expect(line(text, 'calltape_sink_last_commit_timestamp_seconds')).toBe('1000')
})

test('what_nobody_knows_is_not_said', async () => {
  const text = await addUp(
    await sinks(
      () => undefined,
      () => undefined,
    ),
  )
  expect(line(text, 'calltape_sink_lag_seconds')).toBeUndefined()
})

test('counters_stay_after_a_death_and_gauges_go', async () => {
  const [dead, living] = await sinks(
    (m) => {
      m.turns.inc(3)
      m.batchesInHand.set(1)
      m.shared.openCalls.set(100)
    },
    (m) => m.turns.inc(4),
  )
  const past = await keepCounts([await keepCounts([dead!]), []])
  const text = await addUp([past, counted(dead!), living!])
  expect(line(text, 'calltape_sink_turns_total')).toBe('10')
  expect(line(text, 'calltape_sink_batches_in_hand')).toBe('0')
  expect(line(text, 'calltape_sink_processes')).toBe('1')
  expect(line(text, 'calltape_sink_open_calls')).toBeUndefined()
})

test('a_restart_and_a_slow_event_loop_of_one_show', async () => {
  const [first, second] = [await valuesOf(createIngestMetrics()), await valuesOf(createIngestMetrics())]
  const set = (metrics: MetricValues, name: string, value: number) => {
    metrics.find((metric) => metric.name === name)!.values = [{ value, labels: {} }]
  }
  for (const name of [
    'process_start_time_seconds',
    'nodejs_eventloop_lag_p99_seconds',
    'nodejs_eventloop_lag_seconds',
  ]) {
    set(first, name, 10)
    set(second, name, 20)
    expect(line(await addUp([first, second]), name), name).toBe('20')
  }
})
