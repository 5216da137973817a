/** `/webhooks/PROVIDER/…` and `/streams/PROVIDER`: whose a request is, and whether it really comes from there. */
import { countProvidersFromZero } from '../shared/metrics.js'
import { tokenCheck } from './auth.js'
import { hasOtherTurns, isAnswered } from './calls.js'
import { decodePart, type RequestHead } from './exchange.js'
import { type Answer, FROM_A_PAGE, problem } from './http.js'
import { ProviderConnection } from './provider-connection.js'
import { createProviders } from './providers/index.js'
import type { Provider, ProviderRequest } from './providers/provider.js'
import type { IngestParts } from './routes.js'
import type { Connection } from './server.js'
import { takeWebhook } from './webhooks.js'

const NO_BODY = Buffer.alloc(0)

export class ProviderRoutes {
  private readonly providers: Map<string, Provider>
  private readonly hasToken: (authorization: string) => boolean

  constructor(private readonly parts: IngestParts) {
    this.providers = createProviders(parts.config)
    countProvidersFromZero(parts.metrics, [...this.providers.keys()])
    this.hasToken = tokenCheck(parts.config.INGEST_TOKENS)
  }

  /** Before there is a body: who is no provider's, and whose secret is in the head and not ours, need not send one. */
  denyUnread(head: RequestHead): Answer | undefined {
    const found = this.find('/webhooks/', head, NO_BODY)
    if (!found) return this.unknown('webhook')
    const { provider, request } = found
    if (provider.verify && !provider.isSecretInHead) return undefined
    const answer = this.deny(provider, request)
    if (answer) this.parts.metrics.webhooks.inc({ provider: provider.name, status: answer.status.slice(0, 3) })
    return answer
  }

  async webhook(head: RequestHead, body: Buffer): Promise<Answer> {
    const found = this.find('/webhooks/', head, body)
    if (!found) return this.unknown('webhook')
    const { provider, request } = found
    const answer = this.deny(provider, request) ?? (await this.take(provider, request))
    this.parts.metrics.webhooks.inc({ provider: provider.name, status: answer.status.slice(0, 3) })
    return answer
  }

  private async take(provider: Provider, request: ProviderRequest): Promise<Answer> {
    const { redis, partitions, deliveries, metrics, log } = this.parts
    try {
      return await takeWebhook(provider, request, {
        deliveries,
        metrics,
        hasOtherTurns: (callSid, ids) => hasOtherTurns(redis, partitions, callSid, ids),
        isAnswered: (callSid) => isAnswered(redis, partitions, callSid),
      })
    } catch (err) {
      log.error({ provider: provider.name, route: request.route, err }, 'a webhook could not be translated')
      return problem('500 Internal Server Error', 'not_translated', 'calltape cannot cope with this: see its log')
    }
  }

  stream(head: RequestHead): Connection | Answer {
    const { deliveries, metrics, log } = this.parts
    const found = this.find('/streams/', head, NO_BODY)
    const stream = found?.provider.openStream?.()
    if (!found || !stream) return this.unknown('WebSocket')
    const denied = this.deny(found.provider, found.request)
    return denied ?? new ProviderConnection(found.provider.name, stream, deliveries, metrics, log)
  }

  /** Does not say which path: a secret may be a part of it. */
  private unknown(kind: 'webhook' | 'WebSocket'): Answer {
    const paths = [...this.providers.values()].flatMap(({ name, routes, openStream }) =>
      kind === 'webhook'
        ? routes.map((route) => `/webhooks/${name}${route && `/${route}`}`)
        : openStream
          ? [`/streams/${name}`]
          : [],
    )
    return problem('404 Not Found', 'not_found', `there is no such ${kind}: there are ${paths.join(' ')}`)
  }

  /** Whose path it is; the last part of it may be a secret. */
  private find(prefix: string, head: RequestHead, body: Buffer) {
    const [name = '', ...rest] = head.path.slice(prefix.length).split('/')
    const provider = this.providers.get(name)
    const routes = prefix === '/streams/' ? [''] : (provider?.routes ?? [])
    const route = rest.join('/')
    const request = {
      ...head,
      route,
      pathSecret: undefined,
      publicUrls: this.publicUrls(head),
      body,
      receivedMs: Date.now(),
    }
    if (provider && routes.includes(route)) return { provider, request }
    const withoutSecret = rest.slice(0, -1).join('/')
    if (!provider?.takesPathSecret || rest.length === 0 || !routes.includes(withoutSecret)) return undefined
    return { provider, request: { ...request, route: withoutSecret, pathSecret: decodePart(rest.at(-1)!) } }
  }

  /** What its provider may have called it: PUBLIC_URL if that is set, for behind a proxy we know but the proxy's name for us. */
  private publicUrls({ path, queryString, isWebSocket, header }: RequestHead): string[] {
    const { PUBLIC_URL, TLS_CERT_FILE } = this.parts.config
    const schemes = TLS_CERT_FILE ? ['https', 'http'] : ['http', 'https']
    const bases = PUBLIC_URL
      ? [PUBLIC_URL.replace(/\/$/, '')]
      : schemes.map((scheme) => `${scheme}://${header('host')}`)
    const urls = bases.map((base) => base + path + (queryString === '' ? '' : `?${queryString}`))
    return isWebSocket ? [...urls.map((url) => url.replace(/^http/, 'ws')), ...urls] : urls
  }

  /** @returns undefined when the sender is who he says he is */
  private deny(provider: Provider, request: ProviderRequest): Answer | undefined {
    const { INGEST_TOKENS } = this.parts.config
    if (provider.verify) {
      const refusal = provider.verify(request)
      if (!refusal) return undefined
      this.parts.metrics.refused.inc({ code: refusal.code })
      return refusal.code === 'unauthorized'
        ? problem('401 Unauthorized', refusal.code, refusal.message, { 'WWW-Authenticate': 'Basic realm="calltape"' })
        : problem('403 Forbidden', refusal.code, refusal.message)
    }
    if (INGEST_TOKENS.length === 0) {
      // Then only this machine can reach us; but so can any page in a browser on it. Browsers say where a request is from.
      const isFromPage = request.header('origin') !== '' || request.header('sec-fetch-site') !== ''
      return isFromPage ? FROM_A_PAGE : undefined
    }
    if (this.hasToken(request.header('authorization'))) return undefined
    const orSet = provider.secretVariable ? `set ${provider.secretVariable} for ingest, or ` : ''
    const wants = `${orSet}send Authorization: Bearer with one of INGEST_TOKENS`
    return problem('401 Unauthorized', 'unauthorized', wants, { 'WWW-Authenticate': 'Bearer' })
  }
}
