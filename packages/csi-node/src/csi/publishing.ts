/** Publish and unpublish: bind mounts of the staged file system, or of the device node, where a workload expects them. */
import {
  HoldfastError,
  isReaderMode,
  type AccessModeName,
  type CallContext,
  type Capability,
  type Logger,
  type VolumeHandle,
} from '@holdfast/common';
import {
  bindMount,
  lookAt,
  makeDirectory,
  makeTargetFile,
  removeTarget,
  unmountAll,
} from '../mount/mounter.ts';
import { deviceNumber, deviceUnder, mountsAt, readMounts, type MountEntry } from '../mount/mountinfo.ts';
import type { Step } from '../mount/step.ts';
import type { AgentApi } from './agent-client.ts';
import { sameCapability, type VolumeRecord, type VolumeRecords } from './records.ts';
import type { StageRequest, Staging } from './staging.ts';

const manyTargets: readonly AccessModeName[] = ['SINGLE_NODE_MULTI_WRITER', 'MULTI_NODE_READER_ONLY'];

export interface PublishRequest extends StageRequest {
  readonly targetPath: string;
  readonly readOnly: boolean;
}

export interface PublishingOptions {
  readonly agent: AgentApi;
  readonly records: VolumeRecords;
  readonly staging: Staging;
  readonly logger: Logger;
  readonly step: Step;
}

export class Publishing {
  readonly #options: PublishingOptions;

  constructor(options: PublishingOptions) {
    this.#options = options;
  }

