/** The program's exit codes: 1 is an answer, so nothing else may end with it. */
import { expect, test } from 'vitest'
import { calltape } from '../test/support/program.js'

/** A bug: what the configuration is read with does something else. */
const withBug = (body: string) => ({ NODE_OPTIONS: `--import=data:text/javascript,URL.canParse=()=>{${body}}` })

test.each([
  ['an_error_that_is_thrown', withBug(`throw(new(Error)('a_bug'))`)],
  ['an_error_that_nobody_waits_for', withBug(`setImmediate(()=>{throw(new(Error)('a_bug'))});return(true)`)],
  ['a_promise_that_nobody_waits_for', withBug(`void(Promise.reject(new(Error)('a_bug')));return(true)`)],
])('a_bug_exits_with_70_and_its_stack: %s', async (_, environment) => {
  const { code, err } = await calltape(['migrate'], { DATABASE_URL: 'postgres://127.0.0.1:1/x', ...environment })
  expect(err).toMatch(/Error: a_bug\n +at /)
  expect(code).toBe(70)
})

test('what_the_operator_has_to_mend_exits_with_2_and_one_line', async () => {
  const { code, err } = await calltape(['migrate'], { DATABASE_URL: 'mysql://127.0.0.1/x' })
  expect(err).toMatch(/^calltape: .*DATABASE_URL/s)
  expect(err).not.toMatch(/\n +at /)
  expect(code).toBe(2)
})
