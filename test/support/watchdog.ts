/**
 * The stores of a run that is killed end with it. They are in process groups of their own, so that a Ctrl-C leaves them to the run's
 * teardown, and without one they would serve nobody for ever.
 *
 * A shell reads from a pipe which servers run, and when the pipe is closed, however its writer has ended, it kills those that are left.
 */
import { type ChildProcess, spawn } from 'node:child_process'

const SCRIPT = `
  servers=' '
  while read -r what server; do
    case $what in
      +) servers="$servers$server " ;;
      -) servers="\${servers%% $server *} \${servers#* $server }" ;;
    esac
  done
  for server in $servers; do kill -"\${server%:*}" "\${server#*:}"; done`

let dog: ChildProcess | undefined

function watchdog(): ChildProcess {
  if (dog) return dog
  dog = spawn('/bin/sh', ['-c', SCRIPT], { detached: true, stdio: ['pipe', 'ignore', 'ignore'] })
  dog.unref()
  ;(dog.stdin as unknown as { unref(): void }).unref() // a pipe is a socket
  // One of vitest's workers: without the run that it belongs to, nobody wants what it finds out.
  process.once('disconnect', () => process.exit(1))
  return dog
}

/**
 * @param signal SIGKILL ends one that is stopped, too; PostgreSQL leaves shared memory behind then, and not on SIGQUIT
 * @returns to be called when it has ended; once more does no harm
 */
export function endWithUs(pid: number, signal: 'KILL' | 'QUIT'): () => void {
  const tell = (what: '+' | '-') => watchdog().stdin!.write(`${what} ${signal}:${pid}\n`)
  let isTold = true
  tell('+')
  return () => {
    if (isTold) tell('-')
    isTold = false
  }
}
