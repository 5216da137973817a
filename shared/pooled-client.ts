/**
 * A connection to a pooler that lends it one of PostgreSQL's for each transaction (DATABASE_POOLER=transaction): the next one may
 * run on another. So nothing may be left there, or be expected there, between two:
 *  - settings are made within each transaction, in the message that begins it. As the pooler passes none on from the connection's
 *    start, and other clients may have left theirs, there is no statement without: what needs no transaction gets one, at the
 *    price of two round trips;
 *  - no statement is prepared by name;
 *  - SET is for the transaction at most. (node-pg-migrate sets the search_path.)
 * What else lasts (temporary tables, advisory locks, LISTEN, cursors) is for its owner to end with the transaction.
 */
import pg from 'pg'

type Statement = pg.QueryConfig & { query_timeout?: number }
type Callback = (error: Error | undefined, result?: pg.QueryResult) => void

export class PooledClient extends pg.Client {
  /** SQL that makes the settings, for one transaction. */
  protected readonly settings: string = ''

  constructor(config?: pg.ClientConfig) {
    super(config)
    this.query = this.pooledQuery.bind(this) as typeof this.query
  }

  /** Of a connection that has just been made, pg does not know it yet. */
  private get isInTransaction(): boolean {
    return ['T', 'E'].includes(this.getTransactionStatus() ?? '')
  }

  private pooledQuery(
    query: string | Statement | pg.Submittable,
    values?: unknown[] | Callback,
    callback?: Callback,
  ): unknown {
    if (typeof query === 'object' && 'submit' in query) {
      if (!this.isInTransaction) throw new Error('through a pooler, COPY wants a transaction around it')
      return super.query(query)
    }
    const { name: _, ...statement } = typeof query === 'string' ? { text: query, name: '' } : query
    const result = this.run(Array.isArray(values) ? { ...statement, values } : statement)
    const told = typeof values === 'function' ? values : callback
    if (!told) return result
    result.then((done) => told(undefined, done), told)
    return undefined
  }

  private async run(statement: Statement): Promise<pg.QueryResult> {
    const { text, query_timeout } = statement
    if (/^\s*BEGIN\b/i.test(text)) {
      return super.query({ ...statement, text: text.replace(/^\s*BEGIN[^;]*/i, `$&; ${this.settings}`) })
    }
    const local = { ...statement, text: text.replace(/^\s*SET (?!LOCAL|CONSTRAINTS|TRANSACTION)/i, 'SET LOCAL ') }
    if (this.isInTransaction) return super.query(local)
    // The pooler may have none to lend: whoever waits only for so long waits no longer for that, either.
    await super.query({ text: `BEGIN; ${this.settings}`, query_timeout } as Statement)
    try {
      const result = await super.query(local)
      await super.query('COMMIT')
      return result
    } catch (error) {
      // Anything but PostgreSQL's answer leaves a connection on which nothing more is answered: its owner gives it up.
      if (error instanceof pg.DatabaseError) await super.query('ROLLBACK')
      throw error
    }
  }
}

/** @param settings of PostgreSQL, for each transaction @returns what pg.Pool makes its connections of */
export function pooledClient(settings: Record<string, string>): typeof PooledClient {
  const sql = Object.entries(settings).map(([name, value]) => `SET LOCAL ${name} = ${pg.escapeLiteral(value)}`)
  return class extends PooledClient {
    protected override readonly settings = sql.join('; ')
  }
}
