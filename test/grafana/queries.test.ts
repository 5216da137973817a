/**
 * Every query of the dashboards and every expression of the rules, answered by a real Prometheus that scrapes two ingests and two
 * sinks at work, and by the PostgreSQL that they fill. One that says nothing is a failure: in Grafana it would be an empty panel, as
 * an alert it would never fire.
 */
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PACKAGE_ROOT } from '../../shared/package-root.js'
import { until } from '../support/stores.js'
import {
  interpolateProm,
  interpolateSql,
  promQueries,
  type Query,
  readDashboard,
  selectorsOf,
  sqlQueries,
} from './dashboards.js'
import { findPrometheus, Prometheus, type Rule } from './prometheus.js'
import { FROM_NUMBER, INCOMPLETE, Traffic } from './traffic.js'

const WITHIN_MS = 25_000
const commands = await findPrometheus()

let traffic: Traffic
let prometheus: Prometheus | undefined
beforeAll(async () => {
  traffic = await Traffic.start()
  if (!commands) return
  const rules = join(PACKAGE_ROOT, 'grafana/prometheus/alerts.yml')
  const urls = (services: { url: string }[]) => services.map(({ url }) => url)
  const targets = { ingest: urls(traffic.ingests), sink: urls(traffic.sinks) }
  prometheus = await Prometheus.start(commands.prometheus, rules, targets)
})
afterAll(async () => {
  await prometheus?.stop()
  await traffic.end()
})

/** @returns the names of those that still say nothing after WITHIN_MS */
async function unanswered(queries: Query[], rowsOf: (text: string) => Promise<number>): Promise<string[]> {
  const deadline = Date.now() + WITHIN_MS
  let left = queries
  while (left.length > 0 && Date.now() < deadline) {
    const silent: Query[] = []
    for (const query of left) if ((await rowsOf(query.text)) === 0) silent.push(query)
    left = silent
    if (left.length > 0) await sleep(500)
  }
  return left.map(({ name, text }) => `${name}: ${text}`)
}

const samplesOf = async (expr: string) =>
  (await prometheus!.query(expr)).filter(({ value }) => !Number.isNaN(value)).length

/** What an alert compares with its threshold: all before the last comparison. */
function judgedBy({ name, query }: Rule): string {
  const [, value] = /^([\s\S]+?)\s+[<>]\s+[\d.e+]+$/.exec(query) ?? []
  if (value === undefined) throw new Error(`${name} is not a value and a threshold: ${query}`)
  return value
}

describe.skipIf(!commands)('Prometheus', () => {
  test('each_query_of_each_panel_is_answered', async () => {
    const queries = [...promQueries(readDashboard('pipeline')), ...promQueries(readDashboard('calls'))]
    expect(queries.length).toBeGreaterThan(60)
    const filled = queries.map(({ name, text }) => ({ name, text: interpolateProm(text) }))
    expect(await unanswered(filled, samplesOf)).toEqual([])
    const selectors = filled.flatMap(({ name, text }) => selectorsOf(text).map((each) => ({ name, text: each })))
    expect(selectors.length).toBeGreaterThanOrEqual(queries.length - 1) // calltape:no_progress_seconds is no series that is scraped
    expect(await unanswered(selectors, samplesOf)).toEqual([])
  })

  test('the_value_that_each_alert_judges_is_known_and_so_is_each_series_in_it', async () => {
    const rules = await until('the rules are evaluated', async () => {
      const all = await prometheus!.rules()
      return all.every(({ health }) => health !== 'unknown') && all
    })
    expect(rules.filter(({ health }) => health !== 'ok')).toEqual([])
    const values = rules.map((rule) => ({
      name: rule.name,
      text: rule.type === 'alerting' ? judgedBy(rule) : rule.query,
    }))
    expect(await unanswered(values, samplesOf)).toEqual([])
    const selectors = values.flatMap(({ name, text }) => selectorsOf(text).map((each) => ({ name, text: each })))
    expect(selectors.length).toBeGreaterThanOrEqual(rules.length)
    expect(await unanswered(selectors, samplesOf)).toEqual([])
  })

  test('alerts_fire_on_what_is_wrong_and_on_nothing_else', async () => {
    const firing = async () => {
      const samples = await prometheus!.query('ALERTS{alertstate="firing"}')
      return samples.map(({ metric }) => metric.alertname!).sort()
    }
    const expected = ['CalltapeIncompleteCalls', 'CalltapeQuarantineGrowing', 'CalltapeWebhooksDenied']
    await until('they fire', async () => (await firing()).length >= expected.length, WITHIN_MS)
    expect(await firing()).toEqual(expected)
  })
})

describe('PostgreSQL', () => {
  test('each_query_of_each_panel_and_variable_is_answered', async () => {
    const { pool } = traffic.database
    const [from, to] = [new Date(Date.now() - 3600_000), new Date(Date.now() + 3600_000)]
    const rowsOf = (variables: Record<string, string[]>) => async (sql: string) =>
      (await pool.query(interpolateSql(sql, variables, from, to))).rows.length
    const provider = ['twilio', 'exotel', '–']
    const queries = [...sqlQueries(readDashboard('calls')), ...sqlQueries(readDashboard('pipeline'))]
    expect(queries.length).toBeGreaterThanOrEqual(20)
    // All calls; one of them by its beginning; by its number; and a quote in a name is not the end of one.
    expect(await unanswered(queries, rowsOf({ provider, call: [INCOMPLETE], search: [''] }))).toEqual([])
    for (const search of ['incompl', FROM_NUMBER.slice(3), "' OR ''='"]) {
      const found = queries.filter(({ text }) => text.includes('${search'))
      const counts = await Promise.all(
        found.map(({ text }) => rowsOf({ provider, call: [''], search: [search] })(text)),
      )
      for (const count of counts) expect(count > 0).toBe(!search.includes("'"))
    }
  })

  test('a_transcript_is_read_in_call_order', async () => {
    const { text } = sqlQueries(readDashboard('calls')).find(({ name }) => name === 'Its transcript A')!
    const now = new Date()
    const { rows } = await traffic.database.pool.query(interpolateSql(text, { call: [INCOMPLETE] }, now, now))
    expect(rows).toMatchObject([{ text: "It's me." }, { text: 'Who?' }])
  })
})

// Last: it ends the traffic.
test.skipIf(!commands)('counters_of_several_processes_add_up_and_what_each_says_of_all_calls_is_the_same', async () => {
  await traffic.stop()
  const { pool } = traffic.database
  const value = async (expr: string) => (await prometheus!.query(expr))[0]?.value
  const turns = async () => Number((await pool.query('SELECT count(*) FROM call_transcript_turns')).rows[0].count)
  await until('the sum over both sinks is the number of rows', async () => {
    return (await value('sum(calltape_sink_turns_total)')) === (await turns())
  })
  expect(await value('count(calltape_sink_turns_total)')).toBe(2)
  expect(await value('count(calltape_ingest_events_accepted_total > 0)')).toBe(2)
  // Both sinks are asked at other moments: when nothing happens any more, they say the same.
  await until('nothing waits, says each sink', async () => {
    return (await value('sum(calltape_sink_lag_seconds)')) === 0 && (await value('sum(calltape_sink_open_calls)')) === 0
  })
  expect(await value('max(calltape_sink_redis_max_memory_bytes)')).toBe(512 * 1024 * 1024)
  const { rows } = await pool.query('SELECT count(*)::int AS entries FROM quarantined_events')
  expect(await value('sum(calltape_sink_quarantined_total)')).toBe(rows[0].entries)
})
