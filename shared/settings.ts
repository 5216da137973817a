/**
 * The settings: every environment variable that calltape reads, what it may hold, and what is to be said of it. The README's
 * table and `calltape config` are made from this one (`npm run docs` after a change).
 */
import { z } from 'zod'
import * as value from './settings-values.js'

/** Who reads a setting: the two processes, and the commands that work on what they have stored. */
export type Reader = 'ingest' | 'sink' | 'commands'

export interface Setting {
  /** What it may hold, with its default where it has one. */
  type: z.ZodType
  /** Markdown, for the README. */
  means: string
  readBy: readonly Reader[]
  /** Of a number. */
  unit?: 'bytes' | 'seconds'
  /** What is never shown: all of it (comma-separated values), or what is secret in a URL. */
  secret?: 'all' | 'in URL'
  /** What holds where it is not set and there is no one default; Markdown. */
  unset?: string
  /** For tests: not in the README. */
  isInternal?: true
}

const EVERYBODY = ['ingest', 'sink', 'commands'] as const
/** The commands, too: `rescue` appends as ingest does, `erase` works on its spool. */
const INGEST_AND_COMMANDS = ['ingest', 'commands'] as const
/** The commands, too: `quarantine retry`, for one, writes as a sink does. */
const SINK_AND_COMMANDS = ['sink', 'commands'] as const
const KIB = 1024
const MIB = 1024 * KIB
const GIB = 1024 * MIB
const HOUR = 3600
const DAY = 24 * HOUR

const stores = {
  REDIS_URL: {
    type: value.redisUrl.default('redis://127.0.0.1:6379'),
    readBy: EVERYBODY,
    secret: 'in URL',
    means: 'the Redis (or Valkey) that keeps the streams',
  },
  REDIS_TLS_CA_FILE: {
    type: value.path.optional(),
    readBy: EVERYBODY,
    unset: 'those that Node knows',
    means: "PEM file: for `rediss://`, the CA of the server's certificate",
  },
  REDIS_TLS_CERT_FILE: {
    type: value.path.optional(),
    readBy: EVERYBODY,
    means: 'PEM file: the certificate to show to a server that wants one',
  },
  REDIS_TLS_KEY_FILE: { type: value.path.optional(), readBy: EVERYBODY, means: 'its key, a PEM file' },
  DATABASE_URL: {
    type: value.databaseUrl.default('postgres://127.0.0.1:5432/calltape'),
    readBy: SINK_AND_COMMANDS,
    secret: 'in URL',
    means: 'the PostgreSQL that keeps the calls',
  },
  DATABASE_SCHEMA: {
    type: value.databaseSchema.default('public'),
    readBy: SINK_AND_COMMANDS,
    means: "the PostgreSQL schema that calltape's tables are in; `migrate` makes it",
  },
  DATABASE_POOLER: {
    type: value.word('none', 'transaction').default('none'),
    readBy: SINK_AND_COMMANDS,
    means: 'whether DATABASE_URL is a pooler such as PgBouncer, which lends a connection for each `transaction`',
  },
  LEGACY_CALL_SESSIONS: {
    type: value.tableName.optional(),
    readBy: SINK_AND_COMMANDS,
    means: "another application's table, whose rows are filled when calls end",
  },
  PARTITIONS: {
    type: value.number(1, 4096).default(64),
    readBy: EVERYBODY,
    means: 'fixed at the very first start; another count is refused later',
  },
} satisfies Record<string, Setting>

const calls = {
  IDLE_TIMEOUT: {
    type: value.number(1, 30 * DAY).default(1800),
    readBy: EVERYBODY,
    unit: 'seconds',
    means: 'how long without any event until a call is presumed over; the same for ingest, sink and `rescue`',
  },
  DISCONNECT_GRACE: {
    type: value.number(0, DAY).default(15),
    readBy: INGEST_AND_COMMANDS,
    unit: 'seconds',
    means: 'how long a bound connection may be away before its call is finalized',
  },
} satisfies Record<string, Setting>

