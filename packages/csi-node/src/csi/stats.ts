/** NodeGetVolumeStats: usage of a mounted file system or the size of a block device, and the volume's condition. */
import { HoldfastError, type CallContext, type VolumeHandle } from '@holdfast/common';
import type { Csi, OpenVolumeInfo__Output } from '@holdfast/proto';
import { usageOf, type Usage } from '../mount/mounter.ts';
import { deviceNumber, deviceUnder, mountsAt, readMounts, type MountEntry } from '../mount/mountinfo.ts';
import { deviceSize } from '../mount/probe.ts';
import type { AgentApi } from './agent-client.ts';
import type { VolumeRecords } from './records.ts';
import { wentReadOnly } from './staging.ts';

function conditionOf(open: OpenVolumeInfo__Output, mount: MountEntry | undefined): Csi.VolumeCondition {
  const abnormal = (message: string): Csi.VolumeCondition => ({ abnormal: true, message });
  if (open.state === 'held') return abnormal(`I/O waits: ${open.reason}`);
  if (open.state !== 'open') return abnormal(`The volume is ${open.state}: ${open.reason}`);
  if (mount !== undefined && wentReadOnly(mount)) {
    return abnormal(
      'The file system went read-only after an I/O error. Stop the workload; staging the volume again checks and mounts it anew.',
    );
  }
  return { abnormal: false, message: 'The volume is in order.' };
}

const toUsage = (usage: Usage, unit: 'BYTES' | 'INODES'): Csi.VolumeUsage => ({
  unit,
  total: usage.total.toString(),
  used: usage.used.toString(),
  available: usage.available.toString(),
});

export async function volumeStats(
  agent: AgentApi,
  records: VolumeRecords,
  handle: VolumeHandle,
  path: string,
  context: CallContext,
): Promise<Csi.NodeGetVolumeStatsResponse> {
  const notHere = (): HoldfastError =>
    new HoldfastError(
      'NOT_FOUND',
      `Volume ${handle.volumeUuid} is not mounted at ${path} on this node. Stage and publish it first.`,
    );
  const top = mountsAt(await readMounts(), path).at(-1);
  const open = await agent.openInfo(handle.volumeUuid, context);
  const record = await records.get(handle.volumeUuid);
  if (open === undefined) {
    if (top === undefined || (record?.stagingPath !== path && record?.published[path] === undefined))
      throw notHere();
    return {
      volume_condition: {
        abnormal: true,
        message:
          'The volume is mounted, but this node has it open no more. Stop the workload and stage the volume again.',
      },
    };
  }
  const device = await deviceNumber(open.device_path);
  const bound = await deviceNumber(path);
  if (bound !== undefined) {
    if (bound !== device) throw notHere();
    return {
      usage: [{ unit: 'BYTES', total: (await deviceSize(open.device_path)).toString() }],
      volume_condition: conditionOf(open, undefined),
    };
  }
  if (top === undefined) throw notHere();
  if ((await deviceUnder(top)) !== device) throw notHere();
  const condition = conditionOf(open, top);
  // A dead file system has no usage, and one whose I/O waits may not answer.
  if (open.state !== 'open') return { volume_condition: condition };
  const usage = await usageOf(path);
  return {
    usage: [toUsage(usage.bytes, 'BYTES'), toUsage(usage.inodes, 'INODES')],
    volume_condition: condition,
  };
}
