/** A database that is another application's: a voice bot's, with its own call_sessions in public; calltape's tables lie beside them. */
import { createPool } from '../../shared/postgres.js'
import { migrate } from '../../shared/schema.js'
import { type Database, freshDatabase } from './stores.js'

export const SCHEMA = 'calltape'
const STATUSES = ['initiated', 'ringing', 'in_progress', 'completed', 'failed', 'no_answer', 'busy']
const OUTCOMES = ['qualified', 'not_interested', 'callback_requested', 'no_answer', 'disconnected', 'error']

/** How the bot's library names an enum's labels: by the values of its members, or by their names. */
export type LabelCase = 'lower' | 'upper'

const labels = (names: string[], as: LabelCase) =>
  names.map((name) => `'${as === 'upper' ? name.toUpperCase() : name}'`).join(', ')

/** The tables as the bot makes them, and one lead. */
export const botTables = (as: LabelCase = 'lower') => `
  CREATE TYPE callstatus AS ENUM (${labels(STATUSES, as)});
  CREATE TYPE calloutcome AS ENUM (${labels(OUTCOMES, as)});
  CREATE TABLE leads (id serial PRIMARY KEY, name varchar(255) NOT NULL);
  CREATE TABLE call_sessions (
    id serial PRIMARY KEY,
    call_sid varchar(100) NOT NULL,
    lead_id integer NOT NULL REFERENCES leads,
    status callstatus NOT NULL,
    outcome calloutcome,
    duration_seconds integer,
    full_transcript text,
    collected_data text,
    recording_url varchar(500),
    initiated_at timestamp,
    answered_at timestamp,
    ended_at timestamp
  );
  CREATE UNIQUE INDEX ix_call_sessions_call_sid ON call_sessions (call_sid);
  INSERT INTO leads (name) VALUES ('Asha')`

/**
 * @param tables what is in public
 * @returns a database whose pool finds calltape's tables without a schema's name, and the others with it
 */
export async function botDatabase(tables = botTables()): Promise<Database> {
  const database = await freshDatabase(false)
  await database.pool.query(tables)
  const config = { ...database.config, DATABASE_SCHEMA: SCHEMA }
  await migrate(config)
  const pool = createPool(config, 'test', 4)
  return {
    ...database,
    config,
    pool,
    async drop() {
      await pool.end()
      await database.drop()
    },
  }
}
