/** What commands print: tables for people, JSON for programs. JSON has bigint as decimal strings and never loses a field. */
import { styleText } from 'node:util';

export type OutputFormat = 'table' | 'json';

export function printable(value: unknown): string {
  return JSON.stringify(
    value,
    (_key, item: unknown) => (typeof item === 'bigint' ? item.toString() : item),
    2,
  );
}

export function printJson(value: unknown): void {
  process.stdout.write(`${printable(value)}\n`);
}

/** Columns aligned by spaces, numbers to the right; no borders, so that lines can be cut and compared. */
export function table(headers: readonly string[], rows: readonly (readonly string[])[]): string {
  const numeric = headers.map((_, i) =>
    rows.every((row) => /^(-|[0-9][0-9.,]*( ([KMGTP]i)?B)?)$/.test(row[i] ?? '')),
  );
  const widths = headers.map((header, i) =>
    Math.max(header.length, ...rows.map((row) => (row[i] ?? '').length)),
  );
  const line = (cells: readonly string[]): string =>
    cells
      .map((cell, i) => (numeric[i] === true ? cell.padStart(widths[i] ?? 0) : cell.padEnd(widths[i] ?? 0)))
      .join('  ')
      .trimEnd();
  return [bold(line(headers)), ...rows.map(line)].join('\n');
}

/** "name: value" lines, values under each other. */
export function properties(pairs: readonly (readonly [string, string])[]): string {
  const width = Math.max(...pairs.map(([name]) => name.length)) + 1;
  return pairs.map(([name, value]) => `${bold(`${name}:`.padEnd(width))} ${value}`.trimEnd()).join('\n');
}

function styled(style: Parameters<typeof styleText>[0], text: string): string {
  return process.stdout.isTTY && process.env['NO_COLOR'] === undefined ? styleText(style, text) : text;
}
export const bold = (text: string): string => styled('bold', text);
export const green = (text: string): string => styled('green', text);
export const red = (text: string): string => styled('red', text);
export const dim = (text: string): string => styled('dim', text);

const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];

/** 1610612736 → "1.5 GiB". */
export function formatBytes(bytes: bigint | string | number): string {
  let value = Number(bytes);
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || Number.isInteger(value) ? 0 : 1;
  return `${value.toFixed(digits)} ${units[unit]}`;
}

/** "10G", "512MiB", "4096" → bytes. Undefined when it is not a size. */
export function parseBytes(text: string): bigint | undefined {
  const match = /^(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?$/i.exec(text.trim());
  if (!match?.[1]) return undefined;
  const factor = 1024 ** ' KMGTP'.indexOf((match[2] ?? '').toUpperCase() || ' ');
  const bytes = Math.round(Number(match[1]) * factor);
  return Number.isSafeInteger(bytes) ? BigInt(bytes) : undefined;
}

/** How long ago: "3s", "5m", "2h", "4d"; "-" for never. */
export function age(unixMs: string | number | bigint, now = Date.now()): string {
  const then = Number(unixMs);
  if (then === 0) return '-';
  const seconds = Math.max(0, Math.round((now - then) / 1000));
  if (seconds < 120) return `${seconds}s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)}m`;
  if (seconds < 172_800) return `${Math.floor(seconds / 3600)}h`;
  return `${Math.floor(seconds / 86_400)}d`;
}

/** FENCING_CLASS_LEASE_ONLY → "lease-only"; the prefix is the enum's name. */
export function enumWord(prefix: string, value: string): string {
  return value.replace(`${prefix}_`, '').toLowerCase().replaceAll('_', '-');
}

/** Keys of a message as they are written in JSON here: camelCase, at every depth; maps of strings keep their keys. */
export function camelKeys(
  value: unknown,
  keepKeysOf: readonly string[] = ['parameters', 'mutable_parameters'],
): unknown {
  if (Array.isArray(value)) return value.map((item) => camelKeys(item, keepKeysOf));
  if (typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, item]) => [
      key.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase()),
      keepKeysOf.includes(key) ? item : camelKeys(item, keepKeysOf),
    ]),
  );
}
