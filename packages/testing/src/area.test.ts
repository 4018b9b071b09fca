import { existsSync, readFileSync } from 'node:fs';
import { basename } from 'node:path';
import { execa } from 'execa';
import { afterEach, describe, expect, it } from 'vitest';
import { TestArea } from './area.ts';
import { freePort, waitFor } from './wait.ts';

const backingFile = (device: string): string => {
  try {
    return readFileSync(`/sys/block/${basename(device)}/loop/backing_file`, 'utf8').trim();
  } catch {
    return '';
  }
};

describe('TestArea', () => {
  const areas: TestArea[] = [];
  const area = async (): Promise<TestArea> => {
    const made = await TestArea.create('area test');
    areas.push(made);
    return made;
  };
  afterEach(async () => {
    for (const made of areas.splice(0)) await made.dispose().catch(() => undefined);
  });

  it('takes away its loop devices, processes and directory', async () => {
    const a = await area();
    const loop = await a.loopDevice(1 << 20, { sectorSize: 4096 });
    const process = await a.spawn('sleeper', 'sleep', ['1000']);
    expect(backingFile(loop.path)).toBe(loop.file);
    await a.dispose();
    expect(backingFile(loop.path)).not.toBe(loop.file);
    expect(existsSync(`/proc/${process.pid}`)).toBe(false);
    expect(existsSync(a.dir)).toBe(false);
  });

  it('fails, and cleans up all the same, when a test leaves a mount or a loop device behind', async () => {
    const a = await area();
    await execa('mkdir', [a.path('with space')]);
    await execa('mount', ['-t', 'tmpfs', 'none', a.path('with space')]);
    await execa('truncate', ['-s', '1M', a.path('img')]);
    const { stdout: device } = await execa('losetup', ['--find', '--show', a.path('img')]);
    await expect(a.dispose()).rejects.toThrow(/with space[\s\S]*loop device/);
    expect(readFileSync('/proc/self/mountinfo', 'utf8')).not.toContain(basename(a.dir));
    expect(backingFile(device)).not.toBe(a.path('img'));
  });

  it('is cleaned up by its watchdog when the test process is killed', async () => {
    const a = await area();
    const script = a.path('victim.sh');
    await execa('bash', ['-c', `cat > "$0" && chmod +x "$0"`, script], {
      input: `bash '${new URL('../sweep.sh', import.meta.url).pathname}' --watch "$1" < <(sleep 1000 & echo $! > "$2"; wait) &\nwait\n`,
    });
    const inner = await TestArea.create('inner');
    areas.push(inner);
    await execa('mkdir', [inner.path('mnt')]);
    await execa('mount', ['-t', 'tmpfs', 'none', inner.path('mnt')]);
    const pidFile = a.path('pid');
    await a.spawn('victim', 'bash', [script, inner.dir, pidFile]);
    const pid = await waitFor('the pid', () => existsSync(pidFile) && Number(readFileSync(pidFile, 'utf8')));
    expect(readFileSync('/proc/self/mountinfo', 'utf8')).toContain(inner.path('mnt'));
    process.kill(pid, 'SIGKILL');
    await waitFor('the directory to go', () => !existsSync(inner.dir));
    expect(readFileSync('/proc/self/mountinfo', 'utf8')).not.toContain(inner.path('mnt'));
  });

  it('finds ports that can be listened on', async () => {
    const ports = await Promise.all([freePort(), freePort()]);
    for (const port of ports) expect(port).toBeGreaterThan(0);
  });
});
