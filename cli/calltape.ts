#!/usr/bin/env node
/** The one program. Only parses and starts: each command lives in its own file, loaded when it is asked for. */
import { Command, Option } from 'commander'
import { OperatorError, readConfig } from '../shared/config.js'
import { describeCrash } from '../shared/log.js'
import { readPackageFile } from '../shared/package-root.js'
import type { ConfigOptions } from './config.js'
import type { DemoOptions } from './demo.js'
import type { EraseOptions } from './erase.js'
import type { ExportOptions } from './export.js'
import type { OrphansOptions } from './orphans.js'
import type { ChoiceOptions, ListOptions } from './quarantine.js'
import type { ReplayOptions } from './replay/options.js'
import type { RescueOptions } from './rescue.js'
import type { ServiceOptions } from './service.js'
import type { VerifyOptions } from './verify.js'

const { version, description } = JSON.parse(readPackageFile('package.json')) as { version: string; description: string }
const DATA_FOLDER = '.calltape'
const MOST_WAIT_SECONDS = 24 * 3600

/** Something has to be set or mended first. (1 is what commands answer.) */
const EXIT_OPERATOR = 2
/** A bug; EX_SOFTWARE of sysexits.h. Node's own code for it, 1, would read as an answer. */
const EXIT_BUG = 70
process.on('uncaughtException', (error) => {
  console.error(describeCrash(error))
  process.exit(EXIT_BUG)
})
for (const out of [process.stdout, process.stderr]) {
  out.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') return // nobody reads any more, as with `| head`: that is no failure
    process.exitCode = EXIT_OPERATOR
    console.error(`calltape: cannot print: ${error.message}`)
  })
}

const DATA_OPTION = [
  '--data <dir>',
  'the folder of the `calltape up` to ask, where REDIS_URL and DATABASE_URL are not set',
  DATA_FOLDER,
] as const

const program = new Command('calltape')
  .description(description)
  .version(version)
  .showHelpAfterError()
  .exitOverride(({ exitCode }) => process.exit(exitCode && EXIT_OPERATOR))
  .addHelpText('afterAll', '\nConfiguration is by environment variables: `calltape config` shows what they are.')

program
  .command('up')
  .description(
    'start everything on this machine: PostgreSQL, Redis, ingest and sink (REDIS_URL, DATABASE_URL: use those)',
  )
  .option('--data <dir>', 'where PostgreSQL and Redis keep their data', DATA_FOLDER)
  .action(async (options: { data: string }) => (await import('./up.js')).up(options, DATA_FOLDER))

program
  .command('demo')
  .description('start everything, play calls through the real WebSocket, and check what landed in PostgreSQL')
  .option(
    '--calls <n>',
    'be a load generator: so many generated calls instead of the sample calls',
    positive('--calls', Number.isInteger),
  )
  .option('--rate <r>', 'turns a second, all calls together (with --calls; default: full speed)', positive('--rate'))
  .option('--turns <n>', 'turns a call (with --calls)', positive('--turns', Number.isInteger), 20)
  .option('--ingest <url>', 'start nothing: play against the running ingest there, whose calls come to DATABASE_URL')
  .option('--sink <url>', 'with --ingest: a sink, which is asked how far behind it is')
  .action(async (options: DemoOptions) => (await import('./demo.js')).demo(options))

program
  .command('ingest')
  .description('take events over WebSocket and HTTP and append them to Redis Streams')
  .option('--processes <n>', 'so many processes on one port; 0: one for each core (default: INGEST_PROCESSES)')
  .addOption(new Option('--member <i/n>').hideHelp())
  .addOption(new Option('--port <port>').hideHelp())
  .action(async (options: ServiceOptions) => (await import('./service.js')).runService('ingest', options))

program
  .command('sink')
  .description('copy events from Redis Streams into PostgreSQL and finalize calls')
  .option('--processes <n>', 'so many processes that share the work; 0: one for each core (default: SINK_PROCESSES)')
  .addOption(new Option('--member <i/n>').hideHelp())
  .action(async (options: ServiceOptions) => (await import('./service.js')).runService('sink', options))

