/** What is legal and yet hardly meant. */
import type { Config, Environment } from '../../shared/config.js'
import { SETTING_NAMES, SETTINGS, type SettingName } from '../../shared/settings.js'

/** Of names that are so short, more than one other letter makes another word. */
const SHORT_NAME = 8

/**
 * @param config what was read from `given`
 * @param isUp whether a `calltape up` runs: it sets SPOOL_DIR for its ingest
 */
export function warningsOf(config: Config, given: Environment, isUp: boolean): string[] {
  const { INGEST_HOST, INGEST_TOKENS, DISCONNECT_GRACE, IDLE_TIMEOUT, SPOOL_DIR } = config
  const hasProvider = SETTING_NAMES.some((name) => name !== 'INGEST_TOKENS' && isSecretList(name) && given[name])
  const withoutEffect = (name: SettingName, why: string) => `${name} is without effect: ${why}`
  const checks: [boolean, string][] = [
    [
      hasUserWithoutPassword(config.REDIS_URL),
      'REDIS_URL has a user and no password, so nobody logs in: a password alone is written redis://:password@host',
    ],
    [
      (config.REDIS_TLS_CA_FILE ?? config.REDIS_TLS_CERT_FILE) !== undefined && !config.REDIS_URL.startsWith('rediss:'),
      'REDIS_URL is redis://, without TLS, although REDIS_TLS_… is set: it is to begin with rediss://',
    ],
    [
      hasProvider && SPOOL_DIR === undefined && !isUp,
      'SPOOL_DIR is not set: what providers send while Redis is away is refused or lost, and not all of them send again',
    ],
    [
      given.SPOOL_MAX_BYTES !== undefined && SPOOL_DIR === undefined && !isUp,
      withoutEffect('SPOOL_MAX_BYTES', 'SPOOL_DIR is not set'),
    ],
    [
      config.ALLOW_UNAUTHENTICATED && INGEST_TOKENS.length > 0,
      withoutEffect('ALLOW_UNAUTHENTICATED', 'INGEST_TOKENS is set, so every producer needs one of them'),
    ],
    [
      config.ALLOW_UNAUTHENTICATED && INGEST_TOKENS.length === 0 && INGEST_HOST === undefined,
      withoutEffect('ALLOW_UNAUTHENTICATED', 'without INGEST_HOST ingest listens on loopback only'),
    ],
    [
      config.ARCHIVE_DIR !== undefined && config.STREAM_RETENTION === undefined,
      withoutEffect('ARCHIVE_DIR', 'with STREAM_RETENTION=off no stream ever goes'),
    ],
    [
      config.PUBLIC_URL !== undefined && !given.TWILIO_AUTH_TOKEN && !given.PLIVO_AUTH_TOKEN,
      withoutEffect('PUBLIC_URL', "it is a part of Twilio's and Plivo's signatures, and neither's token is set"),
    ],
    [
      DISCONNECT_GRACE >= IDLE_TIMEOUT,
      `DISCONNECT_GRACE (${DISCONNECT_GRACE} s) is not shorter than IDLE_TIMEOUT (${IDLE_TIMEOUT} s): ` +
        'a call whose connection is lost is kept open longer than one whose connection is not',
    ],
  ]
  const quoted = SETTING_NAMES.filter((name) => name !== 'LEGACY_CALL_SESSIONS' && isQuoted(given[name]))
  return [
    ...checks.flatMap(([applies, warning]) => (applies ? [warning] : [])),
    ...quoted.map((name) => `${name} begins and ends with a quotation mark: it is taken as a part of the value`),
  ]
}

const isSecretList = (name: SettingName) => SETTINGS[name].secret === 'all'
const isQuoted = (text = '') => /^(["']).*\1$/s.test(text.trim())

function hasUserWithoutPassword(redisUrls: string): boolean {
  return redisUrls.split(',').some((url) => {
    const { username, password, searchParams } = new URL(url.trim())
    return username !== '' && password === '' && !searchParams.has('password')
  })
}

/** @param names of variables that are not ours @returns a line for each that will have been meant for one of ours */
export function misspelt(names: string[]): string[] {
  return names.flatMap((name) => {
    const meant = SETTING_NAMES.find((ours) => {
      return (
        Math.abs(ours.length - name.length) <= 2 &&
        distance(name.toUpperCase(), ours) <= (ours.length < SHORT_NAME ? 1 : 2)
      )
    })
    return meant ? [`${name} is no variable of calltape: is ${meant} meant?`] : []
  })
}

/** How many letters have to be put in, left out or replaced (Levenshtein). */
function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, i) => i)
  for (const [i, letter] of [...a].entries()) {
    const next = [i + 1]
    for (let j = 0; j < b.length; j++) {
      next.push(Math.min(row[j]! + (letter === b[j] ? 0 : 1), row[j + 1]! + 1, next[j]! + 1))
    }
    row = next
  }
  return row[b.length]!
}