  async publish(request: PublishRequest, context: CallContext): Promise<void> {
    const { records, step } = this.#options;
    const { volumeUuid } = request.handle;
    const device = await this.#stagedDevice(request, context);
    const record = await records.get(volumeUuid);
    const mounts = await readMounts();
    const before = record?.published[request.targetPath];
    const standing = mountsAt(mounts, request.targetPath);
    if (standing.length > 0) {
      if (!(await this.#shows(standing, device, request))) {
        await this.#clear(standing, request);
      } else if (before === undefined || before.complete) {
        const readOnly = standing.at(-1)?.options.includes('ro') === true;
        const same =
          (before === undefined || sameCapability(before.capability, request.capability)) &&
          (before?.readOnly ?? readOnly) === request.readOnly;
        if (same) return;
        throw new HoldfastError(
          'ALREADY_EXISTS',
          `Volume ${request.volumeId} is published at ${request.targetPath} with other arguments. Unpublish it there first.`,
        );
      } else {
        // Cut off between the bind mount and its record: what stands may lack a flag.
        await unmountAll(request.targetPath, false);
      }
    }
    this.#refuseSecondTarget(request, record, mounts);
    // A mount point that says "writable" over a read-only file system would look like one that failed.
    const bindReadOnly =
      request.readOnly || record?.readOnly === true || isReaderMode(request.capability.mode);
    await this.#record(request, record, false);
    await step('publish:recorded');
    if (request.capability.accessType === 'block') {
      await makeTargetFile(request.targetPath);
      await step('publish:target-made');
      await bindMount(device, request.targetPath, bindReadOnly);
    } else {
      await makeDirectory(request.targetPath);
      await step('publish:target-made');
      await bindMount(request.stagingPath, request.targetPath, bindReadOnly);
    }
    await step('publish:bound');
    await this.#record(request, record, true);
  }

  /** @throws FAILED_PRECONDITION when it is not staged here as this request says; a stale stage is made anew. */
  async #stagedDevice(request: PublishRequest, context: CallContext): Promise<string> {
    const { agent, records, staging } = this.#options;
    const record = await records.get(request.handle.volumeUuid);
    const staged = mountsAt(await readMounts(), request.stagingPath);
    const open = await agent.openInfo(request.handle.volumeUuid, context);
    const usable = open !== undefined && (open.state === 'open' || open.state === 'held');
    if (record !== undefined && record.stagingPath === request.stagingPath) {
      this.#compareWithStaged(request, record);
    } else if (staged.length === 0 && !(usable && request.capability.accessType === 'block')) {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `Volume ${request.volumeId} is not staged at ${request.stagingPath}. Stage it first.`,
      );
    }
    if (usable && request.capability.accessType === 'block') return open.device_path;
    if (usable && staged.length > 0) {
      const same =
        (await deviceUnder(staged.at(-1) as MountEntry)) === (await deviceNumber(open.device_path));
      if (same && (open.state === 'held' || (await lookAt(request.stagingPath)) !== 'dead'))
        return open.device_path;
    }
    // The device died, or was exported anew, under a stage that once was complete.
    return staging.stage(request, context);
  }

  #compareWithStaged(request: PublishRequest, record: VolumeRecord): void {
    const staged: Capability = record.capability;
    const { accessType, fsType } = request.capability;
    if (accessType !== staged.accessType || (fsType ?? staged.fsType) !== (staged.fsType ?? fsType)) {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `Volume ${request.volumeId} is staged as ${staged.fsType ?? staged.accessType}, not as ${fsType ?? accessType}. Unstage it and stage it as it shall be published.`,
      );
    }
  }

  /** Whether what stands at the target is this volume, alive. */
  async #shows(standing: readonly MountEntry[], device: string, request: PublishRequest): Promise<boolean> {
    const number = await deviceNumber(device);
    if (request.capability.accessType === 'block') {
      return number !== undefined && (await deviceNumber(request.targetPath)) === number;
    }
    return (
      (await deviceUnder(standing.at(-1) as MountEntry)) === number &&
      (await lookAt(request.targetPath)) !== 'dead'
    );
  }

  /** Takes a dead mount away; somebody else's living one is refused. */
  async #clear(standing: readonly MountEntry[], request: PublishRequest): Promise<void> {
    const top = standing.at(-1) as MountEntry;
    const known = (await this.#options.records.get(request.handle.volumeUuid))?.published[request.targetPath];
    await this.#options.staging.requireOurs(top, request.targetPath, known !== undefined, request.volumeId);
    this.#options.logger.warn(
      { volume: request.volumeId, target: request.targetPath },
      'A stale mount at the target makes way for a new one',
    );
    await unmountAll(request.targetPath, true);
  }

  /** The specification's table: only SINGLE_NODE_MULTI_WRITER and the modes of several nodes may have several targets. */
  #refuseSecondTarget(
    request: PublishRequest,
    record: VolumeRecord | undefined,
    mounts: readonly MountEntry[],
  ): void {
    const others = Object.entries(record?.published ?? {}).filter(
      ([target]) => target !== request.targetPath && mountsAt(mounts, target).length > 0,
    );
    const alone = others.find(
      ([, publication]) =>
        !manyTargets.includes(publication.capability.mode) || !manyTargets.includes(request.capability.mode),
    );
    if (alone === undefined) return;
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Volume ${request.volumeId} is published at ${alone[0]} with access mode ${alone[1].capability.mode}, and ${request.targetPath} asks for ${request.capability.mode}. Only ${manyTargets.join(' and ')} allow several targets; unpublish the other first.`,
    );
  }

  async #record(request: PublishRequest, staged: VolumeRecord | undefined, complete: boolean): Promise<void> {
    const { records } = this.#options;
    const now = (await records.get(request.handle.volumeUuid)) ?? staged;
    await records.put(request.handle.volumeUuid, {
      volumeId: request.volumeId,
      stagingPath: request.stagingPath,
      capability: now?.capability ?? request.capability,
      publishId: now?.publishId ?? '',
      readOnly: now?.readOnly ?? false,
      ready: now?.ready ?? true,
      published: {
        ...now?.published,
        [request.targetPath]: { capability: request.capability, readOnly: request.readOnly, complete },
      },
    });
  }

  /** Idempotent: what is not there is fine. */
  async unpublish(handle: VolumeHandle, targetPath: string, context: CallContext): Promise<void> {
    const { agent, records, staging, step } = this.#options;
    const record = await records.get(handle.volumeUuid);
    const top = mountsAt(await readMounts(), targetPath).at(-1);
    if (top !== undefined) {
      // With the agent away a plain unmount is tried; only a volume that is known to be dead is unmounted lazily.
      const open = await agent.openInfo(handle.volumeUuid, context).catch(() => 'unknown' as const);
      const device =
        open === undefined || open === 'unknown' ? undefined : await deviceNumber(open.device_path);
      const shown = [await deviceUnder(top), await deviceNumber(targetPath)];
      const ours =
        record?.published[targetPath] !== undefined || (device !== undefined && shown.includes(device));
      await staging.requireOurs(top, targetPath, ours, handle.volumeUuid);
      const dead =
        open === undefined || (open !== 'unknown' && (open.state === 'revoked' || open.state === 'fenced'));
      await unmountAll(targetPath, dead);
    }
    await step('unpublish:unmounted');
    await removeTarget(targetPath);
    await step('unpublish:removed');
    if (record?.published[targetPath] === undefined) return;
    const { [targetPath]: _gone, ...published } = record.published;
    await records.put(handle.volumeUuid, { ...record, published });
  }
}