program
  .command('health')
  .description('ask the ingest or the sink on this machine how it is; exit code 1 if it is not well')
  .argument('[process]', 'ingest or sink; in a container: the one that runs there')
  .option('--ready', 'whether it can do its job, and not only whether it lives')
  .action(async (role: string | undefined, options: { ready?: boolean }) =>
    (await import('./health.js')).health(role, options),
  )

program
  .command('migrate')
  .description("bring the database to this version's schema; safe to run again")
  .action(async () => {
    const { migrate } = await import('../shared/schema.js')
    const done = await migrate(readConfig(), console.error)
    console.log(done.length === 0 ? 'the schema is up to date' : `migrated: ${done.join(', ')}`)
  })

program
  .command('show')
  .description("print a call's transcript and state, wherever they are now: Redis, PostgreSQL, or both")
  .argument('<call_sid>')
  .option('--json', 'as JSON')
  .option(...DATA_OPTION)
  .action(async (callSid: string, options: { json?: boolean; data: string }) =>
    (await import('./show.js')).show(callSid, options),
  )

program
  .command('export')
  .description('write a call as a file for others: readable text, JSON, or an IETF vCon')
  .argument('<call_sid>')
  .requiredOption('--format <format>', 'text, json or vcon')
  .option('--out <file>', 'there, instead of standard output')
  .option(...DATA_OPTION)
  .action(async (callSid: string, options: ExportOptions) => (await import('./export.js')).exportCall(callSid, options))

program
  .command('erase')
  .description(
    'remove calls everywhere: Redis, PostgreSQL, quarantine, spool, archives; exit code 1 unless nothing is left',
  )
  .argument('<call_sid...>')
  .option('--force', 'also a call that is live, or that a sink works on')
  .option('--dry-run', 'remove nothing, only say what would be')
  .option('--archive <path...>', 'archives, or folders of them, besides ARCHIVE_DIR')
  .option('--wait <seconds>', 'how long to wait for sinks and for an ingest that empties its spool', waitSeconds, 60)
  .option('--rewrite-aof', 'have Redis rewrite its append-only file, which has what was removed until then')
  .option('--json', 'as JSON')
  .option(...DATA_OPTION)
  .action(async (callSids: string[], options: EraseOptions) => (await import('./erase.js')).erase(callSids, options))

program
  .command('verify')
  .description('compare every stream entry in Redis with PostgreSQL; exit code 1 if anything is missing or different')
  .option('--call <sid>', 'only this call')
  .option('--from <time>', 'only what arrived from then on: epoch ms, an entry id, or 2026-01-31T09:00:00Z')
  .option('--to <time>', 'only what arrived until then')
  .option('--wait <seconds>', 'how long to wait for what is not committed yet', waitSeconds, 10)
  .option('--json', 'as JSON')
  .option(...DATA_OPTION)
  .action(async (options: VerifyOptions) => (await import('./verify.js')).verify(options))

program
  .command('replay')
  .description('store what is in the streams, or in an archive of them, and not in PostgreSQL; safe to run again')
  .option('--call <sid>', 'only this call')
  .option('--from <time>', 'only what arrived from then on: epoch ms, an entry id, or 2026-01-31T09:00:00Z')
  .option('--to <time>', 'only what arrived until then')
  .option('--all', 'every call')
  .option('--dry-run', 'write nothing, only say what would be')
  .option('--rate <n>', 'most entries a second', positive('--rate'))
  .option('--schema <name>', 'rebuild everything in another schema, and compare; exit code 1 if they differ')
  .option('--archive <file>', 'write the streams to a file (.ndjson, .ndjson.gz, .ndjson.zst), nothing to PostgreSQL')
  .option('--from-archive <path>', 'read such a file, or all in a folder, instead of Redis')
  .option('--json', 'as JSON')
  .option(...DATA_OPTION)
  .action(async (options: ReplayOptions) => (await import('./replay.js')).replay(options))

