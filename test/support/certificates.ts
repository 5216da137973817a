/** A certificate authority of a test's own, by openssl. */
import { execFile } from 'node:child_process'
import { mkdtemp, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'

const KEY = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes']

/** Paths of PEM files. */
export interface Certificate {
  cert: string
  key: string
}

export class Authority {
  private constructor(
    private readonly folder: string,
    private readonly own: Certificate,
  ) {}

  static async create(): Promise<Authority> {
    const folder = await mkdtemp(join(tmpdir(), 'calltape-test-certificates-'))
    const authority = new Authority(folder, { cert: join(folder, 'ca.crt'), key: join(folder, 'ca.key') })
    await authority.renew()
    return authority
  }

  get caFile(): string {
    return this.own.cert
  }

  /** Another authority in the same files: what it signed before is nobody's any more. */
  async renew(): Promise<void> {
    const { cert, key } = this.own
    await openssl('req', '-x509', ...KEY, '-keyout', key, '-out', `${cert}.new`, '-days', '2', '-subj', '/CN=test CA')
    await rename(`${cert}.new`, cert)
  }

  /** @param name as in subjectAltName: IP:127.0.0.1, DNS:… @param days 0: it has expired a second later */
  async sign(file: string, name: string, days = 1): Promise<Certificate> {
    const [cert, key] = [join(this.folder, `${file}.crt`), join(this.folder, `${file}.key`)]
    await openssl('req', ...KEY, '-keyout', key, '-out', `${cert}.csr`, '-subj', `/CN=${file}`)
    await writeFile(`${cert}.ext`, `subjectAltName=${name}`)
    const by = ['-CA', this.own.cert, '-CAkey', this.own.key, '-CAcreateserial', '-extfile', `${cert}.ext`]
    await openssl('x509', '-req', '-in', `${cert}.csr`, ...by, '-out', `${cert}.new`, '-days', String(days))
    await rename(`${cert}.new`, cert)
    return { cert, key }
  }

  async remove(): Promise<void> {
    await rm(this.folder, { recursive: true })
  }
}

const openssl = (...args: string[]) => promisify(execFile)('openssl', args)
