import { describe, expect, it } from 'vitest';
import { run, said } from './run.ts';

describe('run', () => {
  it('gives the exit code and output of a program, whatever they are', async () => {
    const ran = await run('sh', ['-c', 'echo out; echo one >&2; echo two >&2; exit 3'], 5000);
    expect(ran).toEqual({ exitCode: 3, stdout: 'out', stderr: 'one\ntwo' });
    expect(said(ran)).toBe('exit code 3: one; two');
  });

  it('never lets a shell see the arguments', async () => {
    expect((await run('echo', ['$(id)', ';', '`x`'], 5000)).stdout).toBe('$(id) ; `x`');
  });

  it('ends what takes too long', async () => {
    const started = performance.now();
    await expect(run('sleep', ['60'], 200)).rejects.toMatchObject({
      code: 'INTERNAL',
      message: expect.stringMatching(/"sleep 60" was still running after 0.2 s/) as unknown,
    });
    expect(performance.now() - started).toBeLessThan(5000);
  });

  it('names the package of a program that is not installed', async () => {
    await expect(run('xfs_nothing', [], 1000)).rejects.toThrow(
      /xfs_nothing is not installed.*apt-get install/,
    );
  });

  it('does not take an end by a signal for an exit code', async () => {
    await expect(run('sh', ['-c', 'kill -9 $$'], 5000)).rejects.toThrow(/did not end by itself/);
  });
});
