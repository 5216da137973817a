/** What a Content-Type header names. */

export const FORM = 'application/x-www-form-urlencoded'

/** Without its parameters, in lower case; empty when nothing is said. */
export const mediaTypeOf = (contentType: string): string => contentType.split(';')[0]!.trim().toLowerCase()
