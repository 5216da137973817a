/** One file in ARCHIVE_DIR: whole streams of calls that are to be removed from Redis. It has its name only once it is whole. */
import { randomBytes } from 'node:crypto'
import { access, constants, readdir, rename, rm, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { OperatorError } from '../shared/config.js'
import { crashPoint } from '../shared/crash.js'
import { reasonOf } from '../shared/log.js'
import type { RedisClient } from '../shared/redis.js'
import { syncDirectory } from '../shared/sync-directory.js'
import { ArchiveWriter } from './archive.js'
import { type Claimed, readClaimed } from './claimed.js'

/** What a line has beside the event. */
const LINE_OVERHEAD_BYTES = 100
/** Files that are being written are hidden; their writers take seconds, so after so long they are dead. */
const UNFINISHED = /^\.calltape-.*\.ndjson\.gz$/
const DEAD_AFTER_MS = 3600_000

/**
 * Also removes what killed sinks have left half-written there: what was in it is in Redis still.
 *
 * @throws OperatorError naming ARCHIVE_DIR when it cannot be written to
 */
export async function requireArchiveDir(dir: string): Promise<void> {
  try {
    if (!(await stat(dir)).isDirectory()) throw new Error('it is no directory')
    await access(dir, constants.W_OK)
    for (const name of await readdir(dir)) {
      if (!UNFINISHED.test(name)) continue
      const path = join(dir, name)
      const age = Date.now() - (await stat(path)).mtimeMs
      if (age > DEAD_AFTER_MS) await rm(path, { force: true })
    }
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    const reason = code === 'ENOENT' ? 'it does not exist, make it first' : reasonOf(error as Error)
    throw new OperatorError(`ARCHIVE_DIR: cannot write to ${dir}: ${reason}`, { cause: error })
  }
}

export class ArchiveFile {
  entries = 0
  /** About, before compression. */
  bytes = 0

  private constructor(
    private readonly dir: string,
    private readonly name: string,
    private readonly writer: ArchiveWriter,
  ) {}

  /** @throws OperatorError when it cannot be created */
  static async create(dir: string): Promise<ArchiveFile> {
    const time = new Date().toISOString().replace(/[-:]|\.\d+/g, '')
    const name = `calltape-${time}-${randomBytes(4).toString('hex')}.ndjson.gz`
    return new ArchiveFile(dir, name, await ArchiveWriter.open(join(dir, `.${name}`)))
  }

  get path(): string {
    return join(this.dir, this.name)
  }

  private get unfinished(): string {
    return join(this.dir, `.${this.name}`)
  }

  /** A call's stream up to the entry that was its last one when it was claimed. @throws Redis' and the disk's errors */
  async add(client: RedisClient, call: Claimed): Promise<void> {
    let written = 0
    for await (const entries of readClaimed(client, call)) {
      await this.writer.write(call.callSid, entries)
      written += entries.length
      for (const { fields } of entries) for (const field of fields) this.bytes += field.length
      this.bytes += entries.length * LINE_OVERHEAD_BYTES
    }
    await this.writer.endCall(call.callSid, written)
    this.entries += written
  }

  /** Afterwards it is whole, on the disk, and has its name. @throws when it is not: then it must not be relied on */
  async finish(): Promise<void> {
    await this.writer.close()
    crashPoint('before-archived')
    await rename(this.unfinished, this.path)
    await syncDirectory(this.dir)
    crashPoint('after-archived')
  }

  /** It came to nothing. */
  async discard(): Promise<void> {
    await this.writer.close().catch(() => undefined) // why it came to nothing is known already
    await rm(this.unfinished, { force: true }).catch(() => undefined) // the next start of a sink removes it
  }
}
