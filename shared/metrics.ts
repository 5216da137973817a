/** Every metric, by Prometheus' conventions. No label holds a call: their number would grow without bound. */
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client'

const SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
const SIZES = [1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000]

function createRegistry(): Registry {
  const registry = new Registry()
  collectDefaultMetrics({ register: registry })
  return registry
}

export type IngestMetrics = ReturnType<typeof createIngestMetrics>

export function createIngestMetrics() {
  const registry = createRegistry()
  const registers = [registry]
  return {
    registry,
    accepted: new Counter({
      name: 'calltape_ingest_events_accepted_total',
      help: 'Events that Redis has stored',
      registers,
    }),
    refused: new Counter({
      name: 'calltape_ingest_events_refused_total',
      help: 'Events refused by name',
      labelNames: ['code'],
      registers,
    }),
    webhooks: new Counter({
      name: 'calltape_ingest_webhooks_total',
      help: "Providers' webhooks, by what they were answered",
      labelNames: ['provider', 'status'],
      registers,
    }),
    ignored: new Counter({
      name: 'calltape_ingest_ignored_messages_total',
      help: 'Messages of providers that say nothing to keep: audio, partial transcripts',
      labelNames: ['provider'],
      registers,
    }),
    undelivered: new Counter({
      name: 'calltape_ingest_undelivered_events_total',
      help: "Events of providers' WebSockets that neither Redis nor the spool took in time: nobody sends them again",
      registers,
    }),
    connections: new Gauge({ name: 'calltape_ingest_connections', help: 'Open WebSocket connections', registers }),
    queuedEvents: new Gauge({ name: 'calltape_ingest_queued_events', help: 'Events that wait for Redis', registers }),
    queuedBytes: new Gauge({
      name: 'calltape_ingest_queued_bytes',
      help: 'Bytes of events that wait for Redis',
      registers,
    }),
    flushEvents: new Histogram({
      name: 'calltape_ingest_flush_events',
      help: 'Events in one append',
      buckets: SIZES,
      registers,
    }),
    flushSeconds: new Histogram({
      name: 'calltape_ingest_flush_seconds',
      help: 'Time from sending an append to its reply',
      buckets: SECONDS,
      registers,
    }),
    flushFailures: new Counter({
      name: 'calltape_ingest_flush_failures_total',
      help: 'Appends that failed and were sent again',
      registers,
    }),
    spoolBytes: new Gauge({ name: 'calltape_ingest_spool_bytes', help: 'Bytes in the spool', registers }),
    spoolEvents: new Gauge({
      name: 'calltape_ingest_spool_events',
      help: 'Events in the spool; those that an earlier process left count once they are read',
      registers,
    }),
    spooled: new Counter({
      name: 'calltape_ingest_spooled_events_total',
      help: 'Events that went to the disk because Redis did not take them',
      registers,
    }),
    spoolReplayed: new Counter({
      name: 'calltape_ingest_spool_replayed_events_total',
      help: 'Events of the spool that Redis has stored',
      registers,
    }),
    spoolDamaged: new Counter({
      name: 'calltape_ingest_spool_damaged_records_total',
      help: 'Records of the spool that were changed on the disk, and are lost',
      registers,
    }),
    spoolFailures: new Counter({
      name: 'calltape_ingest_spool_failures_total',
      help: 'What the spool could not do: it was full, the disk failed, or another process took it over',
      labelNames: ['reason'],
      registers,
    }),
  }
}

export type SinkMetrics = ReturnType<typeof createSinkMetrics>

export function createSinkMetrics() {
  const registry = createRegistry()
  const registers = [registry]
  return {
    registry,
    turns: new Counter({ name: 'calltape_sink_turns_total', help: 'Turns committed to PostgreSQL', registers }),
    events: new Counter({
      name: 'calltape_sink_events_total',
      help: 'Other call events committed to PostgreSQL',
      registers,
    }),
    duplicates: new Counter({
      name: 'calltape_sink_duplicate_turns_total',
      help: 'Turns read that PostgreSQL had already',
      registers,
    }),
    quarantined: new Counter({
      name: 'calltape_sink_quarantined_total',
      help: 'Entries put into quarantined_events',
      registers,
    }),
    finalized: new Counter({
      name: 'calltape_sink_calls_finalized_total',
      help: 'Calls finalized, refinalizing included',
      registers,
    }),
    staged: new Counter({
      name: 'calltape_sink_staged_batches_total',
      help: 'Batches that went through staging, because of a duplicate or a redelivery',
      registers,
    }),
    retries: new Counter({
      name: 'calltape_sink_retries_total',
      help: 'Batches that failed and are tried again: redis (it failed), retry (PostgreSQL is away), stop (an operator has to mend something), unclear',
      labelNames: ['class'],
      registers,
    }),
    lostEntries: new Counter({
      name: 'calltape_sink_lost_entries_total',
      help: 'Entries that were removed from their streams before they were committed',
      registers,
    }),
    lostStreams: new Counter({
      name: 'calltape_sink_lost_streams_total',
      help: 'Streams that were removed although entries in them were not committed',
      registers,
    }),
    strays: new Counter({
      name: 'calltape_sink_strays_total',
      help: 'Live calls that Redis had forgotten, and that were ended',
      registers,
    }),
    legacyRows: new Counter({
      name: 'calltape_sink_legacy_rows_total',
      help: 'Rows of LEGACY_CALL_SESSIONS filled',
      registers,
    }),
    legacyFailures: new Counter({
      name: 'calltape_sink_legacy_failures_total',
      help: 'Calls whose row in LEGACY_CALL_SESSIONS refuses what it is to be filled with',
      registers,
    }),
    legacyHeld: new Gauge({
      name: 'calltape_sink_legacy_held_calls',
      help: 'Calls in legacy_held, whose row in LEGACY_CALL_SESSIONS was locked or too slow; every sink reports all of them',
      registers,
    }),
    reclaimed: new Counter({ name: 'calltape_sink_reclaimed_total', help: 'Lapsed leases taken over', registers }),
    reaped: new Counter({ name: 'calltape_sink_reaped_total', help: 'Calls presumed over', registers }),
    batchRows: new Histogram({
      name: 'calltape_sink_batch_rows',
      help: 'Rows in one transaction',
      buckets: SIZES,
      registers,
    }),
    writeSeconds: new Histogram({
      name: 'calltape_sink_write_seconds',
      help: 'Time of one transaction',
      buckets: SECONDS,
      registers,
    }),
    latencySeconds: new Histogram({
      name: 'calltape_sink_event_to_committed_seconds',
      help: 'Time from the arrival of the oldest entry of a batch in Redis to its COMMIT',
      buckets: SECONDS,
      registers,
    }),
    lagSeconds: new Gauge({
      name: 'calltape_sink_lag_seconds',
      help: 'Age of the oldest event in Redis that is not in PostgreSQL',
      registers,
    }),
    readyCalls: new Gauge({
      name: 'calltape_sink_ready_calls',
      help: 'Calls with entries that no sink works on',
      registers,
    }),
    openCalls: new Gauge({ name: 'calltape_sink_open_calls', help: 'Calls that have not ended', registers }),
  }
}
