/** Several processes of one service (INGEST_PROCESSES, SINK_PROCESSES): what they are told of each other, and what they say. */
import type { MetricObjectWithValues, MetricValue } from 'prom-client'

/** Of one registry, as of now. */
export type MetricValues = MetricObjectWithValues<MetricValue<string>>[]

/** What a service that runs in a process says of itself. */
export interface Member {
  /** Where it listens, http://… or https://…; a sink of a group does not. */
  url: string
  metrics(): Promise<MetricValues>
  /** @throws why it cannot do its job */
  ready(): Promise<void>
  stop(): Promise<void>
}

/** What is said of all processes together. */
export interface Told {
  /** In Prometheus' text format. @throws when they cannot be asked */
  metrics(): Promise<string>
  /** @throws why one of them cannot do its job, or that none serves */
  ready(): Promise<void>
}

/** The group that a process is one of. */
export interface Group extends Told {
  /** Its place, from 0; of one that died, that of whoever is started for it. */
  readonly slot: number
  readonly size: number
  /** Which all share; undefined for the first process at its first start: it finds out whether anybody else has it. */
  readonly port: number | undefined
}
