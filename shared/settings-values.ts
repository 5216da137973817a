/** What a setting may hold: each kind of value reads a variable's text, and says in its error what it wants, never what it got. */
import { IANAZone } from 'luxon'
import { z } from 'zod'
import { CRASH_POINTS, parseCrash } from './crash.js'

/** A whole number; its range is in the documentation as it stands here. */
export function number(min: number, max: number) {
  const error = `wants an integer from ${min} to ${max}`
  return z.coerce.number({ error }).int({ error }).min(min, { error }).max(max, { error })
}
export const port = number(0, 65_535)
const text = z.string().min(1)
export const path = text.describe('a path')
export const host = text.describe('an address or a name')

export const flag = z
  .enum(['true', 'false'], { error: 'wants true or false' })
  .transform((v) => v === 'true')
  .describe('`true`, `false`')

/** One of these words. */
export const word = <W extends string>(...words: [W, ...W[]]) =>
  z.enum(words, { error: `wants one of ${words.join(' ')}` }).describe(words.map((w) => `\`${w}\``).join(', '))

/** A number, or `off`: undefined. (Not before the default is in: it would be put in place of the undefined, too.) */
export const numberOrOff = (min: number, max: number, byDefault: number) =>
  z
    .union([z.literal('off'), number(min, max)], { error: `wants an integer from ${min} to ${max}, or off` })
    .default(byDefault)
    .transform((v) => (v === 'off' ? undefined : v))

/** One that is set but holds nothing is a mistake: taken for not set, it would leave a door open. */
export const list = z
  .string()
  .transform((v, context) => {
    const values = v
      .split(',')
      .map((s) => s.trim())
      .filter(Boolean)
    if (values.length === 0) context.addIssue('wants a value, or several, comma-separated')
    return values
  })
  .describe('one or several, comma-separated')

const isUrl = (v: string, pattern: RegExp) => pattern.test(v) && URL.canParse(v)
const AT_BEHIND_HOST =
  'has an @ behind the host: within user and password write / ? # as %2F %3F %23, elsewhere @ as %40'

/** What stands before a / ? or # of a password would be taken for the host and its port, and told to everybody. */
function hasAtBehindHost(v: string): boolean {
  const { pathname, search, hash } = new URL(v)
  return `${pathname}${search}${hash}`.includes('@')
}

/** A malformed % escape would fail only when the connection is made, as a bug. */
function isDecodable(v: string): boolean {
  const { username, password } = new URL(v)
  try {
    decodeURIComponent(username + password)
    return true
  } catch {
    return false
  }
}

const hasDatabase = (u: string) => !['', '/', '/0'].includes(new URL(u).pathname)

export const redisUrl = z
  .string()
  .superRefine((v, context) => {
    const urls = v.split(',').map((u) => u.trim())
    if (!urls.every((u) => isUrl(u, /^rediss?:\/\/\S+$/))) {
      context.addIssue(
        'wants redis://[user:password@]host:port[/db] or rediss://…; several, comma-separated, for a Cluster',
      )
    } else if (urls.some(hasAtBehindHost)) context.addIssue(AT_BEHIND_HOST)
    else if (new Set(urls.map((u) => new URL(u).protocol)).size > 1)
      context.addIssue('has both redis:// and rediss://: all servers of a Cluster are reached in the same way')
    else if (urls.length > 1 && urls.some(hasDatabase))
      context.addIssue('names a database: a Cluster, which it is with several URLs, has none but 0')
    else if (!urls.every(isDecodable))
      context.addIssue('has a % that begins no %XX: within user and password write it as %25')
  })
  .describe('`redis://[user:password@]host:port[/db]` or `rediss://…`; of a Cluster several, comma-separated')

const url = (pattern: RegExp, wants: string) =>
  z.string().superRefine((v, context) => {
    if (!isUrl(v, pattern)) context.addIssue(wants)
    else if (hasAtBehindHost(v)) context.addIssue(AT_BEHIND_HOST)
  })
export const databaseUrl = url(/^postgres(ql)?:\/\/\S+$/, 'wants postgres://user:password@host:port/database').describe(
  '`postgres://user:password@host:port/database`',
)
export const publicUrl = url(
  /^https?:\/\/[^\s?#]+$/,
  'wants https://host[:port][/path], as the providers call it',
).describe('`https://host[:port][/path]`')

export const timeZone = z
  .string()
  .refine((v) => IANAZone.isValidZone(v), { message: 'wants a time zone such as Asia/Kolkata' })
  .describe('an IANA time zone')

export const durability = z
  .string()
  .regex(/^(redis|fsync|replicas:[1-9]\d?)$/, { message: 'wants redis, fsync or replicas:N' })
  .describe('`redis`, `fsync`, `replicas:N`')

/** Plain, so that it needs no quotes anywhere. */
export const databaseSchema = z
  .string()
  .refine((v) => /^(?!pg_|information_schema$)[a-z_][a-z0-9_]{0,62}$/.test(v), {
    message: 'wants a plain name: a-z, 0-9 and _, at most 63 characters, beginning neither with a digit nor with pg_',
  })
  .describe('a plain name')

/** As in SQL: without quotes it is lower case, in double quotes it is what it says. */
const SQL_NAME = /^(?:([a-z_][a-z0-9_$]*|"(?:[^"]|"")+")\.)?([a-z_][a-z0-9_$]*|"(?:[^"]|"")+")$/i
const plainName = (name: string) =>
  name.startsWith('"') ? name.slice(1, -1).replaceAll('""', '"') : name.toLowerCase()
export const tableName = z
  .string()
  .transform((v, context) => {
    const [, schema = 'public', table] = SQL_NAME.exec(v) ?? []
    if (table === undefined)
      context.addIssue('wants schema.table, or a table of the schema public; odd names in double quotes')
    return { schema: plainName(schema), table: plainName(table ?? '') }
  })
  .describe('`schema.table`')

/** Only tests set it. */
export const crash = z.string().transform((v, context) => {
  const parsed = parseCrash(v)
  if (!parsed) context.addIssue(`wants POINT, POINT:N or POINT@TEXT, POINT being one of ${CRASH_POINTS.join(' ')}`)
  return parsed
})
