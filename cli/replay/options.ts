/** What `calltape replay` may be asked for, and what does not go together. */
import { OperatorError } from '../../shared/config.js'
import { databaseSchema } from '../../shared/settings-values.js'
import type { Window } from '../streams.js'
import { readWindow } from '../verify.js'

export interface ReplayOptions {
  /** Only this call. */
  call?: string
  /** Only entries that arrived from then on: epoch ms, an entry id, or an RFC 3339 time. */
  from?: string
  /** Only entries that arrived until then: likewise. */
  to?: string
  all?: boolean
  dryRun?: boolean
  /** Entries a second at most. */
  rate?: number
  /** Rebuild into this schema, and compare. */
  schema?: string
  /** Write the streams to this file. */
  archive?: string
  /** Read this file, or all in this folder, instead of Redis. */
  fromArchive?: string
  json?: boolean
  /** The folder of the `calltape up` to ask. */
  data: string
}

/** @throws OperatorError that says what is wrong with the options */
export function readScope(options: ReplayOptions): { callSid: string | undefined; window: Window } {
  const { call, from, to, all, dryRun, schema, archive, fromArchive } = options
  const hasWindow = from !== undefined || to !== undefined
  if (!all && call === undefined && !hasWindow) {
    throw new OperatorError(
      'say what to replay: --call SID, --from and --to (when it arrived), or --all. It stores what is in the streams and not in ' +
        'PostgreSQL; what is there stays as it is. --dry-run says what would change',
    )
  }
  if (all && (call !== undefined || hasWindow)) {
    throw new OperatorError('--all means every call and all of it: it does not go with --call, --from or --to')
  }
  if (dryRun && options.rate !== undefined) {
    throw new OperatorError('--dry-run stores nothing: it does not go with --rate')
  }
  if (archive !== undefined) {
    for (const [name, given] of Object.entries({
      '--dry-run': dryRun,
      '--schema': schema,
      '--from-archive': fromArchive,
    })) {
      if (given) throw new OperatorError(`--archive only writes a file: it does not go with ${name}`)
    }
    if (!/[^/]\.ndjson(\.gz|\.zst)?$/.test(archive)) {
      throw new OperatorError(`--archive wants a name that ends in .ndjson, .ndjson.gz or .ndjson.zst, got ${archive}`)
    }
  }
  if (schema !== undefined) {
    const { error } = databaseSchema.safeParse(schema)
    if (error) throw new OperatorError(`--schema ${error.issues[0]!.message}, got ${schema}`)
    if (dryRun) throw new OperatorError('--schema touches nothing that is in use: it does not go with --dry-run')
    if (hasWindow) throw new OperatorError('--schema compares whole calls: it does not go with --from or --to')
  }
  return { callSid: call, window: readWindow(options) }
}
