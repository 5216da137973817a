/** The ids of stream entries: `<ms>-<n>`, two decimal numbers of 64 bits. */

/** Whether it is an entry id as Redis writes it. */
export const isEntryId = (id: string) => /^(0|[1-9]\d{0,19})-(0|[1-9]\d{0,19})$/.test(id)

/** Which of two entry ids is the earlier one: negative when it is `a`. Their numbers are too long for a double. */
export function compareIds(a: string, b: string): number {
  const [aMs = '', aNth = ''] = a.split('-')
  const [bMs = '', bNth = ''] = b.split('-')
  return compareDecimals(aMs, bMs) || compareDecimals(aNth, bNth)
}

function compareDecimals(a: string, b: string): number {
  if (a.length !== b.length) return a.length - b.length
  return a < b ? -1 : Number(a > b)
}
