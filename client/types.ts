/** What users of the client see besides `connect` and its client: events, options, figures, errors. */

/** The fields the client looks at; the rest goes to the server as it is. */
export interface CallEvent {
  type: 'turn' | 'call.started' | 'call.status' | 'call.data' | 'call.ended'
  /** May be left out with `callSid` in the options. */
  call_sid?: string | undefined
  /** Idempotency key, 1 to 128 characters. Stamped by the client where there is neither this nor a turn's `seq`. */
  id?: string | null | undefined
  /** A turn's number in its call from 0; its idempotency key if it has no `id`. */
  seq?: number | null | undefined
  /** When it happened: epoch milliseconds or RFC 3339 with a zone. Absent: when the server received it. */
  ts?: number | string | null | undefined
}

export interface ConnectOptions {
  /** Sent as `Authorization: Bearer …`. */
  token?: string | undefined
  /** Binds the connection to this one call. */
  callSid?: string | undefined
  /** Unacknowledged events from which on ready() waits. Default: the server's window. */
  maxUnacked?: number | undefined
  /** Events in one message at most. Default 256. */
  maxBatch?: number | undefined
  /** Before the first attempt to reconnect; doubles with each, and is shortened at random by up to half. Default 100. */
  initialBackoffMs?: number | undefined
  /** Default 5000. */
  maxBackoffMs?: number | undefined
  /** From connecting to the server's hello. Default 10000. */
  helloTimeoutMs?: number | undefined
  /** Without a sign of life while events are unacknowledged. Default 30000. */
  silenceTimeoutMs?: number | undefined
  /** What close() gives to the flush, and again to the closing handshake. Default 10000. */
  closeTimeoutMs?: number | undefined
}

/** Numbers of events, but for `reconnects`. `sent` is `acked` + `refused` + `unacked`. */
export interface Stats {
  /** Given to send() or post(). */
  sent: number
  acked: number
  refused: number
  /** Connections after the first that got as far as the server's hello. */
  reconnects: number
  /** Put on the wire again after a reconnect. */
  resent: number
  /** Without an answer yet; once the client is closed, without one for good. */
  unacked: number
}

export interface ClientEvents {
  /** Events stored, by one acknowledgement. */
  ack: [count: number]
  /** An event given to post() was refused; send() rejects instead. */
  refused: [error: EventRefused]
  /** A connection or an attempt at one failed; the next attempt is in `retryMs` milliseconds. */
  disconnect: [reason: Error, retryMs: number]
  /** Connected again, about to send `unacked` events. */
  reconnect: [unacked: number]
  /** The end: closed, terminated, or the token is no longer accepted. */
  close: [reason: ConnectionClosed]
}

/** One event was refused and is not stored; sending it again unchanged is no use. */
export class EventRefused extends Error {
  override readonly name = 'EventRefused'
  constructor(
    /** The server's, or `too_large`: longer than a message may be, and so never sent. */
    readonly code: string,
    message: string,
    /** The field at fault, if it is not the whole event. */
    readonly path: string | undefined,
    /** The event as it was sent, with the `id` if one was stamped. */
    readonly event: CallEvent,
  ) {
    super(message)
  }
}

/** The client is closed. Whether an event without an answer is stored is unknown; with the same key it may be resent. */
export class ConnectionClosed extends Error {
  override readonly name = 'ConnectionClosed'
}
