/** Every fixture: sent as its provider sends it, through real ingest, Redis and sink, into the right rows. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type Fixture, fixturesOf, playStream, providersWithFixtures, sendRequest } from './support/fixtures.js'
import { startTestStack, type TestStack, until } from './support/stores.js'

let stack: TestStack
beforeAll(async () => {
  stack = await startTestStack({ DISCONNECT_GRACE: '0' })
})
afterAll(async () => await stack.end())

describe.each(providersWithFixtures())('%s', (provider) => {
  test.each(fixturesOf(provider))('$name ends in the right rows', async (fixture) => {
    for (const part of fixture.send) {
      if ('stream' in part) {
        await playStream(stack.ingest.url, part)
        continue
      }
      const response = await sendRequest(stack.ingest.url, part)
      const text = await response.text()
      const { status = 200, contentType, body } = part.answer ?? {}
      expect(response.status, text).toBe(status)
      if (contentType) expect(response.headers.get('content-type')).toContain(contentType)
      if (body !== undefined) expect(typeof body === 'string' ? text : JSON.parse(text)).toEqual(body)
    }
    const { session, turns, events } = await rowsOf(fixture)
    expect(session).toMatchObject(fixture.session)
    expect(turns).toMatchObject(fixture.turns)
    expect(turns).toHaveLength(fixture.turns.length)
    for (const event of fixture.events ?? []) expect(events).toContainEqual(expect.objectContaining(event))
    if (!fixture.live) {
      const said = turns.map(({ speaker, text }) => ({ speaker, text }))
      expect(session.full_transcript).toMatchObject(said)
    }
  })
})

interface Rows {
  session: Record<string, unknown>
  turns: Record<string, unknown>[]
  events: unknown[]
}

/** Once Redis has nothing of the call that is not committed; and, unless it is live, the call is finalized. */
async function rowsOf({ call_sid: sid, live = false }: Fixture): Promise<Rows> {
  const { pool } = stack.database
  return await until(`${sid} is committed`, async () => {
    const response = await fetch(`${stack.ingest.url}/v1/calls/${sid}`)
    if (((await response.json()) as { behind?: number }).behind !== 0) return undefined
    const sessions = await pool.query('SELECT * FROM call_sessions WHERE call_sid = $1', [sid])
    const [session] = sessions.rows
    if (!session || (session.finalized_at === null) !== live) return undefined
    const turns = await pool.query(
      'SELECT * FROM call_transcript_turns WHERE call_sid = $1 ORDER BY seq, spoken_at, split_part(stream_id, $2, 1)::numeric, split_part(stream_id, $2, 2)::numeric',
      [sid, '-'],
    )
    const events = await pool.query('SELECT event FROM call_events WHERE call_sid = $1', [sid])
    const rows = { session, turns: turns.rows, events: events.rows.map(({ event }) => event) }
    return JSON.parse(JSON.stringify(rows)) as Rows // times as fixtures have them
  })
}
