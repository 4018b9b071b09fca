import { spawn } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { identify, isAlive, signal, waitGone } from './processes.ts';

describe('process identity', () => {
  it('knows a living process, and a dead one as gone', async () => {
    const child = spawn('sleep', ['60'], { stdio: 'ignore' });
    const identity = identify(child.pid ?? 0);
    expect(identity?.pid).toBe(child.pid);
    if (identity === undefined) return;
    expect(isAlive(identity)).toBe(true);
    expect(signal(identity, 'SIGKILL')).toBe(true);
    expect(await waitGone([identity], 5000)).toBe(true);
    expect(signal(identity, 'SIGKILL')).toBe(false);
  });

  it('takes a reused pid for another process', () => {
    const identity = identify(process.pid);
    expect(identity).toBeDefined();
    expect(isAlive({ pid: process.pid, startTicks: '1' })).toBe(false);
    expect(signal({ pid: process.pid, startTicks: '1' }, 'SIGTERM')).toBe(false);
  });
});
