import fc from 'fast-check'
import { expect, test } from 'vitest'
import { splitMessage } from './split-message.js'

const split = (text: string) => splitMessage(Buffer.from(text))
const valuesOf = (text: string) => split(text)?.map(({ value }) => value)
const jsonOf = (text: string) => split(text)?.map(({ json }) => json)

test('each_event_comes_as_it_was_written', () => {
  const [first, second] = ['{"a": 1.50,"b":"é }, ç"}', '{"a":"\\u00e9","b":{}}']
  expect(jsonOf(`[${first},${second}]`)).toEqual([first, second])
  expect(jsonOf(`[${first}, ${second}]`), 'as Python writes it').toEqual([first, second])
  expect(valuesOf(`[${first},${second}]`)).toEqual([JSON.parse(first), JSON.parse(second)])
})

test.each([
  ['a separator in a string', '[{"text":"},{"},{"text":"b"}]'],
  ['one deeper down', '[{"a":[{"b":1},{"c":2}]},{"d":3}]'],
  ['both separators', '[{"a":1},{"b":2}, {"c":3}]'],
  ['other white space', '[ {"a":1} ,\n{"b":2} ]'],
  ['what is no object', '[{"a":1},2,{"b":3}]'],
  ['no event', '[]'],
  ['an object', '{"a":[{"b":1},{"c":2}]}'],
])('%s_is_left_to_whoever_parses_it_as_a_whole', (_what, message) => {
  JSON.parse(message)
  expect(split(message)).toBeUndefined()
})

test.each(['[', '[{"a":1}', '[{"a":1},{"b":]', '[{"a":1},]', '[{"a":1}]]', '[{"a":1}{"b":2}]', '', ']', '[}]'])(
  '%j_is_no_message',
  (message) => {
    expect(() => JSON.parse(message)).toThrow()
    expect(split(message)).toBeUndefined()
  },
)

const json = fc.json({ depthSize: 'small' })
const separator = fc.constantFrom(',', ', ', ' ,')
const tricky = fc.string({ unit: fc.constantFrom('}', ',', '{', ' ', '"', '[', ']', 'é', '😀', ':') })
const object = fc
  .oneof(
    fc.dictionary(tricky, fc.oneof(tricky, fc.integer())),
    fc.record({ a: fc.array(fc.dictionary(tricky, tricky)) }),
  )
  .map((value) => JSON.stringify(value))

test('what_it_gives_is_what_JSON_parse_gives_whatever_the_message_is', () => {
  const elements = fc.array(fc.oneof({ weight: 9, arbitrary: object }, json), { minLength: 1, maxLength: 5 })
  let splits = 0
  fc.assert(
    fc.property(elements, separator, fc.nat(200), fc.boolean(), (each, between, cut, isCut) => {
      const whole = `[${each.join(between)}]`
      const message = isCut ? [...whole].filter((_, at) => at !== cut).join('') : whole // whole characters: it is UTF-8
      const events = split(message)
      if (!events) return
      splits++
      expect(events.map(({ value }) => value)).toEqual(JSON.parse(message))
      expect(events.map((event) => JSON.parse(event.json))).toEqual(JSON.parse(message))
    }),
    { numRuns: 5000 },
  )
  expect(splits, 'it is not left to others all the time').toBeGreaterThan(500)
})
