/** Signs requests as Twilio does, in words of its own: not with what is being tested. */
import { createHmac } from 'node:crypto'

/** @param form of a name that comes twice, all its values */
export function twilioSignature(token: string, url: string, form: Record<string, string | string[]> = {}): string {
  const signed = Object.keys(form)
    .sort()
    .map((name) => [...new Set([form[name]!].flat())].sort().reduce((text, value) => text + name + value, ''))
  return createHmac('sha1', token)
    .update(url + signed.join(''))
    .digest('base64')
}
