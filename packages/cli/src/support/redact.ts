/** Takes secrets out of text that leaves the site. Rather a harmless word too many than a key too few. */
const mark = '[redacted]';

const secretName =
  '[\\w.-]*(?:password|passwd|passphrase|secret|token|credential|api[_-]?key|private[_-]?key|access[_-]?key|auth(?:orization)?)[\\w.-]*';

const rules: readonly [RegExp, string][] = [
  [/-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)/g, mark],
  [/\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}/gi, `$1 ${mark}`],
  // "name": "value", name=value, name: value, --name value; JSON in a JSON string has its quotes escaped.
  [new RegExp(`("${secretName}"\\s*:\\s*)(?:"(?:[^"\\\\]|\\\\.)*"|[^\\s,}\\]]+)`, 'gi'), `$1"${mark}"`],
  [new RegExp(`(\\\\"${secretName}\\\\"\\s*:\\s*\\\\")(?:[^"\\\\])*`, 'gi'), `$1${mark}`],
  [new RegExp(`(\\b${secretName}\\s*[=:]\\s*)(?:"[^"]*"|'[^']*'|[^\\s,;&"']+)`, 'gi'), `$1${mark}`],
  [new RegExp(`(--${secretName}\\s+)(?:"[^"]*"|'[^']*'|[^\\s"'-][^\\s"']*)`, 'gi'), `$1${mark}`],
  [/\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*/g, mark],
  // user:password@host of a URL
  [/(\b[a-z][a-z0-9+.-]*:\/\/[^\s/:@]+:)[^\s/@]+@/gi, `$1${mark}@`],
];

export function redact(text: string): string {
  return rules.reduce((result, [pattern, replacement]) => result.replace(pattern, replacement), text);
}
