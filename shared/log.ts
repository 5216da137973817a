/** Logging: JSON lines on standard output. Transcript text and phone numbers are never logged. */
import { type Logger, pino } from 'pino'

export type { Logger }

/** @param process which part of calltape speaks: `ingest`, `sink`, … */
export function createLog(process: string, level: string): Logger {
  return pino({ name: `calltape-${process}`, level, base: null, timestamp: pino.stdTimeFunctions.isoTime })
}

/** Why a connection failed. Where a host has several addresses, Node's error has a code and no message. */
export function reasonOf(error: Error): string {
  return error.message || ((error as NodeJS.ErrnoException).code ?? error.name)
}
