/** Several processes of one service (INGEST_PROCESSES, SINK_PROCESSES): what they are told of each other, and what they say. */
import type { MetricObjectWithValues, MetricValue } from 'prom-client'

/** Of one registry, as of now. */
export type MetricValues = MetricObjectWithValues<MetricValue<string>>[]

/** Of a Cluster, what a server that takes nothing keeps waiting while the others go on: that is no reason not to be ready. */
export interface Waiting {
  partitions: number[]
  reason: string
}

/** What a service that runs in a process says of itself. */
export interface Member {
  /** Where it listens, http://… or https://…; a sink of a group does not. */
  url: string
  metrics(): Promise<MetricValues>
  /** @returns what waits nevertheless; undefined when nothing does @throws why it cannot do its job */
  ready(): Promise<Waiting | undefined>
  stop(): Promise<void>
}

/** What is said of all processes together. */
export interface GroupStatus {
  /** In Prometheus' text format. @throws when they cannot be asked */
  metrics(): Promise<string>
  /** @returns what waits in any of them @throws why one of them cannot do its job, or that none serves */
  ready(): Promise<Waiting | undefined>
}

/** The group that a process is one of. */
export interface Group extends GroupStatus {
  /** Which of them it is, from 0; who is started for one that died is the same. */
  readonly index: number
  readonly size: number
  /** Which all share; undefined for the first process at its first start: it finds out whether anybody else has it. */
  readonly port: number | undefined
}
