/** An export to be read by people: the call's facts, then who said what, and when. */
import type { ExportedCall, ExportedTurn } from './call.js'

const INDENT = '  '

/** @returns lines, the last one with its line feed */
export function asText({ call_sid, call, turns, quarantined }: ExportedCall): string {
  const facts = Object.entries(call ?? {}).filter(([, value]) => value !== null)
  const head = [`call ${call_sid}`, '', ...facts.map(([name, value]) => `${INDENT}${name.padEnd(24)}${printed(value)}`)]
  if (quarantined > 0) head.push(`${INDENT}${'quarantined'.padEnd(24)}${quarantined}, not in what follows`)
  const start = Math.min(...turns.map(({ spoken_at }) => spoken_at.getTime()))
  const body = turns.length === 0 ? ['no turns'] : turns.map((turn) => line(turn, start))
  return `${[...head, '', ...body].join('\n')}\n`
}

function line({ spoken_at, speaker, text, interrupted }: ExportedTurn, start: number): string {
  const at = clock(Math.floor((spoken_at.getTime() - start) / 1000))
  // What follows of a turn with line feeds must not look like another turn.
  return `[${at}] ${plain(speaker)}: ${plain(text).replaceAll('\n', `\n${INDENT}`)}${interrupted ? ' [interrupted]' : ''}`
}

function clock(seconds: number): string {
  const parts = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60]
  return (parts[0] === 0 ? parts.slice(1) : parts).map((part) => String(part).padStart(2, '0')).join(':')
}

function printed(value: unknown): string {
  if (value instanceof Date) return value.toISOString()
  return plain(typeof value === 'object' ? JSON.stringify(value) : String(value))
}

/** What would move a terminal's cursor, or change its colours, is no text. */
function plain(text: string): string {
  return text
    .replaceAll('\r\n', '\n')
    .replaceAll(/[\p{Cc}]/gu, (char) => (char === '\n' || char === '\t' ? char : '\uFFFD'))
}
