/** `calltape config`: which settings are in effect, where each comes from, and what about them is hardly meant. */
import { type Environment, foreignNames, givenEnvironment, readConfig } from '../shared/config.js'
import { SETTING_GROUPS, SETTINGS, type SettingName } from '../shared/settings.js'
import { type Shown, shown, withUnits } from '../shared/settings-shown.js'
import { configurationTable } from './config/table.js'
import { misspelt, warningsOf } from './config/warnings.js'
import { table } from './live-view.js'
import { runningStack } from './stack.js'

export interface ConfigOptions {
  json?: boolean
  /** The README's table instead of what is in effect. */
  table?: boolean
  /** The folder of the `calltape up` to ask. */
  data: string
}

interface EffectiveSetting {
  name: SettingName
  /** Secrets masked; null: none. */
  value: Shown
  source: 'environment' | 'up' | 'default'
  group: string
}

export interface ConfigReport {
  settings: EffectiveSetting[]
  warnings: string[]
}

/** Prints what is in effect. @throws OperatorError with a line for every variable that is wrong */
export function config(options: ConfigOptions): void {
  if (options.table) {
    console.log(configurationTable())
    return
  }
  const report = effectiveSettings(givenEnvironment(), runningStack(options.data), foreignNames())
  console.log(options.json ? JSON.stringify(report, null, 2) : describe(report, options.data))
}

/**
 * @param given what the environment sets
 * @param stack what a running `calltape up` adds to that
 * @param others names of the other variables
 * @throws OperatorError with a line for every variable that is wrong
 */
export function effectiveSettings(given: Environment, stack: Environment, others: string[]): ConfigReport {
  const all = { ...stack, ...given }
  const config = readConfig(all)
  const settings = SETTING_GROUPS.flatMap(({ title: group, names }) =>
    names
      .filter((name) => !SETTINGS[name].isInternal || all[name])
      .map((name): EffectiveSetting => {
        const source = given[name] ? 'environment' : all[name] ? 'up' : 'default'
        return { name, value: shown(name, config, all), source, group }
      }),
  )
  const isUp = Object.keys(stack).length > 0
  return { settings, warnings: [...misspelt(others), ...warningsOf(config, all, isUp)] }
}

/** For people. */
export function describe({ settings, warnings }: ConfigReport, dataDir: string): string {
  const rows = settings.map((setting) => {
    const source = setting.source === 'up' ? `up in ${dataDir}` : setting.source
    return [setting.name, describeValue(setting), source]
  })
  const lines = table(undefined, rows).split('\n')
  const titled = lines.flatMap((line, i) => {
    const { group } = settings[i]!
    return group === settings[i - 1]?.group ? [line] : [i === 0 ? group : `\n${group}`, line]
  })
  return [...titled, ...warnings.map((warning, i) => `${i === 0 ? '\n' : ''}warning: ${warning}`)].join('\n')
}

function describeValue({ name, value }: EffectiveSetting): string {
  const { unset, unit } = SETTINGS[name]
  if (value === null) return unset?.replaceAll('`', '') ?? 'none'
  return unit && typeof value === 'number' ? withUnits(value, unit) : String(value)
}
