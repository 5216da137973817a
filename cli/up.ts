/** `calltape up`: everything in one go, until Ctrl-C. */
import { OperatorError, readConfig } from '../shared/config.js'
import { startStack } from './stack.js'

/**
 * @param options.data the folder for the stores' data and the logs
 * @param usualFolder where commands look when they are not told another one
 */
export async function up(options: { data: string }, usualFolder: string): Promise<void> {
  const say = (line: string) => console.error(line)
  const interrupted = new Promise<undefined>((resolve) => {
    // Handled for as long as the process lives: some versions of npm pass Ctrl-C on, so that it comes twice.
    for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => resolve(undefined))
  })
  const stack = await startStack({ dataDir: options.data, say })
  const auth = readConfig().INGEST_TOKENS.length > 0 ? ` -H "Authorization: Bearer \${INGEST_TOKENS%%,*}"` : ''
  console.log(`calltape is up.

  ${stack.describe.join('\n  ')}

Send a first event:

  curl -s ${stack.ingestUrl}/v1/events -H 'Content-Type: application/json'${auth} \\
    -d '[{"type":"turn","call_sid":"my-first-call","seq":0,"speaker":"customer","text":"Hello, can you hear me?"},{"type":"call.ended","call_sid":"my-first-call","turn_count":1}]'

and see where it is:

  npx calltape show my-first-call${options.data === usualFolder ? '' : ` --data ${options.data}`}

Ctrl-C stops everything; the next start finds its data.`)
  const reason = await Promise.race([stack.failed, interrupted])
  if (reason === undefined) say('\nstopping …')
  await stack.stop()
  if (reason !== undefined) throw new OperatorError(reason)
  say('stopped')
}
