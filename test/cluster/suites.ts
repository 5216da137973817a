/** What `npm run test:cluster` runs, and what not. */

/** Whatever `npm test` runs beyond this is in NOT_ON_A_CLUSTER. */
export const ON_A_CLUSTER = ['test/**/*.test.ts']

const ONE_SERVER = 'a relay stands before one server, and those of a Cluster tell clients their own addresses'
const OWN_REDIS = 'it has a single Redis of its own'
const NO_REDIS = 'it uses no Redis'

/** Patterns of suites that it does not run, and why. */
export const NOT_ON_A_CLUSTER: Record<string, string> = {
  '{cli,client,ingest,sink,shared}/**/*.test.ts': 'units: they use neither Redis nor PostgreSQL',
  'test/appender.test.ts': ONE_SERVER,
  'test/model.test.ts': ONE_SERVER,
  'test/faults/connections.test.ts': ONE_SERVER,
  'test/wake.test.ts': `${OWN_REDIS}, and counts the messages on its one channel: test/cluster.test.ts has what a Cluster's are`,
  'test/script-call.test.ts': 'the bytes of a call, on one connection to one server',
  'test/spool.test.ts':
    'it wants its Redis away, and a replica takes over: test/cluster/unreachable.test.ts has a dead shard',
  'test/rescue*.test.ts': 'the source is another application’s Redis, and has databases',
  'test/retention-memory.test.ts': OWN_REDIS,
  'test/demo.test.ts': 'it is about the servers that the demo starts',
  'test/readme.test.ts': 'it is about the servers that the README starts',
  'test/compose/**': NO_REDIS,
  'test/containers/**': NO_REDIS,
  'test/grafana/**': 'it is about Prometheus and Grafana',
}

const LIMITS = 'limits are shared out among the slots, so a few more are taken'
const ONE_SLOT = 'a batch of several partitions: there it is one for each'

/** Names of tests in the other suites that it does not run, and why. */
export const TESTS_NOT_ON_A_CLUSTER: Record<string, string> = {
  a_lease_stops_at_the_limit_of_calls_and_tells_where_there_is_more: LIMITS,
  a_lease_stops_at_the_limit_of_bytes: LIMITS,
  no_more_calls_are_reclaimed_at_once_than_asked_for: LIMITS,
  no_more_calls_are_reaped_at_once_than_asked_for: 'the limit is of each slot',
  leases_of_several_batches_and_partitions_are_settled_together: ONE_SLOT,
  a_key_of_another_type_refuses_only_its_own_call: ONE_SLOT,
  a_refusal_whose_reply_was_lost_is_said_again: ONE_SLOT,
  what_is_kept_of_refusals_does_not_grow_with_the_batches: ONE_SLOT,
  what_was_stored_of_a_call_before_it_was_refused_is_ready_for_the_sinks: ONE_SLOT,
  a_Redis_that_hangs_is_waited_for_no_longer_than_two_seconds_and_asked_again: ONE_SERVER,
  while_Redis_is_away_a_scrape_has_what_is_the_process_s_own_and_nothing_of_what_only_Redis_knows: ONE_SERVER,
  a_connection_that_breaks_at_: ONE_SERVER,
  one_that_takes_the_place_of_a_broken_one_is_not_cut_for_what_that_one_owed: ONE_SERVER,
  each_has_a_spool_and_fewer_processes_replay_what_more_have_left: ONE_SERVER,
  a_Redis_that_refuses_to_write_is_a_clear_error:
    'each server has users of its own: test/redis-acl.test.ts has a Cluster with them',
  after_a_refusal_nothing_is_left_behind: 'it counts the connections to one server',
  replicas_are_refused_where_there_are_too_few: 'each of the masters has one',
  'an ack comes_only_when_Redis_has_the_event_and_has_said_so': ONE_SERVER,
  'an ack survives_a_connection_to_Redis_that_breaks_before_it_has_answered': ONE_SERVER,
  'an ack comes_although_a_connection_to_Redis_went_silent_without_closing': ONE_SERVER,
  'the window ': ONE_SERVER,
  'a full queue ': ONE_SERVER,
  'stop stores_and_acks_what_was_taken_closes_with_1001_and_records_the_disconnects': ONE_SERVER,
  'stopping answers_what_it_has_taken_and_takes_no_more': ONE_SERVER,
  'a client that goes away before_its_answer_has_its_events_stored': ONE_SERVER,
  'ingest tells_what_waits_for_Redis_and_how_much_may': ONE_SERVER,
  'sink tells_of_the_stores': 'it compares with the memory of one server',
  a_spool_is_never_taken_from_an_ingest_that_lives_and_cannot_empty_it: ONE_SERVER,
  a_sink_that_is_cut_off_while_it_subscribes_again_lives_and_is_woken_afterwards: ONE_SERVER,
  a_poison_entry_deep_in_a_backlog_costs_no_more_sinks:
    'less is read of a call at once there, and so it may cost one more',
  news_makes_the_sink_of_its_partition_ask_and_the_other_one_sleep_on: ONE_SERVER,
  the_lag_is_the_age_of_the_oldest_entry_whoever_has_its_call:
    'it tells ages apart by a few ms, and so much lies between the scripts of two slots',
  is_not_called_missing_when_a_store_goes_away_meanwhile: ONE_SERVER,
  no_log_line_has_what_was_said_nor_a_phone_number_and_calls_are_named: ONE_SERVER,
  the_spool_keeps_all_in_order: 'it wants its Redis away, and a replica takes over',
  without_a_spool_what_may_be_lost_is_counted: 'it wants its Redis away, and a replica takes over',
  a_subscriber_that_was_cut_off_is_back_and_nothing_is_forgotten_meanwhile:
    'it looks for connections on one server: test/cluster.test.ts has it of a Cluster',
}

const escaped = (name: string) => name.replaceAll(/[.*+?^${}()|[\]\\]/g, '\\$&')

export const TEST_NAMES = new RegExp(`^(?!.*(?:${Object.keys(TESTS_NOT_ON_A_CLUSTER).map(escaped).join('|')}))`)
