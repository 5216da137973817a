/**
 * The configuration: the one place that reads process.env. Every variable is validated at start; an error names the
 * variable and what it wants. README.md has the same table for people, but for CRASH_AT.
 */
import { IANAZone } from 'luxon'
import { z } from 'zod'
import { CRASH_POINTS, parseCrash } from './crash.js'

function number(min: number, max: number) {
  const error = `wants an integer from ${min} to ${max}`
  return z.coerce.number({ error }).int({ error }).min(min, { error }).max(max, { error })
}
const port = number(0, 65_535)
const flag = z.enum(['true', 'false'], { error: 'wants true or false' }).transform((v) => v === 'true')
/** One that is set but holds nothing is a mistake: taken for not set, it would leave a door open. */
const list = z.string().transform((v, context) => {
  const values = v
    .split(',')
    .map((s) => s.trim())
    .filter(Boolean)
  if (values.length === 0) context.addIssue('wants a value, or several, comma-separated')
  return values
})

const isUrl = (v: string, pattern: RegExp) => pattern.test(v) && URL.canParse(v)
const redisUrl = z.string().refine((v) => v.split(',').every((u) => isUrl(u.trim(), /^rediss?:\/\/\S+$/)), {
  message: 'wants redis://[user:password@]host:port[/db] or rediss://…; several, comma-separated, for a Cluster',
})
const databaseUrl = z.string().refine((v) => isUrl(v, /^postgres(ql)?:\/\/\S+$/), {
  message: 'wants postgres://user:password@host:port/database',
})

