/** Quiescing on a real ext4 over a loop device: what is frozen is thawed again, whatever happens. */
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { createLogger } from '@holdfast/common';
import { TestArea, waitFor } from '@holdfast/testing';
import { execa } from 'execa';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { FsFreezer } from '../../src/agent/freeze.ts';

const logger = createLogger('test');
logger.level = 'silent';

describe('FsFreezer', () => {
  let area: TestArea;
  let device: string;
  let mountPoint: string;
  let list: string;
  beforeEach(async () => {
    area = await TestArea.create('freeze');
    device = (await area.loopDevice(64 << 20)).path;
    mountPoint = area.path('mnt');
    list = area.path('state', 'frozen.json');
    await mkdir(mountPoint);
    await execa('mkfs.ext4', ['-q', device]);
    await execa('mount', [device, mountPoint]);
    area.onDispose(async () => {
      await execa('fsfreeze', ['-u', mountPoint], { reject: false });
      await execa('umount', [mountPoint], { reject: false });
    });
  });
  afterEach(() => area.dispose());

  /** A write by a process of its own: a frozen file system blocks it, and nothing of this process. */
  const write = (name: string) => {
    const writing = execa('dd', [
      'if=/dev/zero',
      `of=${mountPoint}/${name}`,
      'bs=4k',
      'count=1',
      'status=none',
    ]);
    let done = false;
    void writing.then(() => {
      done = true;
    });
    return { writing, isDone: () => done };
  };
  const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

  it('keeps writers waiting until it is thawed, and notes what is frozen while it is', async () => {
    const freezer = new FsFreezer(list, logger);
    const frozen = await freezer.freeze(device, 10_000);
    expect(frozen.holds).toBe(true);
    expect(JSON.parse(readFileSync(list, 'utf8'))).toMatchObject({ frozen: [{ mountPoint }] });
    const { writing, isDone } = write('a');
    await pause(300);
    expect(isDone()).toBe(false);
    await frozen.thaw();
    await frozen.thaw();
    await writing;
    expect(frozen.holds).toBe(false);
    expect(JSON.parse(readFileSync(list, 'utf8'))).toMatchObject({ frozen: [] });
  });

  it('thaws by itself when its time is over', async () => {
    const frozen = await new FsFreezer(list, logger).freeze(device, 300);
    await write('a').writing;
    expect(frozen.holds).toBe(false);
  });

  it('thaws what a killed agent left, and leaves another file system at that place alone', async () => {
    await execa('fsfreeze', ['-f', mountPoint]);
    const note = async (number: string): Promise<void> => {
      await mkdir(area.path('state'), { recursive: true });
      writeFileSync(list, JSON.stringify({ version: 1, frozen: [{ mountPoint, device: number }] }));
    };
    await note('99:99');
    await new FsFreezer(list, logger).thawLeftOver();
    const { writing, isDone } = write('a');
    await pause(300);
    expect(isDone()).toBe(false);
    const { stdout: number } = await execa('findmnt', ['-n', '-o', 'MAJ:MIN', mountPoint]);
    await note(number.trim());
    await new FsFreezer(list, logger).thawLeftOver();
    await writing;
    // Not frozen at all is fine too.
    await note(number.trim());
    await new FsFreezer(list, logger).thawLeftOver();
  });

  it('refuses what somebody else has frozen, and does not thaw it', async () => {
    await execa('fsfreeze', ['-f', mountPoint]);
    await expect(new FsFreezer(list, logger).freeze(device, 1000)).rejects.toMatchObject({
      code: 'FAILED_PRECONDITION',
    });
    const { writing, isDone } = write('a');
    await pause(300);
    expect(isDone()).toBe(false);
    await execa('fsfreeze', ['-u', mountPoint]);
    await writing;
  });

  it('has nothing to freeze on a device that is not mounted or not there, and refuses a mount that it can not see', async () => {
    const freezer = new FsFreezer(list, logger);
    expect((await freezer.freeze('/dev/nowhere', 1000)).holds).toBe(true);
    await execa('umount', [mountPoint]);
    expect((await freezer.freeze(device, 1000)).holds).toBe(true);
    expect(existsSync(list)).toBe(false);
    const elsewhere = await area.spawn('elsewhere', 'unshare', [
      '--mount',
      '--propagation',
      'private',
      'bash',
      '-c',
      `mount ${device} ${mountPoint} && touch ${area.path('mounted')} && exec sleep 60`,
    ]);
    await waitFor('the hidden mount', () => (existsSync(area.path('mounted')) ? true : undefined));
    await expect(freezer.freeze(device, 1000)).rejects.toMatchObject({
      code: 'FAILED_PRECONDITION',
      message: expect.stringMatching(/sees no mount of it/) as unknown,
    });
    await elsewhere.stop('SIGKILL');
  });
});
