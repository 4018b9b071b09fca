/**
 * Processes by identity: a pid alone may be somebody else's tomorrow, a pid with its start time never is. Also the FUSE
 * connections that a process serves, which have to be aborted before its callers can end.
 */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

export interface ProcessIdentity {
  pid: number;
  /** Field 22 of /proc/<pid>/stat: clock ticks after boot. */
  startTicks: string;
}

function statFields(pid: number): string[] | undefined {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'latin1');
    return text.slice(text.lastIndexOf(')') + 2).split(' ');
  } catch {
    return undefined;
  }
}

/** Undefined when there is no such process (a zombie counts as none). */
export function identify(pid: number): ProcessIdentity | undefined {
  const fields = statFields(pid);
  const [state] = fields ?? [];
  const startTicks = fields?.[19];
  if (state === undefined || state === 'Z' || state === 'X' || startTicks === undefined) return undefined;
  return { pid, startTicks };
}

export function isAlive(process: ProcessIdentity): boolean {
  return identify(process.pid)?.startTicks === process.startTicks;
}

/** True when the signal was sent to that very process. */
export function signal(target: ProcessIdentity, name: NodeJS.Signals): boolean {
  if (!isAlive(target)) return false;
  try {
    process.kill(target.pid, name);
    return true;
  } catch {
    return false;
  }
}

/** True when all were gone within `timeoutMs`. */
export async function waitGone(targets: readonly ProcessIdentity[], timeoutMs: number): Promise<boolean> {
  const deadline = Date.now() + timeoutMs;
  while (targets.some(isAlive)) {
    if (Date.now() > deadline) return false;
    await sleep(20);
  }
  return true;
}

/** The numbers of the FUSE connections that a process has open. */
export function fuseConnections(pid: number): string[] {
  const found = new Set<string>();
  try {
    for (const fd of readdirSync(`/proc/${pid}/fdinfo`)) {
      const text = readFileSync(`/proc/${pid}/fdinfo/${fd}`, 'utf8');
      const match = /^fuse_connection:\s*(\d+)$/m.exec(text);
      if (match?.[1] !== undefined) found.add(match[1]);
    }
  } catch {
    // it ended meanwhile
  }
  return [...found];
}

/** Every request of the connection fails from now on, so that nothing can hang on it. */
export function abortFuseConnection(connection: string): void {
  try {
    writeFileSync(`/sys/fs/fuse/connections/${connection}/abort`, '1');
  } catch {
    // gone already
  }
}
