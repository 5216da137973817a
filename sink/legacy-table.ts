/**
 * The table of LEGACY_CALL_SESSIONS, another application's: which of its columns can be filled, and the statement that does.
 *
 * Nothing is known of it but that it has a call_sid. So its columns are looked at, and what a column cannot hold is left as it
 * is: a value without a label in its enum, a text longer than it takes.
 */
import { createHash } from 'node:crypto'
import { type Config, type DatabaseConfig, OperatorError } from '../shared/config.js'
import { END_STATUSES, OWN_SOURCE } from '../shared/events.js'
import { escapeIdentifier, escapeLiteral, type Pool } from '../shared/postgres.js'
import { ownNames } from '../shared/schema.js'
import { verdictOn } from './verdict.js'

export type TableName = NonNullable<Config['LEGACY_CALL_SESSIONS']>

export interface LegacyTable {
  /** Quoted, with its schema. */
  name: string
  /** $1 text[]: call_sids, sorted. Fills the rows of those that are finalized, where that changes anything. */
  update: Statement
  /** $1 text[]: call_sids. Locks the rows that nobody else has locked; gives all there are, and which of them these are. */
  lock: Statement
  /** Columns that are filled. */
  fills: string[]
  /** Columns that have the right name, and are left alone all the same: with their types. */
  leaves: string[]
  /** By call_sid; if not, all of it is read for each batch in which a call ends. */
  isIndexed: boolean
}

interface Statement {
  /** As a prepared one. It tells what it does: a connection may have prepared it for the table as it was before. */
  name: string
  text: string
}

/** What calltape has for each column; an empty transcript, an empty object and an empty text are nothing, too. */
const VALUES: Record<string, { sql: string; of: 'json' | 'text' | 'number' | 'time' }> = {
  full_transcript: { sql: `nullif(s.full_transcript, '[]')`, of: 'json' },
  collected_data: { sql: `nullif(s.collected_data, '{}')`, of: 'json' },
  outcome: { sql: `nullif(s.outcome, '')`, of: 'text' },
  status: { sql: `nullif(s.status, '')`, of: 'text' },
  duration_seconds: { sql: 's.duration_seconds', of: 'number' },
  recording_url: { sql: `nullif(s.recording_url, '')`, of: 'text' },
  answered_at: { sql: 's.answered_at', of: 'time' },
  ended_at: { sql: 's.ended_at', of: 'time' },
}
/** Where an enum has no label for a status: the first of these that it has says it best. */
const STANDS_FOR = ['canceled', 'cancelled', 'no_answer']
const MOST_SMALLINT = 32_767
/** What `call_outcome` can derive. It is a guess, and does not replace what somebody else has judged. */
const DERIVED_OUTCOMES = `('no_answer', 'disconnected', 'error')`
/** As other applications may write them. */
const END_STATUSES_BUT_COMPLETED = `('failed', 'no_answer', 'busy', 'canceled', 'cancelled')`

interface Column {
  name: string
  /** For people. */
  type: string
  /** The type itself or, of a domain, what it is made of; without length or precision. */
  base: string
  /** What `base` is called whatever the search_path, with length or precision. */
  cast: string
  /** pg_type's: S is text of any kind. */
  category: string
  /** Characters; null: any number. */
  length: number | null
  /** Of an enum. */
  labels: string[] | null
  generated: boolean
  mayRead: boolean
  mayWrite: boolean
}

interface Found {
  oid: number
  isTable: boolean
  maySee: boolean
  isOwn: boolean
  /** A calltape has migrated its schema, this one or another. */
  isBesideMigrations: boolean
  user: string
  isIndexed: boolean
}

const TABLE = `
  SELECT c.oid, pg_relation_is_updatable(c.oid, true) & 4 <> 0 AS "isTable", has_schema_privilege(n.oid, 'USAGE') AS "maySee",
    c.oid IS NOT DISTINCT FROM to_regclass($3) AS "isOwn", quote_ident(current_user) AS "user",
    EXISTS (SELECT FROM pg_class WHERE relnamespace = n.oid AND relname = 'calltape_migrations') AS "isBesideMigrations",
    EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
            WHERE i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NULL AND a.attname = 'call_sid') AS "isIndexed"
  FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid WHERE n.nspname = $1 AND c.relname = $2`

const COLUMNS = `
  SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type, format_type(b.oid, -1) AS base, b.typcategory AS category,
    CASE WHEN b.typnamespace = 'pg_catalog'::regnamespace THEN format_type(b.oid, greatest(a.atttypmod, t.typtypmod))
      ELSE format('%I.%I', (SELECT nspname FROM pg_namespace WHERE oid = b.typnamespace), b.typname) END AS "cast",
    CASE WHEN b.oid IN ('varchar'::regtype, 'bpchar'::regtype) AND greatest(a.atttypmod, t.typtypmod) > 4
      THEN greatest(a.atttypmod, t.typtypmod) - 4 END AS length,
    (SELECT array_agg(enumlabel::text ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = b.oid) AS labels,
    a.attgenerated <> '' OR a.attidentity = 'a' AS generated,
    has_column_privilege(a.attrelid, a.attnum, 'SELECT') AS "mayRead",
    has_column_privilege(a.attrelid, a.attnum, 'UPDATE') AS "mayWrite"
  FROM pg_attribute a
  JOIN pg_type t ON t.oid = a.atttypid
  JOIN pg_type b ON b.oid = CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END
  WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.attname = ANY($2)`

