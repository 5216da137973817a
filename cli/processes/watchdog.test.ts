import { expect, test } from 'vitest'
import { hangs } from './watchdog.js'

const patience = { everyMs: 1, questions: 3 }
const silence = () => Promise.reject(new Error('no answer'))

/** Answers where `pattern` has a dot; is watched to its end. */
function asked(pattern: string) {
  const answers = [...pattern]
  let questions = 0
  const ask = () => (answers[questions++] === '.' ? Promise.resolve() : silence())
  return hangs(ask, () => questions < answers.length, patience).then((hanging) => ({ hanging, questions }))
}

test('so_many_questions_in_a_row_without_an_answer_are_a_hang', async () => {
  expect(await asked('..xxx.')).toEqual({ hanging: true, questions: 5 })
})

test('one_answer_makes_good_what_was_not_answered_before', async () => {
  expect(await asked('xx.xx.xx.')).toEqual({ hanging: false, questions: 9 })
})

test('what_ends_or_is_to_stop_meanwhile_does_not_hang', async () => {
  expect(await asked('.xxx')).toEqual({ hanging: false, questions: 4 })
  expect(await asked('')).toEqual({ hanging: false, questions: 0 })
})

test('what_died_before_its_end_is_known_does_not_hang', async () => {
  let isConnected = true
  setImmediate(() => {
    isConnected = false
  })
  expect(await hangs(silence, () => isConnected, patience)).toBe(false)
})
