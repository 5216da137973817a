/** What a service says at /metrics. */

/**
 * A metric's value, summed over its labels; 0 for one that has labels and none of them yet.
 *
 * @param url of the service, http://… @param name in full, as in `calltape_sink_turns_total`
 * @throws when nobody answers, or there is no such metric
 */
export async function figure(url: string, name: string): Promise<number> {
  const text = await (await fetch(`${url}/metrics`)).text()
  const values = [...text.matchAll(new RegExp(`^${name}(?:\\{.*\\})? (\\S+)$`, 'gm'))].map(([, value]) => Number(value))
  // A histogram's `_count` has a value, but no TYPE of its own.
  if (values.length === 0 && !text.includes(`# TYPE ${name} `)) throw new Error(`there is no metric ${name}`)
  return values.reduce((sum, value) => sum + value, 0)
}

/** What a service says, by name with labels as they are written: `calltape_sink_retries_total{class="redis"}`. */
export type Scrape = Map<string, number>

/** @throws when it is not answered with 200 */
export async function scrape(url: string): Promise<Scrape> {
  const response = await fetch(`${url}/metrics`)
  if (!response.ok) throw new Error(`/metrics was answered with ${response.status}`)
  const lines = (await response.text()).split('\n').filter((line) => line !== '' && !line.startsWith('#'))
  return new Map(
    lines.map((line) => {
      const at = line.lastIndexOf(' ')
      return [line.slice(0, at), Number(line.slice(at + 1))]
    }),
  )
}
