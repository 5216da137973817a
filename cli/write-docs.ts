/** `npm run docs`: writes into README.md what is made from the source. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { PACKAGE_ROOT } from '../shared/package-root.js'
import { withTable } from './config/table.js'

const readme = join(PACKAGE_ROOT, 'README.md')
writeFileSync(readme, withTable(readFileSync(readme, 'utf8')))