/**
 * @param client a pool or a connection, of `createPool` with `database`
 * @throws OperatorError that names LEGACY_CALL_SESSIONS when there is no such table, or it cannot be filled
 */
export async function lookAtLegacyTable(
  client: Pick<Pool, 'query'>,
  { schema, table }: TableName,
  { DATABASE_SCHEMA }: DatabaseConfig,
): Promise<LegacyTable> {
  const name = `${escapeIdentifier(schema)}.${escapeIdentifier(table)}`
  const refuse = (why: string) => new OperatorError(`LEGACY_CALL_SESSIONS: ${name} ${why}`)
  const ownSchema = escapeIdentifier(DATABASE_SCHEMA)
  const [found] = (await client.query<Found>(TABLE, [schema, table, `${ownSchema}.call_sessions`])).rows
  if (!found?.isTable) throw refuse('does not exist, or cannot be updated')
  if (found.isOwn || (schema === DATABASE_SCHEMA && ownNames().includes(table))) {
    throw refuse("is calltape's own: it wants another application's table")
  }
  if (found.isBesideMigrations && ownNames().includes(table)) {
    throw refuse("is another calltape's, its calltape_migrations is beside it: it wants another application's table")
  }
  const grant = (privileges: string) => `GRANT ${privileges} TO ${found.user}`
  if (!found.maySee) throw refuse(`is out of reach: ${grant(`USAGE ON SCHEMA ${escapeIdentifier(schema)}`)}`)
  const { rows } = await client.query<Column>(COLUMNS, [found.oid, ['call_sid', ...Object.keys(VALUES)]])
  const key = rows.find((column) => column.name === 'call_sid')
  if (key?.category !== 'S')
    throw refuse(key ? `has a call_sid that is no text: ${key.type}` : 'has no column call_sid')
  const columns = rows.filter((column) => column !== key)
  const filled = columns.flatMap((column) => {
    const value = column.generated ? undefined : valueFor(column)
    return value === undefined ? [] : [{ ...column, value }]
  })
  const fills = filled.map((column) => column.name)
  if (fills.length === 0) throw refuse(`has no column that can be filled: it wants ${Object.keys(VALUES).join(', ')}`)
  const closed = filled.filter((column) => !column.mayRead || !column.mayWrite).map((column) => column.name)
  if (!key.mayRead || closed.length > 0) {
    const names = fills.join(', ')
    throw refuse(`may not be filled: ${grant(`SELECT (call_sid, ${names}), UPDATE (${names}) ON ${name}`)}`)
  }
  const leaves = columns
    .filter((column) => !fills.includes(column.name))
    .map((column) => `${column.name} ${column.type}`)
  const update = named(updateStatement(name, ownSchema, key, filled))
  await client.query(`EXPLAIN ${update.text}`, [[]]).catch((error: Error) => {
    if (verdictOn(error) !== 'stop') throw error
    throw refuse(`cannot be filled: ${error.message}`)
  })
  return { name, update, lock: named(lockStatement(name, key)), fills, leaves, isIndexed: found.isIndexed }
}

/** @returns SQL for what the column is to hold, null where there is nothing, or it cannot hold it; undefined: none of its type */
function valueFor({ name, base, cast, category, length, labels }: Column): string | undefined {
  const { sql, of } = VALUES[name]!
  if (of === 'time') {
    if (base === 'timestamp with time zone') return `${sql}::${cast}`
    return base === 'timestamp without time zone' ? `(${sql} AT TIME ZONE 'UTC')::${cast}` : undefined
  }
  if (of === 'number') {
    if (base === 'smallint') return `CASE WHEN ${sql} <= ${MOST_SMALLINT} THEN ${sql}::${cast} END`
    return category === 'N' ? `${sql}::${cast}` : undefined
  }
  if (of === 'json' && (base === 'json' || base === 'jsonb')) return `(${sql})::${cast}`
  if (of === 'text' && labels !== null) return `(${labelFor(sql, labels)})::${cast}`
  if (category !== 'S') return undefined
  // A cast to varchar(n) would cut it off, and JSON that is cut off is none.
  return length === null
    ? `(${sql})::text`
    : `CASE WHEN char_length((${sql})::text) <= ${length} THEN (${sql})::text END`
}

/** NO_ANSWER, no-answer and no_answer are the same. */
const plainLabel = (label: string) => label.replace(/[A-Z]/g, (c) => c.toLowerCase()).replace(/[- ]/g, '_')

