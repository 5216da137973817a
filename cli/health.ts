/** `calltape health`: asks the ingest or the sink on this machine, or in this container, how it is. */
import { readFileSync } from 'node:fs'
import { get as getHttp } from 'node:http'
import { get as getHttps } from 'node:https'
import { type Config, OperatorError, readConfig } from '../shared/config.js'
import { reasonOf } from '../shared/log.js'

const TIMEOUT_MS = 4000
const ROLES = ['ingest', 'sink'] as const
type Role = (typeof ROLES)[number]

/**
 * Prints what it is told and sets the process's exit code: 0 for well, 1 for not.
 *
 * @param role whom to ask; absent: what the container's first process runs, and nobody where it is neither
 * @param options.ready ask whether it can do its job, and not only whether it lives
 * @throws OperatorError when `role` is neither `ingest` nor `sink`
 */
export async function health(role: string | undefined, options: { ready?: boolean }): Promise<void> {
  const asked = role ?? roleOfContainer()
  if (asked === undefined)
    return console.log('process 1 is neither ingest nor sink: nobody to ask (or say which: calltape health sink)')
  if (!isRole(asked)) throw new OperatorError(`calltape health wants ingest or sink, got ${asked}`)
  const { status, text } = await ask(addressOf(asked, readConfig()), options.ready ? '/readyz' : '/healthz')
  console.log(text)
  if (status !== 200) process.exitCode = 1
}

const isRole = (name: string): name is Role => ROLES.some((role) => role === name)

/** By the arguments of process 1: `tini -- calltape ingest`. */
function roleOfContainer(): Role | undefined {
  try {
    return readFileSync('/proc/1/cmdline', 'utf8').split('\0').find(isRole)
  } catch (error) {
    throw new OperatorError('which one? say ingest or sink: only in a container is it known', { cause: error })
  }
}

function addressOf(role: Role, config: Config): { host: string; port: number; isTls: boolean } {
  if (role === 'sink')
    return { host: reachable(config.SINK_METRICS_HOST), port: config.SINK_METRICS_PORT, isTls: false }
  return {
    host: reachable(config.INGEST_HOST ?? '127.0.0.1'),
    port: config.INGEST_PORT,
    isTls: config.TLS_CERT_FILE !== undefined,
  }
}

const reachable = (host: string) => (host === '0.0.0.0' || host === '::' ? '127.0.0.1' : host)

function ask(
  { host, port, isTls }: ReturnType<typeof addressOf>,
  path: string,
): Promise<{ status: number; text: string }> {
  return new Promise((resolve) => {
    // Its certificate is for its public name, and we ask at home.
    const options = { host, port, path, timeout: TIMEOUT_MS, rejectUnauthorized: false }
    const request = (isTls ? getHttps : getHttp)(options, (response) => {
      let text = ''
      response.setEncoding('utf8')
      response.on('data', (chunk: string) => {
        text += chunk
      })
      response.on('error', (error) => resolve({ status: 0, text: reasonOf(error) }))
      response.on('end', () => resolve({ status: response.statusCode ?? 0, text: text.trimEnd() }))
    })
    request.on('timeout', () => request.destroy(new Error(`no answer within ${TIMEOUT_MS} ms`)))
    request.on('error', (error) => resolve({ status: 0, text: reasonOf(error) }))
  })
}
