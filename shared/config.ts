/**
 * The configuration: the one place that reads process.env. Every variable is validated at start; an error names the variable and
 * what it wants. (Which there are: `settings.ts`.)
 */
import type { z } from 'zod'
import { environmentSchema, SETTING_NAMES, SETTINGS } from './settings.js'

export type Config = z.infer<typeof environmentSchema>
/** Where PostgreSQL is, which schema there is calltape's, and whether a pooler is in between. */
export type DatabaseConfig = Pick<Config, 'DATABASE_URL' | 'DATABASE_SCHEMA'> & Partial<Pick<Config, 'DATABASE_POOLER'>>
export type Environment = Record<string, string | undefined>

/** An error that no configuration, no store and no network is to blame for. */
export const isBug = (error: unknown): boolean => error instanceof TypeError || error instanceof RangeError

/** A configuration or a state of the stores that the operator has to change: reported without a stack, exit code 2. */
export class OperatorError extends Error {}

/** @throws OperatorError with a line for every variable that is wrong */
export function readConfig(env: Environment = process.env): Config {
  const given = givenEnvironment(env)
  const result = environmentSchema.safeParse(given)
  const lines = (result.error?.issues ?? []).map((issue) => `${issue.path.join('.')}: ${issue.message}`)
  for (const [cert, key] of [
    ['TLS_CERT_FILE', 'TLS_KEY_FILE'],
    ['REDIS_TLS_CERT_FILE', 'REDIS_TLS_KEY_FILE'],
  ] as const) {
    if (!given[cert] !== !given[key]) lines.push(`${cert} and ${key}: set both or neither`)
  }
  if (!result.success || lines.length > 0) {
    throw new OperatorError(`the configuration is wrong:\n  ${lines.join('\n  ')}`)
  }
  return result.data
}

/** Those of our variables that are set, as they were given. */
export function givenEnvironment(env: Environment = process.env): Environment {
  return Object.fromEntries(SETTING_NAMES.flatMap((name) => (env[name] ? [[name, env[name]]] : [])))
}

/** The names, and only those, of the variables that are set and not ours. */
export function foreignNames(env: Environment = process.env): string[] {
  return Object.keys(env).filter((name) => !Object.hasOwn(SETTINGS, name))
}

/** The environment for a child process: ours, with `overrides`. */
export function childEnvironment(overrides: Environment = {}): Environment {
  return { ...process.env, ...overrides }
}
