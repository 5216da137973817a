/**
 * Every metric, by Prometheus' conventions: base units, counters end in _total. No label holds a call: their number would grow
 * without bound. grafana/panels.md says how to read each.
 *
 * Counters and histograms add up over several processes. So do gauges of a process (connections, queues); what a sink says of the
 * stores (`shared` below) every sink says of all calls: take their maximum, not their sum. The processes that INGEST_PROCESSES and
 * SINK_PROCESSES start are added up in this way before they are scraped: that is what `highest` and `lowest` are for.
 */
import { Registry } from 'prom-client'
import { REFUSAL_CODES } from './events.js'
import { always, fromZero, type Makers, metricsIn, metricsOf, unset } from './metric-makers.js'

/** What `requests_total` and `webhooks_total` have as `status`; a provider's own answer is a 200 or a 204. */
const REQUEST_STATUSES = ['200', '202', '400', '401', '413', '415', '503']
const WEBHOOK_STATUSES = ['200', '204', '400', '401', '403', '415', '500', '503']
/** Close codes of WebSockets that have a meaning here (RFC 6455; 1013 is "try again later", 4008 calltape's own). */
const CLOSE_CODES = ['1000', '1001', '1005', '1006', '1008', '1009', '1011', '1013', '4008']
const SPOOL_FAILURES = ['full', 'disk', 'owner']
/** `redis`, and each Verdict on a batch. */
const RETRY_CLASSES = ['redis', 'retry', 'stop', 'unclear', 'quarantine']
/** What is counted by name of the outcomes of calls: calltape's own, for a bot may say whatever it likes. */
export const OUTCOMES = ['no_answer', 'error', 'disconnected', 'none', 'other'] as const
export type Outcome = (typeof OUTCOMES)[number]
const OTHER = 'other'

/** The code of a closed connection as `connections_closed_total` has it: whatever a client says must not make a label. */
export function closeCodeLabel(code: number): string {
  return CLOSE_CODES.includes(String(code)) ? String(code) : OTHER
}

/** Gauges that have one series only, of what is worst. */
export const ONE_SERIES = ['calltape_sink_worst_partition_lag_seconds']

/** @param answer how many answer @param wanted how many there should be: what a group says counts, not what each of it does */
function processesOf({ gauge, highest }: Makers, setting: string, answer: number, wanted: number) {
  return {
    processes: always(gauge('processes', `Processes that answer: 1, or as many of ${setting}`), answer),
    processesWanted: always(highest('processes_wanted', `Processes that there should be: 1, or ${setting}`), wanted),
  }
}

/** What a group of `size` processes says beside them: also while none of them answers. */
export function createGroupMetrics(name: 'ingest' | 'sink', size: number): Registry {
  const registry = new Registry()
  processesOf(metricsIn(registry, `calltape_${name}`), `${name.toUpperCase()}_PROCESSES`, 0, size)
  return registry
}

function queueOf({ filled, gauge }: Makers) {
  const queuedBytes = gauge('queued_bytes', 'Bytes of events that wait for Redis')
  const queueMaxBytes = gauge('queue_max_bytes', 'MAX_QUEUE_BYTES: beyond that, events are refused')
  return {
    queuedEvents: gauge('queued_events', 'Events that wait for Redis, those in flight included'),
    queuedBytes,
    queueMaxBytes,
    queueFilled: filled('queue', queuedBytes, queueMaxBytes),
  }
}

function spoolOf({ counter, filled, gauge }: Makers) {
  const spoolBytes = gauge('spool_bytes', 'Bytes in the spool')
  const spoolMaxBytes = gauge('spool_max_bytes', 'SPOOL_MAX_BYTES; 0 without a spool')
  return {
    spoolBytes,
    spoolMaxBytes,
    spoolFilled: filled('spool', spoolBytes, spoolMaxBytes),
    spoolEvents: gauge(
      'spool_events',
      'Events in the spool; those that an earlier process left count once they are read',
    ),
    spooled: counter('spooled_events_total', 'Events that went to the disk because Redis did not take them'),
    spoolReplayed: counter('spool_replayed_events_total', 'Events of the spool that Redis has stored'),
    spoolDamaged: counter(
      'spool_damaged_records_total',
      'Records of the spool that were changed on the disk, and are lost',
    ),
    spoolFailures: fromZero(
      counter(
        'spool_failures_total',
        'What the spool could not do: it was full, the disk failed, or another process took it over',
        'reason',
      ),
      'reason',
      SPOOL_FAILURES,
    ),
  }
}

export type IngestMetrics = ReturnType<typeof createIngestMetrics>