const ingest = {
  INGEST_HOST: {
    type: value.host.optional(),
    readBy: ['ingest'],
    unset: '`127.0.0.1`, with tokens `0.0.0.0`',
    means: 'where ingest listens',
  },
  INGEST_PORT: { type: value.port.default(8080), readBy: ['ingest'], means: 'its port; 0: any that is free' },
  INGEST_PROCESSES: {
    type: value.number(0, 64).default(1),
    readBy: ['ingest'],
    means: 'how many share the port, each with queues and a spool of its own; 0: one for each core',
  },
  INGEST_TOKENS: {
    type: value.list.default([]),
    readBy: ['ingest'],
    secret: 'all',
    means: 'any of them is accepted',
  },
  ALLOW_UNAUTHENTICATED: {
    type: value.flag.default(false),
    readBy: ['ingest'],
    means: 'listen beyond loopback without tokens, because the network protects it',
  },
  TLS_CERT_FILE: { type: value.path.optional(), readBy: ['ingest'], means: 'PEM file: https and wss' },
  TLS_KEY_FILE: { type: value.path.optional(), readBy: ['ingest'], means: 'its key, a PEM file' },
  DURABILITY: {
    type: value.durability.default('redis'),
    readBy: INGEST_AND_COMMANDS,
    means: 'what an ack is worth',
  },
  WINDOW: {
    type: value.number(1, 1_000_000).default(1024),
    readBy: ['ingest'],
    means: 'events a WebSocket may have unacknowledged',
  },
  MAX_MESSAGE_BYTES: {
    type: value.number(KIB, 64 * MIB).default(MIB),
    readBy: ['ingest'],
    unit: 'bytes',
    means: 'the longest WebSocket message',
  },
  MAX_BODY_BYTES: {
    type: value.number(KIB, 512 * MIB).default(16 * MIB),
    readBy: ['ingest'],
    unit: 'bytes',
    means: 'the longest HTTP body',
  },
  MAX_QUEUE_BYTES: {
    type: value.number(MIB, 64 * GIB).default(256 * MIB),
    readBy: INGEST_AND_COMMANDS,
    unit: 'bytes',
    means: 'what ingest holds while Redis does not take it; beyond that it refuses',
  },
  SPOOL_DIR: {
    type: value.path.optional(),
    readBy: INGEST_AND_COMMANDS,
    unset: 'none (with `up` and `demo` in their data folder)',
    means: 'where ingest keeps what Redis cannot take; each ingest needs its own (its processes share one)',
  },
  SPOOL_MAX_BYTES: {
    type: value.number(MIB, 1024 * GIB).default(GIB),
    readBy: ['ingest'],
    unit: 'bytes',
    means: 'what the spool may hold; beyond that it refuses',
  },
} satisfies Record<string, Setting>

/** What its requests are verified with. */
const secretOf = <S extends string>(provider: S) => ({
  type: value.list.default([]),
  readBy: ['ingest'] as const,
  secret: 'all' as const,
  means: `what ${provider}'s requests are verified with`,
})

const providers = {
  PUBLIC_URL: {
    type: value.publicUrl.optional(),
    readBy: ['ingest'],
    secret: 'in URL',
    means: 'what providers call ingest, where that is not the address that reaches it',
  },
  EXOTEL_SECRET: secretOf('Exotel'),
  EXOTEL_TIME_ZONE: {
    type: value.timeZone.default('Asia/Kolkata'),
    readBy: ['ingest'],
    means: "of Exotel's times, which have none",
  },
  TWILIO_AUTH_TOKEN: secretOf('Twilio'),
  VAPI_SECRET: secretOf('Vapi'),
  RETELL_API_KEY: secretOf('Retell'),
  ELEVENLABS_SECRET: secretOf('ElevenLabs'),
  TELNYX_PUBLIC_KEY: secretOf('Telnyx'),
  PLIVO_AUTH_TOKEN: secretOf('Plivo'),
  VONAGE_SIGNATURE_SECRET: secretOf('Vonage'),
  JAMBONZ_SECRET: secretOf('jambonz'),
} satisfies Record<string, Setting>

