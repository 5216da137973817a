/**
 * One process at a time uses a spool directory: whoever wrote its id into the file `owner` last. Nothing needs to be released,
 * so the spool of a process that was killed can be taken over at once. An owner that uses the spool says every second, by the time
 * of the file, that it lives: for those who would rather leave it to its ingest (`calltape erase`).
 *
 * Why nothing that was acked is lost, however long a former owner (A) goes on before it notices the new one (B):
 *  - B claims (renames its id over `owner`), and only then lists and reads the segments.
 *  - A acks a record only if, after its fdatasync, `owner` still holds A's id. Then it was written before B claimed, so B reads
 *    it. If it holds B's id, the record is not acked, whether B happens to read it or not.
 *  - A segment is written by the process in its name alone, and B never writes into A's. What A still writes into one that B
 *    has read and deleted is not acked, see above.
 *  - A segment is deleted by whoever has seen all of it stored in Redis. If A deletes one that B has yet to read, its events are
 *    in Redis, for A reads a segment only when it writes it no more. Both may replay the same one: the events' keys make that
 *    harmless.
 * This wants what every local file system gives: that a rename and a write are seen by other processes at once. NFS does not.
 */
import { randomBytes } from 'node:crypto'
import { open, readFile, rename, stat, utimes } from 'node:fs/promises'
import { join } from 'node:path'
import { syncDirectory } from '../shared/sync-directory.js'

/** Says it loudly enough for a log line and for the answer to a producer. */
export class OwnershipLost extends Error {
  constructor() {
    super('another process has taken over SPOOL_DIR: give each ingest a directory of its own')
  }
}

const SIGN_MS = 1000
const DEAD_AFTER_MS = 10_000

/** Whether somebody uses a spool, or did seconds ago. @throws the file system's errors */
export async function isSpoolUsed(directory: string): Promise<boolean> {
  return Date.now() - (await stat(join(directory, 'owner'))).mtimeMs < DEAD_AFTER_MS
}

export class SpoolOwner {
  private signs: NodeJS.Timeout | undefined

  private constructor(
    private readonly file: string,
    readonly id: string,
  ) {}

  /** @throws the file system's errors */
  static async claim(directory: string): Promise<SpoolOwner> {
    const id = randomBytes(16).toString('hex')
    const owner = new SpoolOwner(join(directory, 'owner'), id)
    const draft = `${owner.file}.${id}`
    const file = await open(draft, 'wx')
    try {
      await file.writeFile(id)
      await file.sync()
    } finally {
      await file.close()
    }
    await rename(draft, owner.file)
    await syncDirectory(directory)
    return owner
  }

  /**
   * To be called behind the fdatasync of what is to be acked.
   *
   * @throws OwnershipLost, or the file system's errors
   */
  async verify(): Promise<void> {
    const id = await readFile(this.file, 'utf8').catch((error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return undefined // somebody has removed it: nothing says that the directory is still ours
      throw error
    })
    if (id !== this.id) throw new OwnershipLost()
  }

  /** Says from now on that somebody uses the spool. */
  use(): void {
    const sign = async () => {
      await this.verify() // the file may be another's by now
      await utimes(this.file, new Date(), new Date())
    }
    // Whatever it is, it will be told when something is to be acked.
    this.signs = setInterval(() => sign().catch(() => clearInterval(this.signs)), SIGN_MS).unref()
  }

  /** Nobody uses it any more. @throws OwnershipLost, or the file system's errors */
  async leave(): Promise<void> {
    clearInterval(this.signs)
    await this.verify()
    await utimes(this.file, new Date(0), new Date(0))
  }
}
