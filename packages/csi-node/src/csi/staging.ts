/** Stage and unstage: from a published volume to a mounted file system (or an open block device), and back. */
import {
  DEFAULT_FILE_SYSTEM,
  fileSystemNamed,
  fileSystems,
  HoldfastError,
  isReaderMode,
  parseVolumeContext,
  PUBLISH_ID,
  PUBLISH_READ_ONLY,
  readMkfsOptions,
  splitMountFlags,
  volumeParameterKeys,
  type CallContext,
  type Capability,
  type FileSystem,
  type Logger,
  type VolumeHandle,
} from '@holdfast/common';
import { join } from 'node:path';
import {
  besideCopies,
  checkBeforeMount,
  explainFailedMount,
  fileSystemSize,
  grow,
  growUnmounted,
  needsReplay,
  readOnlyOptions,
} from '../mount/filesystem.ts';
import { format } from '../mount/format.ts';
import { GUARD, lookAt, makeDirectory, mountDevice, unmountAll } from '../mount/mounter.ts';
import { deviceNumber, deviceUnder, mountsAt, readMounts, type MountEntry } from '../mount/mountinfo.ts';
import { deviceSize, probe } from '../mount/probe.ts';
import { said } from '../mount/run.ts';
import type { Step } from '../mount/step.ts';
import type { AgentApi } from './agent-client.ts';
import { sameCapability, type VolumeRecord, type VolumeRecords } from './records.ts';

export interface StageRequest {
  readonly volumeId: string;
  readonly handle: VolumeHandle;
  readonly stagingPath: string;
  readonly capability: Capability;
  readonly publishContext: Readonly<Record<string, string>>;
  readonly volumeContext: Readonly<Record<string, string>>;
}

export interface StagingOptions {
  readonly agent: AgentApi;
  readonly records: VolumeRecords;
  readonly stateDir: string;
  readonly logger: Logger;
  readonly step: Step;
}

/** Below the state directory: images of file systems that are being made. */
export const MKFS_DIR = 'mkfs';

/** Sizes grow in steps of a MiB; what mkfs leaves unused at the end is less. */
const GROW_FROM = 1n << 20n;

/** States of the agent's volume in which its device answers EIO for good. */
const isDead = (state: string): boolean => state === 'revoked' || state === 'fenced';

/** The mounted file system went read-only by itself after an I/O error. */
export const wentReadOnly = (entry: MountEntry): boolean =>
  entry.superOptions.some((option) => ['emergency_ro', 'shutdown'].includes(option)) ||
  (entry.superOptions.includes('ro') && entry.options.includes('rw'));

export class Staging {
  readonly #options: StagingOptions;

  constructor(options: StagingOptions) {
    this.#options = options;
  }

  /** Idempotent. @returns the volume's device. */
  async stage(request: StageRequest, context: CallContext): Promise<string> {
    const { agent, records, step } = this.#options;
    const { volumeUuid, poolUuid } = request.handle;
    const publishId = request.publishContext[PUBLISH_ID] ?? '';
    if (publishId === '') {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `publish_context has no "${PUBLISH_ID}". Publish the volume to this node and pass on what that answers.`,
      );
    }
    const wanted = this.#wantedFileSystem(request);
    const readOnly =
      request.publishContext[PUBLISH_READ_ONLY] === 'true' || isReaderMode(request.capability.mode);
    const record = await records.get(volumeUuid);
    if (record !== undefined && record.stagingPath !== request.stagingPath)
      await this.#refuseSecondPath(request, record);

    await this.#clearDead(request, record, context);
    const opened = await agent.openVolume(
      { pool_uuid: poolUuid, volume_uuid: volumeUuid, publish_id: publishId, read_only: readOnly },
      context,
    );
    const device = opened.device_path;
    await step('stage:opened');