const sink = {
  SINK_METRICS_HOST: {
    type: value.host.default('127.0.0.1'),
    readBy: ['sink'],
    means: "where the sink's `/metrics`, `/healthz` and `/readyz` are",
  },
  SINK_METRICS_PORT: { type: value.port.default(9464), readBy: ['sink'], means: 'their port; 0: any that is free' },
  SINK_PROCESSES: {
    type: value.number(0, 64).default(1),
    readBy: ['sink'],
    means: 'how many share the work, each with workers and connections of its own; 0: one for each core',
  },
  SINK_WORKERS: {
    type: value.number(1, 32).default(2),
    readBy: ['sink'],
    means:
      'batches at once; the sink has one PostgreSQL connection for each, and one more, and another with `LEGACY_CALL_SESSIONS`',
  },
  BATCH_MAX_ROWS: {
    type: value.number(1, 100_000).default(5000),
    readBy: ['sink'],
    means: 'about how many go into one transaction',
  },
  BATCH_MAX_BYTES: {
    type: value.number(KIB, GIB).default(8 * MIB),
    readBy: ['sink'],
    unit: 'bytes',
    means: 'about how much goes into one transaction',
  },
  LEASE_SECONDS: {
    type: value.number(1, HOUR).default(15),
    readBy: ['sink'],
    unit: 'seconds',
    means: "after how long a dead sink's calls go to another (a living one prolongs its leases)",
  },
  MAX_DELIVERIES: {
    type: value.number(1, 1000).default(3),
    readBy: ['sink'],
    means: 'after how many deliveries that came to nothing a call is tried entry by entry',
  },
  DATABASE_TIMEOUT: {
    type: value.number(1, HOUR).default(60),
    readBy: ['sink'],
    unit: 'seconds',
    means: 'how long a statement may take',
  },
  STREAM_RETENTION: {
    type: value.numberOrOff(0, 3660 * DAY, 7 * DAY),
    readBy: ['sink'],
    unit: 'seconds',
    means:
      'from when a call is finalized until all that Redis has of it goes, once all of it is in PostgreSQL; `off`: never',
  },
  ARCHIVE_DIR: {
    type: value.path.optional(),
    readBy: SINK_AND_COMMANDS,
    means: 'where the streams are written to before they go',
  },
  SWEEP_INTERVAL: {
    type: value.number(1, 7 * DAY).default(HOUR),
    readBy: ['sink'],
    unit: 'seconds',
    means: 'how often Redis is searched for streams that nobody ends',
  },
} satisfies Record<string, Setting>

const processes = {
  LOG_LEVEL: {
    type: value.word('trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent').default('info'),
    readBy: ['ingest', 'sink'],
    means: 'the least that is logged',
  },
  CRASH_AT: {
    type: value.crash.optional(),
    readBy: ['ingest', 'sink'],
    isInternal: true,
    means: 'where to die, in tests',
  },
} satisfies Record<string, Setting>

const all = { ...stores, ...calls, ...ingest, ...providers, ...sink, ...processes }

export type SettingName = keyof typeof all
/** In the order in which they are shown. */
export const SETTINGS: { readonly [N in SettingName]: Setting & { type: (typeof all)[N]['type'] } } = all
export const SETTING_NAMES = Object.keys(all) as SettingName[]
export const SETTING_GROUPS: readonly { title: string; names: SettingName[] }[] = Object.entries({
  Stores: stores,
  Calls: calls,
  Ingest: ingest,
  'Telephony providers': providers,
  Sink: sink,
  Processes: processes,
}).map(([title, group]) => ({ title, names: Object.keys(group) as SettingName[] }))

const types = Object.fromEntries(SETTING_NAMES.map((name) => [name, SETTINGS[name].type])) as {
  [N in SettingName]: (typeof all)[N]['type']
}
/** All of the environment that is ours. */
export const environmentSchema = z.object(types)
