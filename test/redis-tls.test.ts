/** A Redis that speaks TLS alone to strangers, with a CA of its own, and wants to be shown certificates: all of calltape on it. */
import { once } from 'node:events'
import { readFile, writeFile } from 'node:fs/promises'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { createServer } from 'node:tls'
import { afterAll, beforeAll, describe, expect, inject, onTestFinished, test } from 'vitest'
import { readConfig } from '../shared/config.js'
import { Partitions } from '../shared/keys.js'
import { connectRedis } from '../shared/redis.js'
import type { RedisTls } from '../shared/redis-tls.js'
import { Calls, ended, newSid, seqs } from './support/calls.js'
import { Authority, type Certificate } from './support/certificates.js'
import { lastingPort } from './support/processes.js'
import { calltape } from './support/program.js'
import { log, startTestStack, until } from './support/stores.js'
import { ownRedis, type StoreServer, turn } from './support/streams.js'

// The certificates are files of this machine: a container has them not.
describe.skipIf(inject('images'))('with_a_redis_that_speaks_tls', () => {
  let authority: Authority
  let client: Certificate
  let server: StoreServer
  let url: string
  let files: RedisTls

  beforeAll(async () => {
    authority = await Authority.create()
    const own = await authority.sign('server', 'IP:127.0.0.1')
    client = await authority.sign('client', 'DNS:calltape')
    const port = await lastingPort()
    const args = ['--tls-port', port, '--tls-cert-file', own.cert, '--tls-key-file', own.key]
    server = await ownRedis('single', ...args.map(String), '--tls-ca-cert-file', authority.caFile)
    url = `rediss://127.0.0.1:${port}`
    files = {
      REDIS_TLS_CA_FILE: authority.caFile,
      REDIS_TLS_CERT_FILE: client.cert,
      REDIS_TLS_KEY_FILE: client.key,
    }
  })
  afterAll(async () => {
    await server.stop()
    await authority.remove()
  })

  test('everything_works_over_tls_and_goes_on_after_a_restart_with_renewed_certificates', async () => {
    const environment = { REDIS_URL: url, ...(files as Record<string, string>) }
    const stack = await startTestStack(environment)
    onTestFinished(() => stack.end())
    const redis = await connectRedis(url, log, files)
    onTestFinished(() => redis.disconnect())
    const calls = new Calls({
      ...stack,
      redis: { ...stack.redis, client: redis as never, partitions: new Partitions(64) },
    })
    const [before, after] = [newSid(), newSid()]
    const send = async (sid: string) => {
      const events = [...seqs(20).map((seq) => turn(sid, seq)), ended(sid, 20)]
      const body = JSON.stringify(events)
      const init = { method: 'POST', body, headers: { 'Content-Type': 'application/json' } }
      return (await fetch(`${stack.ingest.url}/v1/events`, init)).status
    }
    expect(await send(before)).toBe(200)
    await calls.settled(before)
    expect(await calls.session(before)).toMatchObject({ complete: true, turn_count: 20 })

    await server.kill()
    await authority.renew()
    await authority.sign('server', 'IP:127.0.0.1')
    await authority.sign('client', 'DNS:calltape')
    await server.start()
    await until('ingest stores again', async () => (await send(after)) === 200, 20_000)
    await until('our own client is back', () => redis.status === 'ready', 20_000)
    await calls.settled(after, 20_000)
    expect(await calls.session(after)).toMatchObject({ complete: true, turn_count: 20 })

    const all = { ...environment, DATABASE_URL: stack.database.url }
    for (const [args, said] of [
      [['show', before], /Redis +21 events, ended/i],
      [['verify'], /Everything is there/],
      [['replay', '--all', '--dry-run'], /./],
      [['orphans'], /No orphans/],
      [['quarantine', 'list'], /./],
      [['rescue', '--dry-run'], /./],
      [['erase', before], /./],
    ] as const) {
      const { code, out, err } = await calltape([...args], all)
      expect({ args, code, err }).toEqual({ args, code: 0, err: '' })
      expect(out).toMatch(said)
    }
  })

  describe('the_error_says_what_to_look_at_where', () => {
    const refused = async (at: string, given: RedisTls) => {
      const error: Error = await connectRedis(at, log, given).then(
        (redis) => {
          redis.disconnect()
          return new Error('it connected')
        },
        (error) => error,
      )
      return error.message
    }
    /** @returns the URL of a server that has this certificate, and no more than that */
    async function serverWith({ cert, key }: Certificate): Promise<string> {
      const fake = createServer({ cert: await readFile(cert), key: await readFile(key) }).listen(0, '127.0.0.1')
      onTestFinished(() => void fake.close())
      await once(fake, 'listening')
      return `rediss://127.0.0.1:${(fake.address() as AddressInfo).port}`
    }

    test('its_ca_is_not_known', async () => {
      expect(await refused(url, {})).toMatch(
        /^REDIS_URL: no Redis answers at 127\.0\.0\.1:\d+: self-signed certificate .*name the CA .*REDIS_TLS_CA_FILE$/,
      )
    })
    test('it_is_signed_by_another_ca', async () => {
      const other = await Authority.create()
      onTestFinished(() => other.remove())
      expect(await refused(url, { ...files, REDIS_TLS_CA_FILE: other.caFile })).toMatch(
        /the CA in REDIS_TLS_CA_FILE has not signed it$/,
      )
    })
    test('it_wants_a_certificate', async () => {
      expect(await refused(url, { REDIS_TLS_CA_FILE: authority.caFile })).toMatch(
        /want a certificate .*REDIS_TLS_CERT_FILE/,
      )
    })
    test('it_refuses_ours', async () => {
      const other = await Authority.create()
      onTestFinished(() => other.remove())
      const { cert, key } = await other.sign('stranger', 'DNS:stranger')
      expect(await refused(url, { ...files, REDIS_TLS_CERT_FILE: cert, REDIS_TLS_KEY_FILE: key })).toMatch(
        /refuse the certificate in REDIS_TLS_CERT_FILE$/,
      )
    })
    test('its_certificate_has_expired', async () => {
      const at = await serverWith(await authority.sign('expired', 'IP:127.0.0.1', 0))
      await until('it has', async () => !/ECONNRESET|closed/.test(await refused(at, files)))
      expect(await refused(at, files)).toMatch(/certificate has expired$/)
    })
    test('its_certificate_is_anothers', async () => {
      const at = await serverWith(await authority.sign('elsewhere', 'DNS:elsewhere'))
      expect(await refused(at, files)).toMatch(/not in the cert's list/)
    })
    test('there_is_no_tls (10 s)', async () => {
      expect(await refused(server.url.replace('redis:', 'rediss:'), files)).toMatch(/without TLS: redis:\/\/$/)
    })
    test('there_is_tls_alone', async () => {
      expect(await refused(url.replace('rediss:', 'redis:'), {})).toMatch(/may want TLS: rediss:\/\/$/)
    })
    test('a_file_cannot_be_used', async () => {
      const garbage = join(authority.caFile, '..', 'garbage.pem')
      await writeFile(garbage, 'no certificate')
      expect(await refused(url, { REDIS_TLS_CA_FILE: '/nowhere.pem' })).toMatch(
        /^REDIS_TLS_CA_FILE: cannot be read: .*ENOENT/,
      )
      expect(await refused(url, { REDIS_TLS_CA_FILE: garbage })).toMatch(/^REDIS_TLS_CA_FILE: is no PEM certificate/)
      expect(await refused(url, { ...files, REDIS_TLS_CERT_FILE: garbage })).toMatch(/^REDIS_TLS_CERT_FILE: is no PEM/)
      expect(await refused(url, { ...files, REDIS_TLS_CERT_FILE: authority.caFile })).toMatch(
        /^REDIS_TLS_KEY_FILE: is no key/,
      )
      expect(() => readConfig({ REDIS_TLS_KEY_FILE: 'x' })).toThrow(
        /REDIS_TLS_CERT_FILE and REDIS_TLS_KEY_FILE: set both/,
      )
    })
  })
})
