/** grafana/dashboards as Grafana reads them: what matters of their JSON, and their queries with Grafana's variables filled in. */
import { z } from 'zod'
import { readPackageFile } from '../../shared/package-root.js'

export const PROMETHEUS = { type: 'prometheus', uid: 'calltape-prometheus' }
export const POSTGRES = { type: 'grafana-postgresql-datasource', uid: 'calltape-postgres' }

const prometheus = z.strictObject({ type: z.literal(PROMETHEUS.type), uid: z.literal(PROMETHEUS.uid) })
const postgres = z.strictObject({ type: z.literal(POSTGRES.type), uid: z.literal(POSTGRES.uid) })

const promTarget = z.object({
  refId: z.string().regex(/^[A-Z]$/),
  datasource: prometheus,
  expr: z.string().min(1),
  legendFormat: z.string().min(1),
  instant: z.boolean(),
  range: z.boolean(),
})
const sqlTarget = z.object({
  refId: z.string().regex(/^[A-Z]$/),
  datasource: postgres,
  editorMode: z.literal('code'),
  format: z.enum(['table', 'time_series']),
  rawQuery: z.literal(true),
  rawSql: z.string().min(1),
})
const gridPos = z.strictObject({
  x: z.int().min(0).max(23),
  y: z.int().min(0),
  w: z.int().min(1).max(24),
  h: z.int().min(1),
})
const row = z.object({
  id: z.int().positive(),
  type: z.literal('row'),
  title: z.string().min(1),
  collapsed: z.literal(false),
  gridPos,
  panels: z.tuple([]),
})
const panel = z.object({
  id: z.int().positive(),
  type: z.enum(['stat', 'timeseries', 'table', 'bargauge']),
  title: z.string().min(1),
  description: z.string().min(20),
  gridPos,
  datasource: z.union([prometheus, postgres]),
  targets: z.array(z.union([promTarget, sqlTarget])).min(1),
  fieldConfig: z.object({ defaults: z.object({ unit: z.string().min(1) }), overrides: z.array(z.unknown()) }),
  options: z.record(z.string(), z.unknown()),
})
const variable = z.discriminatedUnion('type', [
  z.object({ type: z.literal('textbox'), name: z.string(), label: z.string() }),
  z.object({
    type: z.literal('query'),
    name: z.string(),
    label: z.string(),
    datasource: postgres,
    query: z.string(),
    definition: z.string(),
    refresh: z.literal(2), // with every change of the time range, which is in the query
  }),
])
const dashboard = z.object({
  uid: z.string().regex(/^[a-z-]{1,40}$/),
  title: z.string().min(1),
  schemaVersion: z.literal(41),
  time: z.object({ from: z.string(), to: z.string() }),
  templating: z.object({ list: z.array(variable) }),
  panels: z.array(z.union([row, panel])).min(1),
})

export type Dashboard = z.infer<typeof dashboard>
export type Panel = z.infer<typeof panel>

export const DASHBOARDS = ['pipeline', 'calls'] as const

/** @throws ZodError for what Grafana would not show as it is meant */
export function readDashboard(name: (typeof DASHBOARDS)[number]): Dashboard {
  return dashboard.parse(JSON.parse(readPackageFile(`grafana/dashboards/${name}.json`)))
}

/** All but the titles of rows. */
export const panelsOf = ({ panels }: Dashboard) => panels.filter((each): each is Panel => each.type !== 'row')

export interface Query {
  /** Panel and refId. */
  name: string
  text: string
}

export const promQueries = (given: Dashboard): Query[] =>
  panelsOf(given).flatMap(({ title, targets }) =>
    targets.flatMap((t) => ('expr' in t ? [{ name: `${title} ${t.refId}`, text: t.expr }] : [])),
  )

export const sqlQueries = (given: Dashboard): Query[] => [
  ...panelsOf(given).flatMap(({ title, targets }) =>
    targets.flatMap((t) => ('rawSql' in t ? [{ name: `${title} ${t.refId}`, text: t.rawSql }] : [])),
  ),
  ...given.templating.list.flatMap((v) => (v.type === 'query' ? [{ name: `variable ${v.name}`, text: v.query }] : [])),
]

const RATE_INTERVAL = '10s'
const RANGE = '1m'
const INTERVAL = '1m'

/** @throws for a variable that Grafana does not know here */
export function interpolateProm(expr: string): string {
  const done = expr.replaceAll('$__rate_interval', RATE_INTERVAL).replaceAll('$__range', RANGE)
  if (done.includes('$')) throw new Error(`a variable that nobody fills in: ${expr}`)
  return done
}

const sqlString = (value: string) => `'${value.replaceAll("'", "''")}'`

/**
 * First the variables, then the macros, as Grafana does it; macros with its own regular expression, which takes no parenthesis in
 * an argument.
 *
 * @param variables the values chosen of each, written as `${name:sqlstring}`
 * @throws for a variable or a macro that there is not
 */
export function interpolateSql(sql: string, variables: Record<string, string[]>, from: Date, to: Date): string {
  const filled = sql.replaceAll('$__interval', INTERVAL).replaceAll(/\$\{(\w+):sqlstring\}/g, (given, name: string) => {
    const values = variables[name]
    if (!values) throw new Error(`${given}: there is no such variable`)
    return values.map(sqlString).join(',')
  })
  const [start, end] = [sqlString(from.toISOString()), sqlString(to.toISOString())]
  const done = filled.replaceAll(/\$([_a-zA-Z0-9]+)\(([^)]*)\)/g, (given, name: string, list: string) => {
    const args = list.split(',').map((arg) => arg.trim())
    if (name === '__timeFilter') return `${args[0]} BETWEEN ${start} AND ${end}`
    if (name === '__timeGroup' && args[1] === `'${INTERVAL}'`) return `floor(extract(epoch from ${args[0]})/60)*60`
    throw new Error(`${given}: there is no such macro, or not with this argument`)
  })
  if (done.includes('$__') || done.includes('${')) throw new Error(`something is left to be filled in: ${done}`)
  return done
}

/** The series that an expression is about, each a selector of its own. */
export function selectorsOf(expr: string): string[] {
  const names = String.raw`\b(?:calltape[_:]\w+|up|process_\w+|nodejs_\w+|ALERTS)\b`
  return expr.match(new RegExp(String.raw`${names}(?:\{[^}]*\})?|\{__name__[^}]*\}`, 'g')) ?? []
}
