/**
 * What calltape's users of Redis have to be allowed (ACL SETUSER), and the check at the start of a process that they are. Within a
 * script Redis does not say which command it refuses, and what came before that one has been done.
 */
import { OperatorError } from './config.js'
import { PARTITIONS_KEY, Partitions } from './keys.js'
import { someOf } from './lanes.js'
import { readPackageFile } from './package-root.js'
import { mastersOf, type RedisClient } from './redis.js'

const words = (text: string) => text.trim().split(/\s+/)

/** Connecting, the partition count, scripts. */
const COMMON = words('info select get setnx evalsha eval script|load time')
const INGEST = words(`
  set expire hget hset hmget hdel hkeys hincrby hgetall xadd xgroup|create xlen xrange xrevrange xinfo|groups zadd zrem zscore zmscore zcard zscan
  spublish`)
const SINK = words(`
  set del exists unlink type pexpire scan dbsize memory|usage
  hget hset hsetnx hmget hdel hincrby hgetall
  xadd xlen xrange xrevrange xread xinfo|groups xinfo|stream xgroup|create xgroup|setid
  zadd zrem zscore zmscore zcard zrange zremrangebyscore spublish ssubscribe`)
/** The commands read and mend what the two processes write; `rescue` appends as ingest does. */
const COMMANDS = [...new Set([...INGEST, ...SINK, 'bgrewriteaof'])].filter((c) => c !== 'ssubscribe')

export type RedisRole = 'ingest' | 'sink' | 'commands'

const ROLES: Record<RedisRole, readonly string[]> = {
  ingest: [...COMMON, ...INGEST],
  sink: [...COMMON, ...SINK],
  commands: [...COMMON, ...COMMANDS],
}

/**
 * What each of them has to be allowed on every server of a Cluster besides: to learn who has which slot, to follow a slot that moves
 * (ASKING), and what the client says to a server that has become a replica, or is none any more.
 */
export const CLUSTER_RULES: readonly string[] = words(
  '+asking +client|setname +cluster|info +cluster|slots +exists +ping +readonly +readwrite',
)

/** @returns the arguments of ACL SETUSER behind the user and his password */
export function aclRules(role: RedisRole): string[] {
  return ['~ct:*', '&ct:*', ...ROLES[role].toSorted().map((command) => `+${command}`)]
}

const script = readPackageFile('shared/access.lua')

/**
 * Of a Cluster those servers are asked that answer: one that does not must not keep a process from serving the others' calls.
 *
 * @throws OperatorError naming the commands that this user may not run; Redis' errors, of a Cluster when none of its servers answers
 */
export async function requireAccess(client: RedisClient, role: RedisRole): Promise<void> {
  const commands = ROLES[role]
  const asked = JSON.stringify(commands.map(callOf))
  const answers = await Promise.allSettled(mastersOf(client).map((node) => node.eval(script, 0, asked)))
  for (const refused of someOf(answers) as number[][]) {
    if (refused.length === 0) continue
    const names = refused.map((index) => commands[index - 1]).join(', ')
    throw new OperatorError(
      `REDIS_URL: its user may not run, on calltape's keys (ct:*) and channels: ${names}. See ACL SETUSER in the README`,
    )
  }
}

/** The command with arguments from which Redis can tell the key, or the channel. */
function callOf(command: string): string[] {
  const { streamPrefix, wake } = new Partitions(1).at(0)
  const name = command.split('|')
  const key = command === 'setnx' ? PARTITIONS_KEY : `${streamPrefix}access`
  if (command === 'eval' || command === 'evalsha') return [...name, 'script', '1', key]
  if (command === 'xread') return [...name, 'STREAMS', key, '0']
  if (command === 'spublish') return [...name, wake, 'news']
  if (command === 'ssubscribe') return [...name, wake]
  if (['del', 'exists', 'unlink'].includes(command)) return [...name, key] // whatever is behind it is a key, too
  return [...name, key, 'x', 'x']
}
