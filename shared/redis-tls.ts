/** TLS with Redis (rediss://): a CA of its owner's own, a certificate to show, and what an operator is told where it fails. */
import { X509Certificate } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { type ConnectionOptions, createSecureContext, type SecureContext } from 'node:tls'
import { type Config, OperatorError } from './config.js'
import { type Logger, reasonOf } from './log.js'

const VARIABLES = ['REDIS_TLS_CA_FILE', 'REDIS_TLS_CERT_FILE', 'REDIS_TLS_KEY_FILE'] as const
type Variable = (typeof VARIABLES)[number]
/** Paths of PEM files. Without a CA, those that Node knows count; without a certificate, none is shown. */
export type RedisTls = Partial<Pick<Config, Variable>>

/**
 * The files are read anew for each connection: certificates are renewed in place, and a connection with one that has run out
 * meanwhile would fail for ever. Files that cannot be used then (half written, say) leave those in force that were read before.
 *
 * @param log told when they do
 * @returns for tls.connect
 * @throws OperatorError naming the variable whose file cannot be used now
 */
export function redisTls(files: RedisTls, log: Logger): ConnectionOptions {
  let context = readContext(files)
  return {
    get secureContext(): SecureContext {
      try {
        context = readContext(files)
      } catch (error) {
        log.error({ err: error }, 'redis connection: the TLS files cannot be used, those read before are')
      }
      return context
    },
  }
}

function readContext(files: RedisTls): SecureContext {
  const [ca, cert, key] = VARIABLES.map((variable) => read(variable, files[variable]))
  if (ca !== undefined) requireCertificate('REDIS_TLS_CA_FILE', ca) // Node would take anything for a CA, and then nobody is known
  if (cert !== undefined) requireCertificate('REDIS_TLS_CERT_FILE', cert)
  try {
    return createSecureContext({ ca, cert, key })
  } catch (error) {
    throw new OperatorError(`REDIS_TLS_KEY_FILE: is no key for REDIS_TLS_CERT_FILE: ${reasonOf(error as Error)}`)
  }
}

function read(variable: Variable, path: string | undefined): Buffer | undefined {
  if (path === undefined) return undefined
  try {
    return readFileSync(path)
  } catch (error) {
    throw new OperatorError(`${variable}: cannot be read: ${reasonOf(error as Error)}`)
  }
}

function requireCertificate(variable: Variable, pem: Buffer): void {
  try {
    new X509Certificate(pem)
  } catch (error) {
    throw new OperatorError(`${variable}: is no PEM certificate: ${reasonOf(error as Error)}`)
  }
}

/** Whoever signed it is nobody whom we know. */
const UNKNOWN_CA = new Set([
  'DEPTH_ZERO_SELF_SIGNED_CERT',
  'SELF_SIGNED_CERT_IN_CHAIN',
  'UNABLE_TO_GET_ISSUER_CERT',
  'UNABLE_TO_GET_ISSUER_CERT_LOCALLY',
  'UNABLE_TO_VERIFY_LEAF_SIGNATURE',
])

/**
 * Why a first connection failed, for an operator: in the error's words, and what should be looked at.
 *
 * @param error undefined where it was closed without one
 */
export function connectFailure(url: string, files: RedisTls, error: NodeJS.ErrnoException | undefined): string {
  return `${error ? wordsOf(error) : 'it closes the connection'}${hintOn(url, files, error?.code ?? '')}`
}

/** OpenSSL's message has its source line in it, too. */
function wordsOf(error: NodeJS.ErrnoException & { reason?: unknown }): string {
  const { code = '', reason } = error
  return code.startsWith('ERR_SSL_') && typeof reason === 'string' ? reason : reasonOf(error)
}

function hintOn(url: string, files: RedisTls, code: string): string {
  const isTls = url.startsWith('rediss:')
  // It does not say why, or says so when what we have written has failed already.
  const isRefused = ['', 'ECONNRESET', 'EPIPE'].includes(code) || /^ERR_SSL_.*_ALERT_/.test(code)
  if (!isTls) return isRefused ? ', it may want TLS: rediss://' : ''
  if (UNKNOWN_CA.has(code)) {
    return files.REDIS_TLS_CA_FILE === undefined
      ? ', name the CA of its certificate in REDIS_TLS_CA_FILE'
      : ', the CA in REDIS_TLS_CA_FILE has not signed it'
  }
  // Redis takes a TLS greeting on its other port for the beginning of a command, and waits for the rest.
  if (code === 'ETIMEDOUT' || code === 'ERR_SSL_WRONG_VERSION_NUMBER')
    return ', its port may be one without TLS: redis://'
  if (!isRefused) return ''
  return files.REDIS_TLS_CERT_FILE === undefined
    ? ', it may want a certificate to be shown: REDIS_TLS_CERT_FILE and REDIS_TLS_KEY_FILE'
    : ', it may refuse the certificate in REDIS_TLS_CERT_FILE'
}
