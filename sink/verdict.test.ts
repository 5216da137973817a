import pg from 'pg'
import { expect, test } from 'vitest'
import { hintOn, verdictOn, WriteTimeout } from './verdict.js'

function postgresError(code: string): pg.DatabaseError {
  const error = new pg.DatabaseError(code, 0, 'error')
  error.code = code
  return error
}

test.each([
  ['08006', 'retry'], // connection failure
  ['25006', 'retry'], // read-only: a failover
  ['40001', 'retry'], // serialization failure
  ['40P01', 'retry'], // deadlock
  ['53100', 'retry'], // disk full
  ['53300', 'retry'], // too many connections
  ['55P03', 'retry'], // lock not available
  ['57P01', 'retry'], // admin shutdown
  ['57P03', 'retry'], // cannot connect now
  ['58030', 'retry'], // I/O error
  ['28P01', 'stop'], // invalid password
  ['3D000', 'stop'], // no such database
  ['42P01', 'stop'], // no such table
  ['42501', 'stop'], // no privilege
  ['XX001', 'stop'], // data corrupted
  ['22P05', 'quarantine'], // untranslatable character
  ['23514', 'quarantine'], // check violation
  ['54000', 'quarantine'], // program limit exceeded
  ['P0001', 'quarantine'], // raise exception
  ['57014', 'unclear'], // statement timeout
  ['53200', 'unclear'], // out of memory
  ['XX000', 'unclear'], // internal error
  ['38000', 'unclear'], // external routine exception
])('SQLSTATE_%s_means_%s', (code, verdict) => {
  expect(verdictOn(postgresError(code))).toBe(verdict)
})

test('errors_without_a_SQLSTATE_are_the_networks_unless_they_are_of_encoding_or_of_time', () => {
  expect(verdictOn(new Error('Connection terminated unexpectedly'))).toBe('retry')
  expect(verdictOn(Object.assign(new Error('connect ECONNREFUSED'), { code: 'ECONNREFUSED' }))).toBe('retry')
  expect(verdictOn(new RangeError('Invalid string length'))).toBe('quarantine')
  expect(verdictOn(new RangeError('Maximum call stack size exceeded'))).toBe('unclear')
  expect(verdictOn(new TypeError('undefined is not a function'))).toBe('unclear')
  expect(verdictOn(new WriteTimeout('late'))).toBe('unclear')
})

test('an_operator_is_told_what_to_do_where_only_he_can_do_it', () => {
  expect(hintOn(postgresError('42P01'))).toContain('calltape migrate')
  expect(hintOn(postgresError('42501'))).toContain('privilege')
  expect(hintOn(postgresError('28P01'))).toContain('DATABASE_URL')
  expect(hintOn(postgresError('40001'))).toBeUndefined()
  expect(hintOn(new Error('Connection terminated unexpectedly'))).toBeUndefined()
})
