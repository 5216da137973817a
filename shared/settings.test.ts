/** The table of settings tells the truth: all that is read is in it, by whom it says, and nobody reads the environment past it. */
import { readdirSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { expect, test } from 'vitest'
import { PACKAGE_ROOT, readPackageFile } from './package-root.js'
import { type Reader, SETTING_GROUPS, SETTING_NAMES, SETTINGS, type SettingName } from './settings.js'

const FOLDERS = ['cli', 'client', 'ingest', 'sink', 'shared', 'bench']
const sources = FOLDERS.flatMap((folder) =>
  readdirSync(join(PACKAGE_ROOT, folder), { recursive: true, encoding: 'utf8' })
    .filter((file) => file.endsWith('.ts') && !file.endsWith('.test.ts'))
    .map((file) => `${folder}/${file}`),
)

/** Without comments: they may speak of anything. */
const codeOf = (file: string) => readPackageFile(file).replace(/\/\*[\s\S]*?\*\/|(?<![:'"])\/\/.*/g, '')

test('the_environment_is_read_in_one_file_only', () => {
  const readers = sources.filter((file) => /process\s*\.\s*env\b|\benv\b.*from 'node:process'/.test(codeOf(file)))
  expect(readers).toEqual(['shared/config.ts'])
})

test('every_setting_that_is_read_is_in_the_table', () => {
  const read = sources.flatMap((file) =>
    [...codeOf(file).matchAll(/\b(?:config|given|environment)\.([A-Z][A-Z0-9_]+)\b/g)].map(([, name]) => name),
  )
  expect(new Set(read).size).toBeGreaterThan(20)
  expect(read.filter((name) => !(SETTING_NAMES as string[]).includes(name!))).toEqual([])
})

/** Where each reader's code begins. */
const ENTRIES: Record<Reader, string[]> = {
  ingest: ['ingest/ingest.ts'],
  sink: ['sink/sink.ts'],
  // What runs the two processes, shows settings or makes up its own environment for a stack works on none of them itself.
  commands: sources.filter(
    (file) => file.startsWith('cli/') && !/calltape|config|stack|demo|up|load|health|service|processes/.test(file),
  ),
}
/** Settings of a process that are read where it is started, or checked. */
const READ_AT_START: SettingName[] = ['LOG_LEVEL', 'CRASH_AT', 'INGEST_PROCESSES', 'SINK_PROCESSES']

function closureOf(entries: string[]): Set<string> {
  const found = new Set(entries)
  for (const file of found) {
    if (file === 'cli/stack.ts') continue
    const imports = codeOf(file).matchAll(/import (?!type)[^'"]*?'(\.[^']+)\.js'|import\('(\.[^']+)\.js'\)/g)
    for (const [, path, dynamic] of imports) found.add(join(dirname(file), `${path ?? dynamic}.ts`))
  }
  return new Set([...found].filter((file) => !/^shared\/(settings|config)|^cli\/stack/.test(file)))
}

test.each(Object.entries(ENTRIES) as [Reader, string[]][])('the_table_says_what_%s_reads', (reader, entries) => {
  const code = [...closureOf(entries)].map(codeOf).join('\n')
  // As a property, destructured, or as a name that is looked up; not within a sentence.
  const isRead = (name: string) => new RegExp(`\\.${name}\\b|[{,]\\s*${name}\\b\\s*[,:}]|'${name}'`).test(code)
  const names = SETTING_NAMES.filter((name) => !READ_AT_START.includes(name))
  const said = names.filter((name) => SETTINGS[name].readBy.includes(reader))
  expect(said).toEqual(names.filter(isRead))
})

test('every_setting_is_described_and_in_one_group', () => {
  expect(SETTING_GROUPS.flatMap(({ names }) => names)).toEqual(SETTING_NAMES)
  for (const name of SETTING_NAMES) {
    const { means, readBy, type } = SETTINGS[name]
    expect({ name, isDescribed: /^\S.*[^.\s]$/.test(means) }).toEqual({ name, isDescribed: true })
    expect(readBy.length, name).toBeGreaterThan(0)
    expect(type.safeParse(undefined).success, `${name} need not be set`).toBe(true)
  }
})

test('whatever_is_named_like_a_secret_is_one', () => {
  const named = SETTING_NAMES.filter((name) => /SECRET|TOKEN|PASSWORD|(?<!TLS)_KEY(?!_FILE)/.test(name))
  expect(named.length).toBeGreaterThan(8)
  for (const name of named) expect({ name, secret: SETTINGS[name].secret }).toEqual({ name, secret: 'all' })
  for (const name of SETTING_NAMES.filter((name) => name.endsWith('_URL'))) expect(SETTINGS[name].secret).toBe('in URL')
})
