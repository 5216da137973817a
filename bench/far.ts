/** PostgreSQL as it is in another region: a relay that hands every byte on a while later. */
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'

export interface Far {
  /** The same URL, by way of the relay. */
  url: string
  stop(): Promise<void>
}

/** @param delayMs each way */
export async function farAway(url: string, delayMs: number): Promise<Far> {
  const target = new URL(url)
  const open = new Set<Socket>()
  const server = createServer((near) => {
    const far = connect(Number(target.port), target.hostname)
    for (const [from, to] of [
      [near, far],
      [far, near],
    ] as const) {
      open.add(from)
      // Timers of one length go off in their order, so the bytes arrive in theirs.
      const later = (act: () => void) => setTimeout(() => to.destroyed || act(), delayMs)
      from.on('data', (chunk) => later(() => to.write(chunk)))
      from.on('end', () => later(() => to.end()))
      from.on('error', () => to.destroy()) // whoever it was connected to sees that
      from.on('close', () => open.delete(from))
    }
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  const relayed = new URL(url)
  relayed.hostname = '127.0.0.1'
  relayed.port = String((server.address() as AddressInfo).port)
  return {
    url: relayed.href,
    async stop() {
      for (const socket of open) socket.destroy()
      server.close()
      await once(server, 'close')
    },
  }
}
