/** The dashboards as Grafana takes them. There is no Grafana here: what would make it show something else is looked for in the files. */
import { describe, expect, test } from 'vitest'
import { createIngestMetrics, createSinkMetrics } from '../../shared/metrics.js'
import { readPackageFile } from '../../shared/package-root.js'
import { DASHBOARDS, type Panel, POSTGRES, PROMETHEUS, panelsOf, promQueries, readDashboard } from './dashboards.js'

const boards = DASHBOARDS.map(readDashboard)
const shown = boards.flatMap((board) => promQueries(board).map(({ text }) => text))
const expressions = [...shown, readPackageFile('grafana/prometheus/alerts.yml')]

const overlap = (a: Panel['gridPos'], b: Panel['gridPos']) =>
  a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h

describe.each(boards)('$title', (board) => {
  test('panels_have_ids_of_their_own_and_do_not_overlap', () => {
    expect(new Set(board.panels.map(({ id }) => id)).size).toBe(board.panels.length)
    for (const [i, a] of board.panels.entries()) {
      expect(a.gridPos.x + a.gridPos.w).toBeLessThanOrEqual(24)
      for (const b of board.panels.slice(i + 1)) {
        expect(overlap(a.gridPos, b.gridPos), `${a.title} overlaps ${b.title}`).toBe(false)
      }
    }
  })

  test('panels_ask_the_data_source_that_they_name', () => {
    for (const panel of panelsOf(board)) {
      for (const target of panel.targets) expect(target.datasource).toEqual(panel.datasource)
      expect(new Set(panel.targets.map(({ refId }) => refId)).size).toBe(panel.targets.length)
    }
  })

  test('each_panel_has_its_entry_on_how_to_read_it', () => {
    const [, part] = readPackageFile('grafana/panels.md').split(`\n# ${board.title}\n`)
    const entries = part!.split('\n# ')[0]!.matchAll(/^- \*\*(.+?)\*\*: .{20}/gm)
    expect([...entries].map(([, title]) => title)).toEqual(panelsOf(board).map(({ title }) => title))
  })
})

test('dashboards_have_uids_of_their_own_and_link_to_each_other', () => {
  const uids = boards.map(({ uid }) => uid)
  expect(new Set(uids).size).toBe(uids.length)
  const linked = DASHBOARDS.flatMap((name) => {
    const links = readPackageFile(`grafana/dashboards/${name}.json`).matchAll(/"url": "\/d\/([\w-]+)/g)
    return [...links].map(([, uid]) => uid!)
  })
  expect([...new Set(linked)].sort()).toEqual([...uids].sort())
})

test('the_data_sources_of_the_dashboards_are_provisioned', () => {
  const file = readPackageFile('grafana/provisioning/datasources/calltape.yml')
  for (const { type, uid } of [PROMETHEUS, POSTGRES]) expect(file).toContain(`uid: ${uid}\n    type: ${type}\n`)
})

const names = async () =>
  (await Promise.all([createIngestMetrics(), createSinkMetrics()].map(({ registry }) => registry.getMetricsAsJSON())))
    .flat()
    .map(({ name }) => name)
const metricsIn = (texts: string[]) => [
  ...new Set(texts.flatMap((text) => text.match(/\b(calltape_(?:ingest|sink)|nodejs|process)_\w+\b/g) ?? [])),
]

test('each_metric_that_is_asked_for_exists', async () => {
  const known = new Set((await names()).flatMap((name) => [name, `${name}_bucket`, `${name}_sum`, `${name}_count`]))
  expect(metricsIn(expressions).filter((name) => !known.has(name))).toEqual([])
})

test('each_metric_of_calltape_is_on_a_dashboard', async () => {
  const onPanels = new Set(metricsIn(shown).map((name) => name.replace(/_(bucket|sum|count)$/, '')))
  const byName = ['calltape_ingest_redis_up', 'calltape_sink_redis_up'] // {__name__=~"calltape_(ingest|sink)_redis_up"}
  const own = (await names()).filter((name) => name.startsWith('calltape_') && !byName.includes(name))
  expect(own.filter((name) => !onPanels.has(name))).toEqual([])
})

test('what_every_sink_says_of_all_calls_is_never_added_up', async () => {
  const shared = await Promise.all(Object.values(createSinkMetrics().shared).map((gauge) => gauge.get()))
  for (const { name } of shared) {
    const uses = expressions.flatMap((text) => text.match(new RegExp(`.{0,60}\\b${name}\\b`, 'g')) ?? [])
    for (const use of uses) {
      expect(use).toMatch(/max(?: by \(\w+\))? ?\((?:quantile_over_time\(0\.5, )?calltape_sink_\w+$/)
    }
  }
})
