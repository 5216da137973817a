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