program
  .command('rescue')
  .description("bring a legacy bot's sessions (JSON blobs in Redis) into calltape; exit code 1 if any cannot be read")
  .option('--source <url>', "the bot's Redis, where it is not REDIS_URL; it is only read")
  .option('--match <pattern>', 'the keys of its sessions; behind the last : before the * is the call_sid', 'session:*')
  .option('--dry-run', 'append nothing, only say what would be')
  .option('--watch', 'go on until stopped')
  .option(
    '--every <seconds>',
    'with --watch: how often all keys are read (2; 30 with notifications)',
    positive('--every'),
  )
  .option('--wait <seconds>', 'how long to wait until PostgreSQL has it all', waitSeconds, 10)
  .option('--json', 'the report as JSON')
  .option(...DATA_OPTION)
  .action(async (options: RescueOptions) => (await import('./rescue.js')).rescue(options))

program
  .command('orphans')
  .description('what looks like a call in Redis and nobody works on; exit code 1 if there is any')
  .option('--adopt', 'give the sinks those that are calls: to be read, and to end, as any other')
  .option('--json', 'as JSON')
  .option(...DATA_OPTION)
  .action(async (options: OrphansOptions) => (await import('./orphans.js')).orphans(options))

const quarantine = program.command('quarantine').description('what could not be stored: list, show, retry, drop')

quarantine
  .command('list')
  .description('what is in quarantine, the newest first')
  .option('--call <sid>', 'only of this call')
  .option('--limit <n>', 'most entries to list', positive('--limit', Number.isInteger), 50)
  .option('--json', 'as JSON')
  .option(...DATA_OPTION)
  .action(async (options: ListOptions) => (await import('./quarantine.js')).list(options))

quarantine
  .command('show')
  .description('all there is of an entry')
  .argument('<id>')
  .option('--json', 'as JSON')
  .option(...DATA_OPTION)
  .action(async (id: string, options: { data: string; json?: boolean }) =>
    (await import('./quarantine.js')).show(id, options),
  )

quarantine
  .command('retry')
  .description('store entries whose cause is mended; exit code 1 if any cannot be stored still')
  .argument('[id...]')
  .option('--call <sid>', 'all of this call')
  .option('--all', 'all there are')
  .option(...DATA_OPTION)
  .action(async (ids: string[], options: ChoiceOptions) => (await import('./quarantine.js')).retry(ids, options))

quarantine
  .command('drop')
  .description('give entries up: their data goes, that they were there is kept')
  .argument('[id...]')
  .option('--call <sid>', 'all of this call')
  .option('--all', 'all there are (with --yes)')
  .option('--yes', 'all of them is meant')
  .option(...DATA_OPTION)
  .action(async (ids: string[], options: ChoiceOptions & { yes?: boolean }) =>
    (await import('./quarantine.js')).drop(ids, options),
  )

program
  .command('config')
  .description('print the settings that are in effect, and where each comes from; secrets are masked')
  .option('--json', 'as JSON')
  .option('--table', 'all there are, with their defaults and meanings, as Markdown')
  .option(...DATA_OPTION)
  .action(async (options: ConfigOptions) => (await import('./config.js')).config(options))

function positive(option: string, isFit: (value: number) => boolean = Number.isFinite) {
  return (text: string): number => {
    const value = Number(text)
    if (!(value > 0 && isFit(value))) {
      const wants = isFit === Number.isInteger ? 'a whole number' : 'a number'
      throw new OperatorError(`${option} wants ${wants} above 0, got ${text}`)
    }
    return value
  }
}

function waitSeconds(text: string): number {
  const seconds = text.trim() === '' ? Number.NaN : Number(text)
  if (seconds >= 0 && seconds <= MOST_WAIT_SECONDS) return seconds
  throw new OperatorError(`--wait wants seconds, from 0 to ${MOST_WAIT_SECONDS}, got ${text}`)
}

program.parseAsync().catch((error: Error) => {
  console.error(error instanceof OperatorError ? `calltape: ${error.message}` : describeCrash(error))
  process.exitCode = error instanceof OperatorError ? EXIT_OPERATOR : EXIT_BUG
  // An error at start may leave connections open that would keep the process alive.
  setTimeout(() => process.exit(), 100).unref()
})
