/** What may be shown of the settings: nothing of a secret, not even how it begins or how long it is. */
import { z } from 'zod'
import type { Config, Environment } from './config.js'
import { type Reader, SETTING_NAMES, SETTINGS, type Setting, type SettingName } from './settings.js'

const MASK = '•••'

export type Shown = string | number | boolean | null

/**
 * @param config what was read from `given`
 * @returns the effective value, secrets masked; null: none
 */
export function shown(name: SettingName, config: Config, given: Environment): Shown {
  const { secret } = SETTINGS[name]
  const value: unknown = config[name]
  if (secret === 'all') return Array.isArray(value) && value.length > 0 ? `${MASK} (${value.length})` : null
  if (typeof value === 'number' || typeof value === 'boolean') return value
  const text = given[name] || (typeof value === 'string' ? value : undefined)
  if (text === undefined) return null
  return secret === 'in URL' ? withoutSecrets(text) : text
}

/** The settings that `reader` reads and that are not as by default. */
export function changedSettings(reader: Reader, config: Config, given: Environment): Record<string, Shown> {
  const names = SETTING_NAMES.filter((name) => {
    if (!given[name] || !SETTINGS[name].readBy.includes(reader)) return false
    return SETTINGS[name].secret === 'all' || given[name] !== String(defaultOf(name))
  })
  return Object.fromEntries(names.map((name) => [name, shown(name, config, given)]))
}

/** @returns undefined where it has none */
export function defaultOf(name: SettingName): unknown {
  const type: unknown = SETTINGS[name].type
  const read = type instanceof z.ZodPipe ? type.in : type
  return read instanceof z.ZodDefault ? read.def.defaultValue : undefined
}

/** Options of a URL that say where and how to connect. What is not here is not shown: it may be, or belong to, a password. */
const PLAIN_OPTIONS = new Set([
  ...['host', 'port', 'user', 'db', 'family', 'ssl', 'sslmode', 'sslcert', 'sslkey', 'sslrootcert', 'sslnegotiation'],
  ...['application_name', 'connect_timeout', 'statement_timeout', 'uselibpqcompat', 'client_encoding', 'keepalives'],
])
const NAMED_OPTIONS = new Set(['password', 'sslpassword', 'options', 'username'])

/** @param urls one; or several of Redis, comma-separated */
function withoutSecrets(urls: string): string {
  const isRedis = /^rediss?:/.test(urls)
  const each = isRedis ? urls.split(',').map((url) => url.trim()) : [urls]
  return each.map((url) => maskUrl(new URL(url), isRedis)).join(',')
}

function maskUrl({ protocol, username, password, host, pathname, searchParams, hash }: URL, isRedis: boolean): string {
  // A Redis user without a password is good for nothing: it will be the password, with its colon forgotten.
  const user = isRedis && password === '' && username !== '' ? MASK : username
  const credentials = password === '' ? user : `${user}:${MASK}`
  const options = [...searchParams].map(([option, value]) => {
    if (PLAIN_OPTIONS.has(option)) return `${option}=${value}`
    return NAMED_OPTIONS.has(option) ? `${option}=${MASK}` : MASK
  })
  const search = options.length > 0 ? `?${options.join('&')}` : ''
  return `${protocol}//${credentials && `${credentials}@`}${host}${pathname}${search}${hash && `#${MASK}`}`
}

type Unit = NonNullable<Setting['unit']>

const SIZES = {
  bytes: [
    [1024 ** 4, 'TiB'],
    [1024 ** 3, 'GiB'],
    [1024 ** 2, 'MiB'],
    [1024, 'KiB'],
  ],
  seconds: [
    [24 * 3600, 'd'],
    [3600, 'h'],
    [60, 'min'],
    [1, 's'],
  ],
} as const

const withUnit = (value: number, unit: Unit): string => `${value} ${unit === 'bytes' ? 'B' : 's'}`

/** As people say it, where it comes out even: `16 MiB`, `30 min`. */
export function inUnits(value: number, unit: Unit): string {
  const [size, name] = SIZES[unit].find(([size]) => value >= size && value % size === 0) ?? []
  return size ? `${value / size} ${name}` : withUnit(value, unit)
}

/** Both, where they differ: `1800 s (30 min)`. */
export function withUnits(value: number, unit: Unit): string {
  const [plain, said] = [withUnit(value, unit), inUnits(value, unit)]
  return plain === said ? plain : `${plain} (${said})`
}
