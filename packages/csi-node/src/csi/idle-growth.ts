/**
 * Growing ext4 where the kernel refuses to do it online. EXT4_IOC_RESIZE_FS asks for CAP_SYS_RESOURCE; a container or a
 * virtual machine may run without it, and then nothing that this process can do grows a mounted ext4. What is left is to
 * unmount it for a moment, which is possible only while no file of it is open.
 *
 * While it is away, an empty read-only tmpfs covers each mount point: who writes by path meanwhile gets an error instead of
 * a file beside the volume. The record says that this is under way, so a repeated call puts back what a killed one took.
 */
import { HoldfastError, splitMountFlags } from '@holdfast/common';
import { claimDevice } from '../mount/claim.ts';
import { checkBeforeMount, growUnmounted } from '../mount/filesystem.ts';
import { bindMount, mountDevice, mountGuard, unmountAll } from '../mount/mounter.ts';
import { deviceNumber, deviceUnder, mountsAt, readMounts } from '../mount/mountinfo.ts';
import { said } from '../mount/run.ts';
import type { Step } from '../mount/step.ts';
import type { VolumeRecord, VolumeRecords } from './records.ts';

const inUse = (volumeId: string, why: string): HoldfastError =>
  new HoldfastError(
    'FAILED_PRECONDITION',
    `The ext4 file system of volume ${volumeId} has to be unmounted to grow, because this process lacks CAP_SYS_RESOURCE, and it is in use (${why}). ` +
      'Give csi-node that capability, or stop the workload: the file system grows when the volume is staged again. The volume itself has its new size.',
  );

export class IdleGrowth {
  readonly #records: VolumeRecords;
  readonly #step: Step;

  constructor(records: VolumeRecords, step: Step) {
    this.#records = records;
    this.#step = step;
  }

  /** Idempotent; also finishes what a killed call began. @throws FAILED_PRECONDITION while it is in use; it stays mounted then. */
  async grow(volumeUuid: string, record: VolumeRecord, device: string): Promise<void> {
    const targets = Object.keys(record.published);
    await this.#records.put(volumeUuid, { ...record, growing: true });
    await this.#step('grow:recorded');
    try {
      await this.#takeAway(record, targets, device);
      await checkBeforeMount(device, 'ext4', true);
      await growUnmounted(device);
      await this.#step('grow:grown');
    } finally {
      await this.#putBack(record, device);
    }
    await this.#records.put(volumeUuid, { ...record, growing: false });
  }

  async #takeAway(record: VolumeRecord, targets: readonly string[], device: string): Promise<void> {
    const number = await deviceNumber(device);
    const known = new Set([...targets, record.stagingPath]);
    for (const entry of await readMounts()) {
      if ((await deviceUnder(entry)) === number && !known.has(entry.mountPoint)) {
        throw inUse(record.volumeId, `it is mounted at ${entry.mountPoint} too`);
      }
    }
    for (const path of [...targets, record.stagingPath]) {
      try {
        await unmountAll(path);
      } catch (error) {
        throw inUse(record.volumeId, error instanceof Error ? error.message : String(error));
      }
      await mountGuard(path);
      await this.#step('grow:covered');
    }
    // Refused while another mount namespace, a container's, still has it mounted.
    const claim = await claimDevice(device).catch((error: Error) => {
      throw inUse(record.volumeId, error.message);
    });
    await claim.close();
  }

  /** Every mount point shows the volume again. Does nothing where it does already. */
  async #putBack(record: VolumeRecord, device: string): Promise<void> {
    const number = await deviceNumber(device);
    const shows = async (path: string): Promise<boolean> => {
      const top = mountsAt(await readMounts(), path).at(-1);
      return top !== undefined && (await deviceUnder(top)) === number;
    };
    if (!(await shows(record.stagingPath))) {
      await unmountAll(record.stagingPath);
      const flags = splitMountFlags(record.capability.mountFlags);
      const mounted = await mountDevice(device, record.stagingPath, 'ext4', flags);
      if (mounted.exitCode !== 0) {
        throw new HoldfastError(
          'INTERNAL',
          `Volume ${record.volumeId} could not be mounted again after it had grown (${said(mounted)}). Repeat the call.`,
        );
      }
      await this.#step('grow:mounted');
    }
    for (const [path, publication] of Object.entries(record.published)) {
      if (!publication.complete || (await shows(path))) continue;
      await unmountAll(path);
      await bindMount(record.stagingPath, path, publication.readOnly);
      await this.#step('grow:bound');
    }
  }
}