    const staged = await this.#standing(request, record, device, wanted);
    const now: VolumeRecord = {
      volumeId: request.volumeId,
      stagingPath: request.stagingPath,
      capability: request.capability,
      publishId,
      readOnly,
      ready: staged !== undefined && record?.ready === true,
      published: record?.published ?? {},
    };
    // Before anything is written or mounted: a repeated call then knows what this one was about.
    await records.put(volumeUuid, now);
    await step('stage:recorded');
    if (wanted !== undefined && staged === undefined) {
      await this.#mount(request, device, wanted, readOnly, context).catch((error: unknown) =>
        this.#explain(request, error, context),
      );
    } else if (
      wanted !== undefined &&
      wanted !== 'ext4' &&
      !now.ready &&
      !staged?.superOptions.includes('ro')
    ) {
      await grow(device, request.stagingPath, wanted);
    }
    if (!now.ready) await records.put(volumeUuid, { ...now, ready: true });
    return device;
  }

  /**
   * This volume's working mount at the staging path, if there is one; a broken one is taken away.
   * @throws ALREADY_EXISTS when it was staged with other arguments.
   */
  async #standing(
    request: StageRequest,
    record: VolumeRecord | undefined,
    device: string,
    wanted: FileSystem | undefined,
  ): Promise<MountEntry | undefined> {
    const staged = mountsAt(await readMounts(), request.stagingPath);
    const other = (what: string): HoldfastError =>
      new HoldfastError(
        'ALREADY_EXISTS',
        `Volume ${request.volumeId} is staged at ${request.stagingPath} ${what}. Unstage it, or stage it as it was.`,
      );
    const standsAsBlock = record?.ready === true && record.capability.accessType === 'block';
    if (staged.length === 0 && !standsAsBlock) return undefined;
    if (staged.length > 0 && !(await this.#isOurs(staged, device, request.stagingPath))) {
      await unmountAll(request.stagingPath, true);
      return undefined;
    }
    if (record?.ready === true && !sameCapability(record.capability, request.capability)) {
      throw other('with another capability');
    }
    const top = staged.at(-1);
    if (top !== undefined && top.fsType !== wanted) {
      throw other(`as ${top.fsType}, not as ${wanted ?? 'a block volume'}`);
    }
    return top;
  }

  /** Undefined for a block volume. */
  #wantedFileSystem(request: StageRequest): FileSystem | undefined {
    if (request.capability.accessType === 'block') return undefined;
    const made = parseVolumeContext(request.volumeContext)?.parameters[volumeParameterKeys.fsType];
    const asked = request.capability.fsType;
    const fromContext = made === undefined ? undefined : fileSystemNamed(made, 'The volume context');
    if (asked !== undefined && fromContext !== undefined && asked !== fromContext) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Volume ${request.volumeId} was made for ${fromContext}, and volume_capability asks for ${asked}. Correct fsType in the PersistentVolume.`,
      );
    }
    return asked ?? fromContext ?? DEFAULT_FILE_SYSTEM;
  }

  /** Another staging path is refused while the first is in use. */
  async #refuseSecondPath(request: StageRequest, record: VolumeRecord): Promise<void> {
    const mounts = await readMounts();
    const inUse =
      mountsAt(mounts, record.stagingPath).length > 0 ||
      Object.keys(record.published).some((target) => mountsAt(mounts, target).length > 0);
    if (inUse) {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `Volume ${request.volumeId} is staged at ${record.stagingPath}. Unstage it there first.`,
      );
    }
  }

  /** Whether the top mount is this volume's, works, and is the device that the agent has open now. */
  async #isOurs(staged: readonly MountEntry[], device: string, path: string): Promise<boolean> {
    const top = staged.at(-1);
    if (top === undefined || (await deviceUnder(top)) !== (await deviceNumber(device))) return false;
    if (wentReadOnly(top)) {
      const others = (await readMounts()).filter(
        (entry) => entry.device === top.device && entry.mountPoint !== path,
      );
      return others.length > 0;
    }
    return (await lookAt(path)) !== 'dead';
  }

  /**
   * Mounts of a device that answers EIO for good, or that is gone, make way.
   * @throws FAILED_PRECONDITION when what stands at the staging path was never this volume.
   */
  async #clearDead(
    request: StageRequest,
    record: VolumeRecord | undefined,
    context: CallContext,
  ): Promise<void> {
    const { agent } = this.#options;
    const open = await agent.openInfo(request.handle.volumeUuid, context);
    if (open !== undefined && isDead(open.state)) {
      await this.#unmountDevice(open.device_path, record);
      await agent.closeVolume(request.handle.volumeUuid, context);
    }
    const top = mountsAt(await readMounts(), request.stagingPath).at(-1);
    if (top === undefined) return;
    const alive = open === undefined ? undefined : await deviceNumber(open.device_path);
    if (alive !== undefined && (await deviceUnder(top)) === alive) return;
    await this.requireOurs(
      top,
      request.stagingPath,
      record?.stagingPath === request.stagingPath,
      request.volumeId,
    );
    this.#options.logger.warn(
      { volume: request.volumeId, stagingPath: request.stagingPath, state: open?.state ?? 'not open' },
      'A stale mount makes way for a new one',
    );
    for (const target of Object.keys(record?.published ?? {})) await unmountAll(target, true);
    await unmountAll(request.stagingPath, true);
  }

  /** Every mount of a dead device, wherever it is, and every bind of its node that was published. */
  async #unmountDevice(device: string, record: VolumeRecord | undefined): Promise<void> {
    const number = await deviceNumber(device);
    for (const entry of (await readMounts()).toReversed()) {
      if (number !== undefined && (await deviceUnder(entry)) === number)
        await unmountAll(entry.mountPoint, true);
    }
    if (record?.capability.accessType !== 'block') return;
    for (const target of Object.keys(record.published)) await unmountAll(target, true);
  }

  /**
   * A mount that is not the open device may only be taken away when we made it, or when it is dead anyway.
   * @throws FAILED_PRECONDITION
   */
  async requireOurs(top: MountEntry, path: string, recorded: boolean, volumeId: string): Promise<void> {
    if (recorded || top.source === GUARD || (await lookAt(path)) === 'dead') return;
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `${top.source} (${top.fsType}) is mounted at ${path}, and it is not volume ${volumeId}. Unmount it, or give another path.`,
    );
  }

  /** A volume that was taken away meanwhile fails in many ways; the reason is one. */
  async #explain(request: StageRequest, error: unknown, context: CallContext): Promise<never> {
    const open = await this.#options.agent
      .openInfo(request.handle.volumeUuid, context)
      .catch(() => undefined);
    if (open !== undefined && isDead(open.state)) {
      throw new HoldfastError(
        'FENCED',
        `Volume ${request.volumeId} was ${open.state} while it was staged: ${open.reason} Publish it to this node again, then stage it.`,
        { cause: error },
      );
    }
    throw error;
  }

  async #mount(
    request: StageRequest,
    device: string,
    wanted: FileSystem,
    readOnly: boolean,
    context: CallContext,
  ): Promise<void> {
    const { agent, step } = this.#options;
    const open = await agent.openInfo(request.handle.volumeUuid, context);
    if (open?.state === 'held') {
      throw new HoldfastError(
        'UNAVAILABLE',
        `I/O of volume ${request.volumeId} waits: ${open.reason} Repeat the call when the disk is back.`,
      );
    }
    const written = open === undefined ? undefined : BigInt(open.mapped_bytes);
    await this.#makeOrCheck(request, device, wanted, readOnly, written);
    await step('stage:checked');
    const writable = !readOnly && !splitMountFlags(request.capability.mountFlags).includes('ro');
    const room = (await deviceSize(device)) - (await fileSystemSize(device, wanted));
    const grows = writable && room >= GROW_FROM;
    if (grows && wanted === 'ext4') {
      // Unmounted it grows without any special right.
      await checkBeforeMount(device, wanted, true);
      await growUnmounted(device);
      await step('stage:grown');
    }
    const flags = splitMountFlags(request.capability.mountFlags);
    if (readOnly && flags.includes('rw')) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        'The mount option "rw" contradicts a read-only volume. Take it out of mountOptions in the StorageClass.',
      );
    }
    const options = [
      ...(readOnly ? [...flags.filter((flag) => flag !== 'ro'), ...readOnlyOptions[wanted]] : flags),
      ...besideCopies[wanted],
    ];
    await makeDirectory(request.stagingPath);
    const mounted = await mountDevice(device, request.stagingPath, wanted, options);
    if (mounted.exitCode !== 0) throw await explainFailedMount(device, wanted, said(mounted), flags);
    await step('stage:mounted');
    if (grows && wanted !== 'ext4') {
      await grow(device, request.stagingPath, wanted);
      await step('stage:grown');
    }
  }

  async #makeOrCheck(
    request: StageRequest,
    device: string,
    wanted: FileSystem,
    readOnly: boolean,
    writtenBytes: bigint | undefined,
  ): Promise<void> {
    const { stateDir, step } = this.#options;
    const content = await probe(device, writtenBytes);
    if (content.kind === 'foreign') {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `Volume ${request.volumeId} holds ${content.what}, so no file system is made on it. Use it as a block volume, or copy the data elsewhere and make a new volume.`,
      );
    }
    if (content.kind === 'file-system') {
      if (content.fsType !== wanted) {
        const known = fileSystems.find((name) => name === content.fsType);
        throw new HoldfastError(
          'FAILED_PRECONDITION',
          `Volume ${request.volumeId} holds ${content.fsType}, and ${wanted} was asked for. ` +
            (known === undefined
              ? 'Use it as a block volume.'
              : `Set fsType to ${known} in the PersistentVolume; nothing is made over data.`),
        );
      }
      if (!readOnly) await checkBeforeMount(device, wanted);
      else if (await needsReplay(device, wanted)) this.#withoutReplay(request);
      return;
    }
    if (readOnly) {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `Volume ${request.volumeId} has no file system yet and is published read-only. Publish it writable once.`,
      );
    }
    const options =
      parseVolumeContext(request.volumeContext)?.parameters[volumeParameterKeys.mkfsOptions] ?? '';
    await format(
      {
        device,
        sizeBytes: await deviceSize(device),
        fsType: wanted,
        mkfsOptions: readMkfsOptions(options),
        volumeId: request.volumeId,
        workDir: join(stateDir, MKFS_DIR),
        step,
      },
      content.kind === 'half-formatted',
    );
  }

  /**
   * Many readers have no writer that could replay the journal, now or later, so they see the file system as it was cut: as a
   * quiesced snapshot it is whole. One reader alone can be staged writable before.
   */
  #withoutReplay(request: StageRequest): void {
    if (request.capability.mode !== 'MULTI_NODE_READER_ONLY') {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `The journal of volume ${request.volumeId} has to be replayed, which a read-only publication can't do. Publish it writable once, then read-only.`,
      );
    }
    this.#options.logger.warn(
      { volume: request.volumeId },
      'Mounted for readers without replaying its journal: what was not in its place when the snapshot was cut is missing. Snapshots taken with holdfast.io/quiesce lack nothing.',
    );
  }

  /** Idempotent; a volume that is staged elsewhere, or not at all, is left alone. */
  async unstage(
    volumeId: string,
    handle: VolumeHandle,
    stagingPath: string,
    context: CallContext,
  ): Promise<void> {
    const { agent, records, step } = this.#options;
    const record = await records.get(handle.volumeUuid);
    const mounts = await readMounts();
    if (
      record !== undefined &&
      record.stagingPath !== stagingPath &&
      mountsAt(mounts, stagingPath).length === 0
    )
      return;
    const targets = Object.keys(record?.published ?? {}).filter(
      (target) => mountsAt(mounts, target).length > 0,
    );
    const open = await agent.openInfo(handle.volumeUuid, context);
    const dead = open === undefined || isDead(open.state);
    if (targets.length > 0 && !dead) {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `Volume ${volumeId} is still published at ${targets.join(', ')}. Unpublish it there first.`,
      );
    }
    const top = mountsAt(mounts, stagingPath).at(-1);
    if (top !== undefined) {
      const device = open === undefined ? undefined : await deviceNumber(open.device_path);
      const ours =
        record?.stagingPath === stagingPath || (device !== undefined && (await deviceUnder(top)) === device);
      await this.requireOurs(top, stagingPath, ours, volumeId);
    }
    for (const target of targets) await unmountAll(target, true);
    await unmountAll(stagingPath, dead);
    await step('unstage:unmounted');
    await agent.closeVolume(handle.volumeUuid, context);
    await step('unstage:closed');
    await records.remove(handle.volumeUuid);
  }
}
