/**
 * `calltape export CALL_SID --format json|vcon|text`: a call for others, as PostgreSQL has it.
 *
 * json: {"format":"calltape-call-1","call_sid","call","turns","events","quarantined"}; `call` are the columns of call_sessions (null
 * while there is no row) but for full_transcript, `turns` and `events` rows of their tables, in call order. Names and meanings stay;
 * fields may be added. Times are RFC 3339, in UTC.
 */
import { writeFile } from 'node:fs/promises'
import { type Config, givenEnvironment, OperatorError, readConfig } from '../shared/config.js'
import { compareIds } from '../shared/entry-ids.js'
import { reasonOf } from '../shared/log.js'
import { createPool } from '../shared/postgres.js'
import { requireReachable, requireSchema } from '../shared/schema.js'
import { type ExportedCall, readCall } from './export/call.js'
import { asText } from './export/text.js'
import { asVcon } from './export/vcon.js'
import { listQuarantine } from './quarantined-entries.js'
import { find, hostOf, type LiveState, lookInRedis } from './show.js'
import { runningStack } from './stack.js'

export interface ExportOptions {
  format: string
  /** Instead of standard output. */
  out?: string
  /** The folder of the `calltape up` to ask. */
  data: string
}

/** What people said on the phone is nobody else's business. */
const FILE_MODE = 0o600
const JSON_FORMAT = 'calltape-call-1'

const FORMATS: Record<string, (call: ExportedCall) => string> = {
  json: (call) => toJson({ format: JSON_FORMAT, ...call }),
  text: asText,
  vcon: (call) => toJson(asVcon(call)),
}

const toJson = (value: object) => `${JSON.stringify(value, null, 2)}\n`

/**
 * Says on standard error what is missing: of a live call, of one that is not all in PostgreSQL yet, or in quarantine.
 *
 * @throws OperatorError when PostgreSQL cannot be asked or does not know the call, or the file cannot be written
 */
export async function exportCall(callSid: string, options: ExportOptions): Promise<void> {
  const print = FORMATS[options.format]
  if (!print) throw new OperatorError(`--format wants text, json or vcon, got ${options.format}`)
  const config = readConfig({ ...runningStack(options.data), ...givenEnvironment() })
  const [call, inRedis] = await Promise.all([lookInPostgres(config, callSid), find(() => lookInRedis(config, callSid))])
  const live = 'value' in inRedis ? inRedis.value.live : undefined
  const where = `PostgreSQL at ${hostOf(config.DATABASE_URL)}`
  if (!call && live) {
    throw new OperatorError(
      `call ${callSid} is in Redis, and not in ${where} yet: wait for a sink, or see calltape show`,
    )
  }
  if (!call) {
    const redis = 'unreachable' in inRedis ? inRedis.unreachable : 'nothing there'
    const hosts = `Redis at ${hostOf(config.REDIS_URL)}: ${redis}`
    throw new OperatorError(`nothing is known of call ${callSid}. Looked in\n  ${hosts}\n  ${where}: nothing there`)
  }
  const text = print(call)
  if (options.out === undefined) process.stdout.write(text)
  else {
    await writeFile(options.out, text, { mode: FILE_MODE }).catch((error: Error) => {
      throw new OperatorError(`--out: ${options.out} cannot be written: ${reasonOf(error)}`, { cause: error })
    })
  }
  for (const note of notesOn(call, live)) console.error(`calltape: ${note}`)
}

async function lookInPostgres(config: Config, callSid: string): Promise<ExportedCall | undefined> {
  const pool = createPool(config, 'export', 1)
  try {
    await requireReachable(pool, config)
    await requireSchema(pool, config)
    const { total } = await listQuarantine(pool, { callSid }, 0)
    return await readCall(pool, total, callSid)
  } finally {
    await pool.end()
  }
}

/** What an export does not have. */
function notesOn({ call_sid, call, quarantined }: ExportedCall, live: LiveState | undefined): string[] {
  const notes: string[] = []
  if (!call?.finalized_at) notes.push(`call ${call_sid} is live: the export is of what there is so far`)
  if (live && compareIds(live.last, live.cursor) > 0) {
    notes.push(`call ${call_sid}: something of it is not in PostgreSQL yet, and not in the export`)
  }
  if (quarantined > 0) notes.push(`call ${call_sid}: ${quarantined} in quarantine, not in the export`)
  if (call?.complete === false) notes.push(`call ${call_sid}: its transcript has gaps`)
  return notes
}
