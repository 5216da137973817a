/** The README's table of settings, made from the settings themselves. */
import { z } from 'zod'
import { SETTING_GROUPS, SETTINGS, type Setting, type SettingName } from '../../shared/settings.js'
import { defaultOf, inUnits, withUnits } from '../../shared/settings-shown.js'

const BEGIN = '<!-- config -->'
const END = '<!-- /config -->'

/** @returns `document` with the table as it is now between its two markers */
export function withTable(document: string): string {
  const [begin, end] = [document.indexOf(BEGIN), document.indexOf(END)]
  if (begin < 0 || end < begin) throw new Error(`there is no ${BEGIN} … ${END} to write the table into`)
  return `${document.slice(0, begin)}${BEGIN}\n${configurationTable()}\n${document.slice(end)}`
}

/** Markdown: a row for each setting, below its group's title. */
export function configurationTable(): string {
  const rows = SETTING_GROUPS.flatMap(({ title, names }) => {
    const settings = names.filter((name) => !SETTINGS[name].isInternal)
    return [[`**${title}**`, '', '', '', ''], ...settings.map(cells)]
  })
  const head = [
    ['variable', 'default', 'may be', 'read by', 'meaning'],
    ['---', '---', '---', '---', '---'],
  ]
  return [...head, ...rows].map((row) => `|${row.map((cell) => ` ${cell}`.trimEnd()).join(' |')} |`).join('\n')
}

function cells(name: SettingName): string[] {
  const setting = SETTINGS[name]
  const { means, readBy, secret } = setting
  const meaning = [means, secret === 'all' ? '(secret)' : ''].filter(Boolean).join(' ')
  return [`\`${name}\``, describeDefault(name, setting), describeValues(setting), readBy.join(', '), meaning]
}

function describeDefault(name: SettingName, { unset, unit }: Setting): string {
  const value = defaultOf(name)
  if (value === undefined || (Array.isArray(value) && value.length === 0)) return unset ?? 'none'
  const plain = `\`${value}\``
  return unit && typeof value === 'number' ? withUnits(value, unit).replace(String(value), plain) : plain
}

function describeValues({ type, unit }: Setting): string {
  let inner: unknown = type instanceof z.ZodPipe ? type.in : type
  while (inner instanceof z.ZodDefault || inner instanceof z.ZodOptional) inner = inner.unwrap()
  if (inner instanceof z.ZodNumber) return describeRange(inner, unit)
  if (inner instanceof z.ZodUnion) {
    const number = inner.options.find((option) => option instanceof z.ZodNumber)
    return number ? `${describeRange(number, unit)}, \`off\`` : ''
  }
  return (inner as z.ZodType).description ?? ''
}

function describeRange({ minValue, maxValue }: z.ZodNumber, unit: Setting['unit']): string {
  const [min, max] = [minValue ?? 0, maxValue ?? 0]
  return unit ? `${unit}: ${inUnits(min, unit)} – ${inUnits(max, unit)}` : `${min} – ${max}`
}
