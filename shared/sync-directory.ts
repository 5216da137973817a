import { open } from 'node:fs/promises'

/** Makes what was created, renamed or removed in a directory outlive a power failure. @throws the file system's errors */
export async function syncDirectory(path: string): Promise<void> {
  const directory = await open(path, 'r')
  try {
    await directory.sync()
  } finally {
    await directory.close()
  }
}