export function createIngestMetrics() {
  const makers = metricsOf('calltape_ingest')
  const { registry, counter, gauge, highest, lowest, seconds, sizes } = makers
  return {
    registry,
    ...processesOf(makers, 'INGEST_PROCESSES', 1, 1),
    accepted: counter('events_accepted_total', 'Events that Redis has stored'),
    acked: counter('events_acked_total', 'Events of which their producer was told that they are stored'),
    refused: fromZero(counter('events_refused_total', 'Events refused by name', 'code'), 'code', REFUSAL_CODES),
    requests: fromZero(
      counter('requests_total', 'POST /v1/events, by what it was answered', 'status'),
      'status',
      REQUEST_STATUSES,
    ),
    webhooks: counter('webhooks_total', "Providers' webhooks, by what they were answered", 'provider', 'status'),
    ignored: counter(
      'ignored_messages_total',
      'Messages of providers that say nothing to keep: audio, partial transcripts',
      'provider',
    ),
    undelivered: counter(
      'undelivered_events_total',
      "Events of providers' WebSockets that neither Redis nor the spool took in time: nobody sends them again",
    ),
    connections: gauge('connections', 'Open WebSocket connections'),
    closed: fromZero(
      counter('connections_closed_total', 'WebSocket connections that were closed, by close code', 'code'),
      'code',
      [...CLOSE_CODES, OTHER],
    ),
    ...queueOf(makers),
    inFlight: gauge('flushes_in_flight', 'Appends sent to Redis and not answered yet'),
    flushEvents: sizes('flush_events', 'Events in one append'),
    flushSeconds: seconds('flush_seconds', 'Time from sending an append to its reply'),
    flushFailures: counter('flush_failures_total', 'Appends that failed and were sent again'),
    redisUp: lowest('redis_up', '1 while there is a connection to Redis, else 0'),
    partitionsAway: highest(
      'partitions_away',
      'Partitions whose events wait, because appends fail or hang: all of a server of a Cluster that is down',
    ),
    ...spoolOf(makers),
  }
}

/** @param providers the names of those whose webhooks and WebSockets are served */
export function countProvidersFromZero({ webhooks, ignored }: IngestMetrics, providers: string[]): void {
  for (const provider of providers) {
    ignored.inc({ provider }, 0)
    for (const status of WEBHOOK_STATUSES) webhooks.inc({ provider, status }, 0)
  }
}

/** The calls that have ended. */
function finalizedOf({ counter }: Makers) {
  return {
    finalized: fromZero(
      counter(
        'calls_finalized_total',
        'Calls finalized for the first time, by outcome: no_answer, error, disconnected, none (nobody has said), other (what the bot said)',
        'outcome',
      ),
      'outcome',
      OUTCOMES,
    ),
    refinalized: counter('calls_refinalized_total', 'Final calls whose row was computed again: something came late'),
    incomplete: counter('calls_incomplete_total', 'Calls finalized of which a turn is proved to be missing'),
    abandoned: counter('calls_abandoned_total', 'Calls finalized because they were presumed over: nobody ended them'),
  }
}

/** Each step of a batch's way. */
function batchesOf({ seconds, sizes }: Makers) {
  return {
    leaseSeconds: seconds('lease_seconds', 'Time to lease one batch of calls'),
    readSeconds: seconds('read_seconds', 'Time to read and decode one batch'),
    copySeconds: seconds('copy_seconds', 'Time to COPY the turns of one batch'),
    finalizeSeconds: seconds('finalize_seconds', 'Time to fold the call_sessions rows of one batch'),
    writeSeconds: seconds('write_seconds', 'Time of one transaction, COPY and finalizing included'),
    settleSeconds: seconds('settle_seconds', 'Time to settle one batch'),
    batchRows: sizes('batch_rows', 'Rows in one transaction'),
    batchCalls: sizes('batch_calls', 'Calls in one transaction'),
    latencySeconds: seconds(
      'event_to_committed_seconds',
      'Time from the arrival of an event in Redis to its COMMIT; of each call in a batch, that of its oldest event',
    ),
  }
}

