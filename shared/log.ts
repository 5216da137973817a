/** Logging: JSON lines on standard output. Transcript text and phone numbers are never logged. */
import { type Logger, pino } from 'pino'

export type { Logger }

/** @param process which part of calltape speaks: `ingest`, `sink`, … */
export function createLog(process: string, level: string): Logger {
  return pino({ name: `calltape-${process}`, level, base: null, timestamp: pino.stdTimeFunctions.isoTime })
}