function labelFor(sql: string, labels: string[]): string {
  const byPlain = new Map(labels.map((label) => [plainLabel(label), label]))
  for (const label of labels) if (label === plainLabel(label)) byPlain.set(label, label) // of two, the one as it is
  const standIn = STANDS_FOR.find((each) => byPlain.has(each))
  if (standIn !== undefined) byPlain.set('canceled', byPlain.get(standIn)!)
  const map = escapeLiteral(JSON.stringify(Object.fromEntries(byPlain)))
  return `${map}::jsonb ->> translate(lower(${sql} COLLATE "C"), '- ', '__')`
}

function named(text: string): Statement {
  return { name: `legacy-${createHash('sha1').update(text).digest('base64')}`, text }
}

/** By an index on call_sid if there is one: a comparison as something else than it is would not use it. */
function isSame({ base }: Column, callSid: string): string {
  const isAsText = base === 'text' || base === 'character varying'
  return `${isAsText ? 'l.call_sid' : 'l.call_sid::text'} = ${callSid}`
}

function lockStatement(name: string, key: Column): string {
  return `
    WITH free AS MATERIALIZED (
      SELECT l.call_sid::text FROM ${name} AS l WHERE ${isSame(key, 'ANY($1::text[])')} FOR NO KEY UPDATE SKIP LOCKED
    )
    SELECT DISTINCT k.call_sid, k.call_sid IN (SELECT call_sid FROM free) AS free
    FROM unnest($1::text[]) AS k(call_sid) JOIN ${name} AS l ON ${isSame(key, 'k.call_sid')}`
}

const plainIn = (label: string, list: string) => `translate(lower(${label}::text COLLATE "C"), '- ', '__') IN ${list}`
const isDerived = (outcome: string) => plainIn(outcome, DERIVED_OUTCOMES)
const MAY_REPLACE_OUTCOME = `(l.outcome IS NULL OR ${isDerived('l.outcome')} OR NOT ${isDerived('n.outcome')})`

/**
 * By column, what must hold for a value to be replaced. Where nobody has said its status, a call that is over is presumed to be
 * completed; so are its end and its duration derived where nobody has said them. The other application may know better.
 */
function guardsOf(ownSchema: string): Record<string, string> {
  // EXISTS might be planned as a hash of all events there are, and that plan be kept.
  const isSaid = (event: string) =>
    `(SELECT bool_or(${event}) FROM ${ownSchema}.call_events e WHERE e.call_sid = n.call_sid)`
  const isEnd = `e.type = 'call.ended' AND e.event->>'source' IS DISTINCT FROM '${OWN_SOURCE}'
        OR e.event->>'status' IN (${[...END_STATUSES].map(escapeLiteral).join(', ')})`
  return {
    outcome: MAY_REPLACE_OUTCOME,
    status: `(${plainIn('l.status', END_STATUSES_BUT_COMPLETED)} IS NOT TRUE OR NOT ${plainIn('n.status', `('completed')`)}
      OR ${isSaid(`e.event->>'status' = 'completed'`)})`,
    duration_seconds: `(l.duration_seconds IS NULL OR ${isSaid(`e.event ? 'duration_seconds'`)})`,
    ended_at: `(l.ended_at IS NULL OR ${isSaid(isEnd)})`,
  }
}

function updateStatement(
  name: string,
  ownSchema: string,
  key: Column,
  columns: (Column & { value: string })[],
): string {
  const text = ({ category, labels, base }: Column) =>
    category === 'S' || labels || base.startsWith('json') ? '::text' : ''
  const guards = guardsOf(ownSchema)
  const changes = columns.map((column) => {
    const id = escapeIdentifier(column.name)
    const differs = `n.${id} IS NOT NULL AND n.${id}${text(column)} IS DISTINCT FROM l.${id}${text(column)}`
    const mayReplace = guards[column.name]
    return { id, sql: mayReplace === undefined ? `(${differs})` : `(${differs} AND ${mayReplace})` }
  })
  // Materialized, so that the transcript is made text once, not wherever it is looked at. Joined by the parameter's call_sid:
  // that of calltape's own table is compared byte by byte, which is not how the other table's index is ordered.
  return `
    WITH n AS MATERIALIZED (
      SELECT k.call_sid, ${columns.map(({ name, value }) => `${value} AS ${escapeIdentifier(name)}`).join(',\n        ')}
      FROM unnest($1::text[]) AS k(call_sid) JOIN ${ownSchema}.call_sessions s ON s.call_sid = k.call_sid
      WHERE s.finalized_at IS NOT NULL ORDER BY k.call_sid
    )
    UPDATE ${name} AS l SET ${changes.map(({ id, sql }) => `${id} = CASE WHEN ${sql} THEN n.${id} ELSE l.${id} END`).join(', ')}
    FROM n WHERE ${isSame(key, 'n.call_sid')} AND (${changes.map(({ sql }) => sql).join(' OR ')})`
}
