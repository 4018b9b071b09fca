/**
 * Exclusive claims on a block device (mount, fsck, O_EXCL) may fail for a moment only: who looks for a free loop device
 * claims each one that it tries, and what scans new devices opens them.
 */
import { constants, open, type FileHandle } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';

const TRIES = 5;
const PAUSE_MS = 100;

/** Repeats `attempt` while `isBusy` says of its outcome that the device was claimed. */
export async function whileBusy<T>(attempt: () => Promise<T>, isBusy: (outcome: T) => boolean): Promise<T> {
  let outcome = await attempt();
  for (let again = 0; again < TRIES && isBusy(outcome); again++) {
    await sleep(PAUSE_MS);
    outcome = await attempt();
  }
  return outcome;
}

/** Opens for writing; nobody else may have the device mounted or claimed until it is closed. @throws EBUSY */
export async function claimDevice(device: string): Promise<FileHandle> {
  const opened = await whileBusy<FileHandle | NodeJS.ErrnoException>(
    () => open(device, constants.O_RDWR | constants.O_EXCL).catch((error: NodeJS.ErrnoException) => error),
    (outcome) => outcome instanceof Error && outcome.code === 'EBUSY',
  );
  if (opened instanceof Error) throw opened;
  return opened;
}
