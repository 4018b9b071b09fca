/** NodeExpandVolume: the device takes the volume's new size, then a mounted file system grows into it. */
import { fileSystems, HoldfastError, type CallContext, type VolumeHandle } from '@holdfast/common';
import type { Csi } from '@holdfast/proto';
import { grow } from '../mount/filesystem.ts';
import { deviceNumber, deviceUnder, mountsAt, readMounts } from '../mount/mountinfo.ts';
import type { Step } from '../mount/step.ts';
import type { AgentApi } from './agent-client.ts';
import { IdleGrowth } from './idle-growth.ts';
import type { VolumeRecords } from './records.ts';

export interface ExpansionOptions {
  readonly agent: AgentApi;
  readonly records: VolumeRecords;
  readonly step: Step;
}

export async function expandVolume(
  { agent, records, step }: ExpansionOptions,
  handle: VolumeHandle,
  path: string,
  range: Csi.CapacityRange__Output | null,
  context: CallContext,
): Promise<Csi.NodeExpandVolumeResponse> {
  const required = BigInt(range?.required_bytes ?? 0);
  const limit = BigInt(range?.limit_bytes ?? 0);
  if (required < 0n || limit < 0n || (limit > 0n && required > limit)) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `capacity_range asks for at least ${required} and at most ${limit} bytes. Correct it.`,
    );
  }
  const idle = new IdleGrowth(records, step);
  const record = await records.get(handle.volumeUuid);
  const open = await agent.openInfo(handle.volumeUuid, context);
  const device = open === undefined ? undefined : await deviceNumber(open.device_path);
  if (record?.growing === true && open !== undefined) {
    await idle.grow(handle.volumeUuid, record, open.device_path);
  }
  const top = mountsAt(await readMounts(), path).at(-1);
  const bound = await deviceNumber(path);
  const isBlock = bound !== undefined && bound === device;
  const isMount = top !== undefined && device !== undefined && (await deviceUnder(top)) === device;
  if (open === undefined || (!isBlock && !isMount)) {
    throw new HoldfastError(
      'NOT_FOUND',
      `Volume ${handle.volumeUuid} is not at ${path} on this node. Stage it (a block volume: publish it) first.`,
    );
  }
  const size = await agent.resizeVolume(handle.volumeUuid, required, context);
  if (size < required) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `Volume ${handle.volumeUuid} has ${size} bytes, and ${required} were asked for. Expand it at the controller first.`,
    );
  }
  if (limit > 0n && size > limit) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `Volume ${handle.volumeUuid} has ${size} bytes already, more than the limit of ${limit}. Volumes never shrink.`,
    );
  }
  if (isMount && !isBlock) {
    const fsType = fileSystems.find((name) => name === top.fsType);
    if (fsType === undefined || top.superOptions.includes('ro')) {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `The ${top.fsType} file system of volume ${handle.volumeUuid} is mounted read-only and can't grow. It grows when the volume is staged writable.`,
      );
    }
    if ((await grow(open.device_path, path, fsType)) === 'needs-unmount') {
      if (record === undefined) {
        throw new HoldfastError(
          'FAILED_PRECONDITION',
          `The ext4 file system of volume ${handle.volumeUuid} can't grow while it is mounted, because this process lacks CAP_SYS_RESOURCE. Stage the volume again; it grows then.`,
        );
      }
      await idle.grow(handle.volumeUuid, record, open.device_path);
    }
  }
  return { capacity_bytes: size.toString() };
}
