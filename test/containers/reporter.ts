/** The end of `npm run test:containers`: a line for each pair of stores, and by name whatever has not been run. */
import type { Reporter, TestModule, Vitest } from 'vitest/node'
import { imagePairs, NOT_IN_CONTAINERS } from './images.js'

export class ContainersReporter implements Reporter {
  private say: (line: string) => void = () => undefined

  onInit(vitest: Vitest): void {
    this.say = (line) => vitest.logger.log(line)
  }

  onTestRunEnd(modules: readonly TestModule[]): void {
    for (const { redis, postgres } of imagePairs()) {
      const own = modules.filter(({ project }) => project.name === redis)
      this.say(`${redis}, ${postgres}: ${own.length === 0 ? 'not run' : summaryOf(own)}`)
    }
    const skipped = new Set(modules.flatMap((module) => [...module.children.allTests('skipped')].map(nameOf)))
    for (const name of skipped) this.say(`skipped: ${name}`)
    for (const [pattern, reason] of Object.entries(NOT_IN_CONTAINERS)) {
      this.say(`not run in containers: ${pattern} (${reason})`)
    }
  }
}

function nameOf(...[test]: Parameters<NonNullable<Reporter['onTestCaseResult']>>): string {
  const result = test.result()
  const note = result.state === 'skipped' && result.note ? `: ${result.note}` : ''
  return `${test.project.name} ${test.module.relativeModuleId} ${test.fullName}${note}`
}

/** A suite that breaks outside its tests counts as one failure. */
function summaryOf(modules: TestModule[]): string {
  const count = (state: 'passed' | 'failed' | 'skipped') =>
    modules.reduce((sum, module) => sum + [...module.children.allTests(state)].length, 0)
  const broken = modules.filter((module) => !module.ok() && [...module.children.allTests('failed')].length === 0)
  return `${count('passed')} passed, ${count('failed') + broken.length} failed, ${count('skipped')} skipped`
}
