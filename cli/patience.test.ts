import { setTimeout as sleep } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { OperatorError } from '../shared/config.js'
import { Patience } from './patience.js'

const { signal } = new AbortController()
const refused = () => Object.assign(new Error('connect ECONNREFUSED'), { code: 'ECONNREFUSED' })

/** Fails so often, and then succeeds. */
function failing(times: number, error: Error) {
  let calls = 0
  return { work: async () => (++calls > times ? calls : Promise.reject(error)), calls: () => calls }
}

test('what_is_away_is_tried_again_until_it_is_back', async () => {
  const said: string[] = []
  const patience = new Patience(60_000, (line) => said.push(line), signal)
  expect(await patience.insist('PostgreSQL', failing(2, refused()).work)).toBe(3)
  expect(said).toEqual(['PostgreSQL is away: connect ECONNREFUSED; trying again', 'PostgreSQL is back'])
})

test('a_fetch_that_failed_is_tried_again_and_its_cause_is_said', async () => {
  const said: string[] = []
  const patience = new Patience(60_000, (line) => said.push(line), signal)
  const { work } = failing(1, new TypeError('fetch failed', { cause: refused() }))
  expect(await patience.insist('ingest', work)).toBe(2)
  expect(said[0]).toContain('ECONNREFUSED')
})

test.each([
  ['a bug', new TypeError('x is not a function')],
  ['what an operator has to mend', new OperatorError('INGEST_TOKENS: the server answered 401')],
])('%s_is_not_tried_again', async (_, error) => {
  const { work, calls } = failing(1, error)
  await expect(new Patience(60_000, () => {}, signal).insist('ingest', work)).rejects.toBe(error)
  expect(calls()).toBe(1)
})

test('without_patience_the_first_error_comes_as_it_is', async () => {
  const error = refused()
  await expect(new Patience(0, () => {}, signal).insist('ingest', failing(1, error).work)).rejects.toBe(error)
})

test('what_stays_away_for_too_long_is_given_up_by_name', async () => {
  const waiting = new Patience(300, () => {}, signal).insist('ingest', failing(1e6, refused()).work)
  await expect(waiting).rejects.toThrow(new OperatorError('ingest is away: connect ECONNREFUSED'))
})

test('who_wants_to_stop_is_not_kept_waiting', async () => {
  const stopping = new AbortController()
  const waiting = new Patience(60_000, () => {}, stopping.signal).insist('ingest', failing(1e6, refused()).work)
  const stopped = expect(waiting).rejects.toThrow()
  await sleep(10)
  stopping.abort(new Error('interrupted'))
  await stopped
})
