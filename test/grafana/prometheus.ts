/** Prometheus for the suites that ask it: found in PATH or installed, and run on loopback with what is given to it. */
import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { installPackage } from '../../cli/debian-package.js'
import { runServer } from '../../cli/local-server.js'
import { childEnvironment } from '../../shared/config.js'

export interface PrometheusCommands {
  prometheus: string
  promtool: string
}

const say = (line: string) => process.stderr.write(`${line}\n`)

/**
 * `prometheus` and `promtool` of PATH; as root on Debian or Ubuntu they are installed if they are missing.
 *
 * @returns undefined when there are none: it has been said why, and how to get them; the suites then skip
 * @throws with CI=true, when they could not be installed where they can be
 */
export async function findPrometheus({
  path = childEnvironment().PATH ?? '',
  isRoot = process.getuid?.() === 0,
} = {}): Promise<PrometheusCommands | undefined> {
  const which = (name: string) => {
    const found = path.split(delimiter).find((dir) => dir !== '' && existsSync(join(dir, name)))
    return found && join(found, name)
  }
  const find = () => {
    const [prometheus, promtool] = [which('prometheus'), which('promtool')]
    return prometheus && promtool ? { prometheus, promtool } : undefined
  }
  const found = find()
  if (found) return found
  const canInstall = isRoot && which('apt-get') !== undefined
  let why = 'there is no prometheus and promtool in PATH'
  if (canInstall) {
    try {
      await installPackage('prometheus', say)
      const installed = find()
      if (installed) return installed
    } catch (cause) {
      why = `prometheus could not be installed: ${cause}`
    }
    if (childEnvironment().CI === 'true') throw new Error(why)
  }
  const how = which('apt-get') ? 'run: sudo apt-get install prometheus' : 'see https://prometheus.io/download/'
  say(`SKIPPED: no query of the dashboards and no alert rule is tested, because ${why}; ${how}`)
  return undefined
}

export interface Sample {
  metric: Record<string, string>
  /** Not a number where there is nothing to divide by, or no observation. */
  value: number
}

export interface Rule {
  type: 'alerting' | 'recording'
  name: string
  /** As Prometheus prints it. */
  query: string
  health: string
  lastError?: string
  labels?: Record<string, string>
  annotations?: Record<string, string>
}

export class Prometheus {
  private constructor(
    readonly url: string,
    private readonly end: () => Promise<void>,
  ) {}

  /**
   * Scrapes and evaluates every second.
   *
   * @param targets URLs of services, by the name of their job
   */
  static async start(command: string, ruleFile: string, targets: Record<string, string[]>): Promise<Prometheus> {
    const folder = await mkdtemp(join(tmpdir(), 'calltape-test-prometheus-'))
    const config = {
      global: { scrape_interval: '1s', scrape_timeout: '1s', evaluation_interval: '1s' },
      rule_files: [ruleFile],
      scrape_configs: Object.entries(targets).map(([job_name, urls]) => ({
        job_name,
        static_configs: [{ targets: urls.map((url) => new URL(url).host) }],
      })),
    }
    const configFile = join(folder, 'prometheus.yml')
    const data = join(folder, 'data')
    await mkdir(data)
    await writeFile(configFile, JSON.stringify(config)) // JSON is YAML
    const server = await runServer({
      name: 'Prometheus',
      command,
      args: (port) => [
        `--config.file=${configFile}`,
        `--storage.tsdb.path=${data}`,
        `--web.listen-address=127.0.0.1:${port}`,
      ],
      marker: `--storage.tsdb.path=${data}`,
      stopSignal: 'SIGTERM',
      files: join(folder, 'prometheus'),
      port: undefined,
      notReady: async (port) => {
        const answer = await fetch(`http://127.0.0.1:${port}/-/ready`).catch((error: Error) => error)
        if (answer instanceof Error) return answer.message
        return answer.ok ? undefined : await answer.text()
      },
      say,
    })
    return new Prometheus(`http://127.0.0.1:${server.port}`, async () => {
      await server.stop()
      await rm(folder, { recursive: true, force: true })
    })
  }

  stop(): Promise<void> {
    return this.end()
  }

  /** @throws what Prometheus finds wrong with the expression, naming it */
  async query(expr: string): Promise<Sample[]> {
    const body = new URLSearchParams({ query: expr })
    const answer = (await (await fetch(`${this.url}/api/v1/query`, { method: 'POST', body })).json()) as {
      status: string
      error?: string
      data: { resultType: string; result: { metric: Record<string, string>; value: [number, string] }[] }
    }
    if (answer.status !== 'success') throw new Error(`${answer.error} in ${expr}`)
    if (answer.data.resultType !== 'vector') throw new Error(`a ${answer.data.resultType} is the result of ${expr}`)
    return answer.data.result.map(({ metric, value }) => ({ metric, value: Number(value[1]) }))
  }

  async rules(): Promise<Rule[]> {
    const answer = (await (await fetch(`${this.url}/api/v1/rules`)).json()) as {
      data: { groups: { rules: Rule[] }[] }
    }
    return answer.data.groups.flatMap((group) => group.rules)
  }
}
