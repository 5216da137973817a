/** What must hold of docker-compose.yml, Dockerfile and .env.example, read as text: no Docker is needed. test/compose/run runs them. */
import { expect, test } from 'vitest'
import { givenEnvironment } from '../../shared/config.js'
import { readPackageFile } from '../../shared/package-root.js'

const compose = readPackageFile('docker-compose.yml')
const dockerfile = readPackageFile('Dockerfile')
const example = readPackageFile('.env.example')

/** The lines below `name:` that stand deeper, those of `<<: *service` and `<<: *calltape` with them. */
function section(text: string, name: string, indent: string): string {
  const [, ...rest] = text.split(new RegExp(`^${indent}${name}:.*\n`, 'm'))
  const body = rest.join('').split(new RegExp(`^${indent === '' ? '' : `(?:${indent})?`}[^\\s#]`, 'm'))[0] ?? ''
  const inherited = /^ +<<: \*(service|calltape)$/m.exec(body)?.[1]
  return inherited && indent + name !== 'services'
    ? body + section(compose, `x-${inherited}: &${inherited}`.replace(/:.*/, ''), '')
    : body
}

const services = new Map(
  [...section(compose, 'services', '').matchAll(/^ {2}([a-z-]+):$/gm)].map(([, name]) => [
    name!,
    section(section(compose, 'services', ''), name!, '  '),
  ]),
)
const environmentOf = (service: string) => {
  const own = /^ {4}environment:\n((?: {6}.*\n)+)/m.exec(services.get(service)!)?.[1] ?? ''
  const names = [...own.matchAll(/^ {6}([A-Z_]+):/gm)].map(([, name]) => name!)
  const shared = [...section(compose, 'x-environment', '').matchAll(/^ {2}([A-Z_]+):/gm)].map(([, name]) => name!)
  return own === '' || own.includes('<<: *environment') ? [...names, ...shared] : names
}

test('all_services_are_there', () => {
  expect([...services.keys()]).toEqual([
    ...['redis', 'postgres', 'migrate', 'ingest', 'sink', 'prometheus', 'grafana-user', 'grafana', 'demo', 'calltape'],
  ])
})

test.each([...services.keys()])('%s_is_hardened_and_limited', (name) => {
  const service = services.get(name)!
  for (const wanted of [
    ...[/^ +read_only: true$/m, /^ +cap_drop: \[ALL\]$/m, /^ +security_opt: \['no-new-privileges:true'\]$/m],
    ...[/^ +restart: /m, /^ +cpus: /m, /^ +mem_limit: /m, /^ +pids_limit: /m, /^ +networks: /m],
  ]) {
    expect(service).toMatch(wanted)
  }
  // A one-shot is over before anybody would ask how it is.
  if (!['grafana-user'].includes(name)) expect(service).toMatch(/^ +healthcheck: \{/m)
  expect(service).not.toMatch(/privileged|network_mode|docker\.sock/)
})

test('every_image_is_pinned', () => {
  const images = [...compose.matchAll(/^ +image: (\S+)/gm)].map(([, image]) => image!)
  expect(images.length).toBeGreaterThan(4)
  for (const image of images) {
    expect(image).toMatch(/^[a-z/]+:(?:v?\d+(?:\.\d+)*|\$\{CALLTAPE_VERSION:-latest\})$/)
  }
  expect(dockerfile).toMatch(/^ARG NODE=node:24-trixie-slim$/m)
  expect(dockerfile).toMatch(/^USER 1000:1000$/m)
})

test('what_is_published_is_published_on_loopback_only', () => {
  const ports = [...compose.matchAll(/^ +ports: \[(.*)\]$/gm)].flatMap(([, list]) => list!.split(', '))
  expect(ports.length).toBe(3)
  for (const port of ports) expect(port).toMatch(/^'127\.0\.0\.1:\$\{[A-Z_]+:-\d+\}:\d+'$/)
  expect(compose.match(/ports:/g)).toHaveLength(3)
  expect(services.get('redis')).toMatch(/networks: \[stores\]/)
  expect(services.get('postgres')).toMatch(/networks: \[stores\]/)
  expect(section(section(compose, 'networks', ''), 'stores', '  ')).toContain('internal: true')
})

test('every_variable_of_the_compose_file_stands_in_the_example', () => {
  const passed = ['ingest', 'sink', 'demo'].flatMap((service) => {
    const text = `${services.get(service)!}${section(compose, 'x-environment', '')}`
    return [...text.matchAll(/^ +([A-Z_]+):$/gm)].map(([, name]) => name!)
  })
  const filled = [...compose.matchAll(/(?<!\$)\$\{([A-Z_]+)/g)].map(([, name]) => name!)
  expect(passed.length).toBeGreaterThan(20)
  for (const name of new Set([...passed, ...filled])) expect(example).toMatch(new RegExp(`^#?${name}=`, 'm'))
})

test('every_variable_of_the_example_is_used', () => {
  const names = [...example.matchAll(/^#?([A-Z_]+)=/gm)].map(([, name]) => name!)
  for (const name of names.filter((name) => name !== 'COMPOSE_PROFILES')) {
    expect(compose).toMatch(new RegExp(`\\$\\{${name}[:}]|^ +${name}:$`, 'm'))
  }
})

test.each(['migrate', 'ingest', 'sink', 'demo', 'calltape'])('%s_is_given_only_what_calltape_knows', (service) => {
  const given = environmentOf(service)
  expect(given).toContain('DATABASE_URL')
  expect(Object.keys(givenEnvironment(Object.fromEntries(given.map((name) => [name, 'x'])))).sort()).toEqual(
    given.sort(),
  )
})

test('a_secret_has_no_default', () => {
  for (const [, name, rest] of compose.matchAll(/\$\{([A-Z_]*(?:PASSWORD|TOKENS))(.*?)\}/g)) {
    expect(rest).toBe(`:?copy .env.example to .env and set ${name} there`)
  }
})
