/** The legacy bot as it is: a session is one JSON blob, read, changed and written back whole, without a lock. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import type { Redis } from 'ioredis'
import { childEnvironment, type Environment } from '../../shared/config.js'
import { PROGRAM } from './program.js'
import { until } from './stores.js'

export interface Said {
  speaker: string
  text: string
  timestamp: string
}

const SPEAKERS = ['ai', 'user', 'agent', 'customer'] as const
const TTL_SECONDS = 3600

export const sessionKey = (sid: string) => `session:${sid}`

/** As Python's `datetime.utcnow().isoformat()` writes it. */
export const utcNow = (ms = Date.now(), micros = 456) =>
  `${new Date(ms).toISOString().slice(0, -1)}${String(micros).padStart(3, '0')}`

export const said = (sid: string, n: number, ms = Date.now()): Said => ({
  speaker: SPEAKERS[n % SPEAKERS.length]!,
  text: `${sid} says ${n}: "नमस्ते"`,
  timestamp: utcNow(ms, n % 1000),
})

export function session(sid: string, transcript: unknown, more: object = {}): Record<string, unknown> {
  return {
    call_sid: sid,
    lead_id: 42,
    lead_name: 'Asha',
    lead_phone: '+14155550100',
    property_type: 'flat',
    location: null,
    budget: 7500000.0,
    source: 'web',
    conversation_stage: 'discovery',
    audio_buffer: 'fe'.repeat(50),
    silence_chunks: 0,
    last_voice_time: 1.5,
    transcript_history: transcript,
    last_agent_question: 'How many rooms?',
    customer_mid_sentence: false,
    collected_data: { rooms: 3 },
    is_bot_speaking: false,
    waiting_for_response: true,
    should_stop_speaking: false,
    escalation_requested: false,
    objections_encountered: ['price'],
    close_attempts: 0,
    session_start_time: utcNow(Date.now() - 60_000),
    last_interaction_time: utcNow(),
    ...more,
  }
}

/** One of its workers. */
export class LegacyBot {
  constructor(private readonly redis: Redis) {}

  async begin(sid: string, transcript: Said[] = [], more: object = {}): Promise<void> {
    await this.redis.set(sessionKey(sid), JSON.stringify(session(sid, transcript, more)), 'EX', TTL_SECONDS)
  }

  /** GET, change, SET: what others wrote meanwhile is lost. */
  async change(sid: string, change: (blob: Record<string, unknown>) => void): Promise<void> {
    const blob = JSON.parse((await this.redis.get(sessionKey(sid)))!)
    change(blob)
    blob.last_interaction_time = utcNow()
    await this.redis.set(sessionKey(sid), JSON.stringify(blob), 'EX', TTL_SECONDS)
  }

  async say(sid: string, turn: Said): Promise<void> {
    await this.change(sid, (blob) => (blob.transcript_history as Said[]).push(turn))
  }
}

export interface RescueReport {
  clean: boolean
  interrupted: boolean
  sessions: number
  truncated: number
  unreadable: number
  turns: number
  new: number
  already_there: number
  unreadable_turns: number
  ended: number
  expired: number
  not_in_postgresql: number | null
  findings: { key: string; reason: string }[]
}

/** `calltape rescue … --json` as a process. Needs a built dist/. */
export class RescueProcess {
  out = ''
  err = ''
  private readonly child: ChildProcess
  private readonly closed: Promise<unknown[]>

  constructor(args: string[], environment: Environment) {
    this.child = spawn(process.execPath, [PROGRAM, 'rescue', '--json', ...args], {
      env: childEnvironment(environment),
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    this.child.stdout!.on('data', (data) => (this.out += data))
    this.child.stderr!.on('data', (data) => (this.err += data))
    this.closed = once(this.child, 'close')
  }

  /** `--watch`, when it has begun. */
  static async watching(args: string[], environment: Environment): Promise<RescueProcess> {
    const process = new RescueProcess(['--watch', ...args], environment)
    await until('rescue watches', () => process.err.includes('watching: ') || process.child.exitCode !== null)
    return process
  }

  get hasExited(): boolean {
    return this.child.exitCode !== null || this.child.signalCode !== null
  }

  /** @param signal undefined: it ends by itself */
  async end(signal?: NodeJS.Signals): Promise<{ code: number | null; report: RescueReport | undefined }> {
    if (signal) this.child.kill(signal)
    const [code] = await this.closed
    return { code: code as number | null, report: this.out === '' ? undefined : JSON.parse(this.out) }
  }
}