const publicUrl = z.string().refine((v) => isUrl(v, /^https?:\/\/[^\s?#]+$/), {
  message: 'wants https://host[:port][/path], as the providers call it',
})
const timeZone = z
  .string()
  .refine((v) => IANAZone.isValidZone(v), { message: 'wants a time zone such as Asia/Kolkata' })

/** Plain, so that it needs no quotes anywhere. */
const databaseSchema = z.string().refine((v) => /^(?!pg_|information_schema$)[a-z_][a-z0-9_]{0,62}$/.test(v), {
  message: 'wants a plain name: a-z, 0-9 and _, at most 63 characters, beginning neither with a digit nor with pg_',
})

/** As in SQL: without quotes it is lower case, in double quotes it is what it says. */
const SQL_NAME = /^(?:([a-z_][a-z0-9_$]*|"(?:[^"]|"")+")\.)?([a-z_][a-z0-9_$]*|"(?:[^"]|"")+")$/i
const plainName = (name: string) =>
  name.startsWith('"') ? name.slice(1, -1).replaceAll('""', '"') : name.toLowerCase()
const tableName = z.string().transform((v, context) => {
  const [, schema = 'public', table] = SQL_NAME.exec(v) ?? []
  if (table === undefined)
    context.addIssue('wants schema.table, or a table of the schema public; odd names in double quotes')
  return { schema: plainName(schema), table: plainName(table ?? '') }
})

/** Only tests set it. */
const crash = z.string().transform((v, context) => {
  const parsed = parseCrash(v)
  if (!parsed) context.addIssue(`wants POINT, POINT:N or POINT@TEXT, POINT being one of ${CRASH_POINTS.join(' ')}`)
  return parsed
})

const schema = z.object({
  REDIS_URL: redisUrl.default('redis://127.0.0.1:6379'),
  DATABASE_URL: databaseUrl.default('postgres://127.0.0.1:5432/calltape'),
  DATABASE_SCHEMA: databaseSchema.default('public'),
  LEGACY_CALL_SESSIONS: tableName.optional(),
  INGEST_HOST: z.string().min(1).optional(),
  INGEST_PORT: port.default(8080),
  INGEST_TOKENS: list.default([]),
  ALLOW_UNAUTHENTICATED: flag.default(false),
  TLS_CERT_FILE: z.string().min(1).optional(),
  TLS_KEY_FILE: z.string().min(1).optional(),
  PUBLIC_URL: publicUrl.optional(),
  EXOTEL_SECRET: list.default([]),
  EXOTEL_TIME_ZONE: timeZone.default('Asia/Kolkata'),
  TWILIO_AUTH_TOKEN: list.default([]),
  VAPI_SECRET: list.default([]),
  RETELL_API_KEY: list.default([]),
  ELEVENLABS_SECRET: list.default([]),
  TELNYX_PUBLIC_KEY: list.default([]),
  PLIVO_AUTH_TOKEN: list.default([]),
  VONAGE_SIGNATURE_SECRET: list.default([]),
  JAMBONZ_SECRET: list.default([]),
  DURABILITY: z
    .string()
    .regex(/^(redis|fsync|replicas:[1-9]\d?)$/, { message: 'wants redis, fsync or replicas:N' })
    .default('redis'),
  PARTITIONS: number(1, 4096).default(64),
  WINDOW: number(1, 1_000_000).default(4096),
  MAX_MESSAGE_BYTES: number(1024, 64 * 1024 * 1024).default(1024 * 1024),
  MAX_BODY_BYTES: number(1024, 512 * 1024 * 1024).default(16 * 1024 * 1024),
  MAX_QUEUE_BYTES: number(1024 * 1024, 64 * 1024 * 1024 * 1024).default(256 * 1024 * 1024),
  SPOOL_DIR: z.string().min(1).optional(),
  SPOOL_MAX_BYTES: number(1024 * 1024, 1024 ** 4).default(1024 ** 3),
  IDLE_TIMEOUT: number(1, 30 * 24 * 3600).default(1800),
  DISCONNECT_GRACE: number(0, 24 * 3600).default(15),
  SINK_METRICS_HOST: z.string().min(1).default('127.0.0.1'),
  SINK_METRICS_PORT: port.default(9464),
  SINK_WORKERS: number(1, 32).default(2),
  BATCH_MAX_ROWS: number(1, 100_000).default(5000),
  BATCH_MAX_BYTES: number(1024, 1024 * 1024 * 1024).default(8 * 1024 * 1024),
  LEASE_SECONDS: number(1, 3600).default(15),
  MAX_DELIVERIES: number(1, 1000).default(3),
  DATABASE_TIMEOUT: number(1, 3600).default(60),
  CRASH_AT: crash.optional(),
  LOG_LEVEL: z.enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent']).default('info'),
})

export type Config = z.infer<typeof schema>
/** Where PostgreSQL is, and which schema there is calltape's. */
export type DatabaseConfig = Pick<Config, 'DATABASE_URL' | 'DATABASE_SCHEMA'>
export type Environment = Record<string, string | undefined>

/** An error that no configuration, no store and no network is to blame for. */
export const isBug = (error: unknown): boolean => error instanceof TypeError || error instanceof RangeError

/** A configuration or a state of the stores that the operator has to change: reported without a stack, exit code 2. */
export class OperatorError extends Error {}

/** @throws OperatorError with a line for every variable that is wrong */
export function readConfig(env: Environment = process.env): Config {
  const result = schema.safeParse(givenEnvironment(env))
  if (!result.success) {
    const lines = result.error.issues.map((issue) => `${issue.path.join('.')}: ${issue.message}`)
    throw new OperatorError(`the configuration is wrong:\n  ${lines.join('\n  ')}`)
  }
  const config = result.data
  if (!config.TLS_CERT_FILE !== !config.TLS_KEY_FILE) {
    throw new OperatorError('TLS_CERT_FILE and TLS_KEY_FILE: set both or neither')
  }
  return config
}

/** Those of our variables that are set, as they were given. */
export function givenEnvironment(env: Environment = process.env): Environment {
  return Object.fromEntries(Object.keys(schema.shape).flatMap((name) => (env[name] ? [[name, env[name]]] : [])))
}

/** The environment for a child process: ours, with `overrides`. */
export function childEnvironment(overrides: Environment = {}): Environment {
  return { ...process.env, ...overrides }
}
