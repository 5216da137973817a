/** Prometheus' configuration and rules, judged by promtool; and that grafana/runbooks.md says what to do about each alert. */
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { expect, test, vi } from 'vitest'
import { PACKAGE_ROOT, readPackageFile } from '../../shared/package-root.js'
import { findPrometheus } from './prometheus.js'

const commands = await findPrometheus()
const cwd = join(PACKAGE_ROOT, 'grafana/prometheus')
const promtool = (...args: string[]) => promisify(execFile)(commands!.promtool, args, { cwd })

const alerts = readPackageFile('grafana/prometheus/alerts.yml')
const alertNames = [...alerts.matchAll(/- alert: (\w+)/g)].map(([, name]) => name!)

test.skipIf(!commands)('prometheus_accepts_its_configuration_and_rules', async () => {
  const { stdout } = await promtool('check', 'config', 'prometheus.yml')
  expect(stdout).toMatch(/1 rule files found/)
  expect(stdout).toMatch(new RegExp(`${alertNames.length + 1} rules found`)) // and one that is recorded
})

test.skipIf(!commands)('each_alert_fires_when_it_should_and_not_when_it_should_not', async () => {
  await promtool('test', 'rules', 'alerts.test.yml') // rejects with what differs
})

test('each_alert_is_tested_to_fire', () => {
  const tested = readPackageFile('grafana/prometheus/alerts.test.yml')
  const fires = [...tested.matchAll(/- alertname: (\w+)\n.*\n\s+exp_alerts:\n\s+- exp_labels/g)].map(([, name]) => name)
  expect([...new Set(fires)].sort()).toEqual([...alertNames].sort())
})

test('each_alert_says_how_bad_it_is_what_it_is_and_where_to_read_on', () => {
  for (const block of alerts.split('- alert: ').slice(1)) {
    const [, name] = /^(\w+)/.exec(block)!
    expect(block).toMatch(/severity: (critical|warning)/)
    expect(block).toMatch(/summary: \S/)
    expect(block).toMatch(/description: .*\$value/)
    expect(block).toContain(`runbook: grafana/runbooks.md#${name!.toLowerCase()}\n`)
  }
})

test('each_alert_has_its_paragraph_and_each_paragraph_its_alert', () => {
  const paragraphs = readPackageFile('grafana/runbooks.md').split('\n## ').slice(1)
  expect(paragraphs.map((text) => text.split('\n')[0])).toEqual(alertNames)
  for (const text of paragraphs) {
    expect(text).toMatch(/\*\*Means\.\*\* [\s\S]+\*\*Look at\.\*\* [\s\S]+\*\*Do\.\*\* /)
  }
})

test('without_prometheus_it_is_said_what_is_not_tested_and_how_to_get_it', async () => {
  const said = vi.spyOn(process.stderr, 'write').mockReturnValue(true)
  try {
    expect(await findPrometheus({ path: '/nowhere', isRoot: false })).toBeUndefined()
    expect(said.mock.calls.join()).toMatch(
      /^SKIPPED: no query .* is tested, because there is no prometheus .*; see http/,
    )
  } finally {
    said.mockRestore()
  }
})