/** What every sink says of all calls. While Redis cannot be asked, those have no value that come from there at each scrape. */
function sharedOf({ highest }: Makers) {
  return {
    sinks: highest('sinks', 'Sinks that share the partitions'),
    lagSeconds: unset(highest('lag_seconds', 'Age of the oldest event in Redis that is not in PostgreSQL')),
    worstPartition: highest(
      'worst_partition_lag_seconds',
      'The same, with the partition that it is in; only that one',
      'partition',
    ),
    laggingPartitions: unset(
      highest('lagging_partitions', 'Partitions with an event that has been waiting for over a second'),
    ),
    entriesBehind: unset(
      highest(
        'entries_behind',
        'Entries in Redis that are not in PostgreSQL; where a partition has very many such calls, estimated from some',
      ),
    ),
    readyCalls: unset(highest('ready_calls', 'Calls with entries that no sink works on')),
    leasedCalls: unset(highest('leased_calls', 'Calls that sinks work on')),
    openCalls: unset(highest('open_calls', 'Calls that have not ended')),
    endedCalls: unset(highest('ended_calls', 'Final calls that are still in Redis')),
    keptCalls: highest(
      'kept_calls',
      'Final calls past STREAM_RETENTION that stay in Redis because something in them is not in PostgreSQL',
    ),
    legacyHeld: highest(
      'legacy_held_calls',
      'Calls in legacy_held, whose row in LEGACY_CALL_SESSIONS was locked or too slow',
    ),
    redisMemory: unset(highest('redis_memory_bytes', 'Memory that Redis uses, all masters together')),
    redisMaxMemory: unset(
      highest('redis_max_memory_bytes', 'What Redis may use: maxmemory of all masters; 0: no limit'),
    ),
    streams: highest('streams', "Calls' streams in Redis, at the last sweep"),
    streamBytes: highest('stream_bytes', "Memory of calls' streams and sessions in Redis, at the last sweep"),
    orphans: highest(
      'orphan_streams',
      'Keys that look like calls and that nobody works on, at the last sweep, by kind; see calltape orphans',
      'kind',
    ),
    sweptAt: highest('last_sweep_timestamp_seconds', 'When the last sweep ended, epoch seconds; 0: never'),
  }
}

export type SinkMetrics = ReturnType<typeof createSinkMetrics>

export function createSinkMetrics() {
  const makers = metricsOf('calltape_sink')
  const { registry, counter, gauge, highest, lowest } = makers
  return {
    registry,
    ...processesOf(makers, 'SINK_PROCESSES', 1, 1),
    turns: counter('turns_total', 'Turns committed to PostgreSQL'),
    events: counter('events_total', 'Other call events committed to PostgreSQL'),
    duplicates: counter('duplicate_turns_total', 'Turns read that PostgreSQL had already'),
    redelivered: counter('redelivered_entries_total', 'Entries read of calls of which a delivery had come to nothing'),
    quarantined: counter('quarantined_total', 'Entries put into quarantined_events'),
    staged: counter(
      'staged_batches_total',
      'Batches that went through staging, because of a duplicate or a redelivery',
    ),
    retries: fromZero(
      counter(
        'retries_total',
        'Batches that failed and are tried again: redis (it failed), retry (PostgreSQL is away), stop (an operator has to mend something), unclear, quarantine (not even that takes it)',
        'class',
      ),
      'class',
      RETRY_CLASSES,
    ),
    lostEntries: counter(
      'lost_entries_total',
      'Entries that were removed from their streams before they were committed',
    ),
    lostStreams: counter('lost_streams_total', 'Streams that were removed although entries in them were not committed'),
    strays: counter('strays_total', 'Live calls that Redis had forgotten, and that were ended'),
    reclaimed: counter('reclaimed_total', 'Lapsed leases taken over'),
    reaped: counter('reaped_total', 'Calls presumed over'),
    ownedPartitions: gauge('owned_partitions', 'Partitions whose news wakes this sink'),
    stolen: counter('stolen_calls_total', "Calls leased of other sinks' partitions, because they had been waiting"),
    ...finalizedOf(makers),
    ...batchesOf(makers),
    lastCommit: highest(
      'last_commit_timestamp_seconds',
      'When this sink last committed a batch, epoch seconds; 0: never',
    ),
    batchesInHand: gauge('batches_in_hand', 'Batches that are being worked on'),
    gateOpen: lowest('gate_open', '1 while this sink leases calls; 0 while it waits for PostgreSQL'),
    redisUp: lowest('redis_up', '1 while there is a connection to Redis, else 0'),
    partitionsAway: highest(
      'partitions_away',
      'Partitions that cannot be asked for news, because their server of a Cluster is down or hangs',
    ),
    postgresConnections: gauge(
      'postgres_connections',
      'Connections to PostgreSQL: busy, idle; and waiting: work that waits for one',
      'state',
    ),
    legacyRows: counter('legacy_rows_total', 'Rows of LEGACY_CALL_SESSIONS filled'),
    legacyFailures: counter(
      'legacy_failures_total',
      'Calls whose row in LEGACY_CALL_SESSIONS refuses what it is to be filled with',
    ),
    purged: counter('purged_calls_total', 'Final calls removed from Redis after STREAM_RETENTION'),
    archived: counter('archived_entries_total', 'Entries written to ARCHIVE_DIR before they were removed from Redis'),
    purgeFailures: counter('purge_failures_total', 'Rounds of removing or archiving that failed, and are tried again'),
    shared: sharedOf(makers),
  }
}
