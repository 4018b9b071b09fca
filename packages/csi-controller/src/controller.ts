/**
 * CSI Controller without a state of its own. Every call goes the same way: check the request, take the volume's turn
 * (ABORTED when another call has it), make one idempotent call to the metadata service, translate the answer. What the
 * service refuses carries the right gRPC code already.
 */
import {
  csiUnary,
  DEFAULT_FILE_SYSTEM,
  formatHandle,
  HoldfastError,
  InFlight,
  isReaderMode,
  parseHandle,
  poolsOfTopology,
  poolTopology,
  PUBLISH_ID,
  PUBLISH_READ_ONLY,
  readCapability,
  readMutableParameters,
  readParameters,
  requireField,
  requireHandle,
  volumeContext,
  volumeParameterKeys,
  type CallContext,
  type Capability,
  type FileSystem,
  type Logger,
} from '@holdfast/common';
import type {
  AccessMode,
  CreateVolumeRequest,
  Csi,
  Known,
  Pool__Output,
  Volume__Output,
} from '@holdfast/proto';
import { sizeForCopy, sizeForCreate, sizeForExpand } from './capacity.ts';
import { volumeCondition } from './condition.ts';
import { contentSource, isMadeFrom, sourceOf, type ContentSource } from './content-source.ts';
import type { MetadataApi } from './metadata-client.ts';
import { requireName, storedName } from './names.ts';
import { isAccessible, placementGroups, poolNamed } from './placement.ts';
import { SnapshotService } from './snapshots.ts';

const capabilities = [
  'CREATE_DELETE_VOLUME',
  'PUBLISH_UNPUBLISH_VOLUME',
  'LIST_VOLUMES',
  'GET_CAPACITY',
  'CREATE_DELETE_SNAPSHOT',
  'LIST_SNAPSHOTS',
  'CLONE_VOLUME',
  'PUBLISH_READONLY',
  'EXPAND_VOLUME',
  'LIST_VOLUMES_PUBLISHED_NODES',
  'VOLUME_CONDITION',
  'GET_VOLUME',
  'SINGLE_NODE_MULTI_WRITER',
  'GET_SNAPSHOT',
  'MODIFY_VOLUME',
] as const;

/** The volume as CSI shows it. */
function toCsiVolume(volume: Volume__Output): Csi.Volume {
  return {
    volume_id: formatHandle({ poolUuid: volume.pool_uuid, volumeUuid: volume.uuid }),
    capacity_bytes: volume.size_bytes,
    volume_context: volumeContext({
      poolUuid: volume.pool_uuid,
      name: volume.name,
      sizeBytes: BigInt(volume.size_bytes),
      parameters: volume.parameters,
      sourceSnapshotUuid: volume.source_snapshot_uuid,
      sourceVolumeUuid: volume.source_volume_uuid,
    }),
    ...sourceOf(volume),
    accessible_topology: [{ segments: poolTopology([volume.pool_uuid]) }],
  };
}

/** The one use that a list of capabilities and the parameters agree on; undefined: a mount, of whatever it may be. */
function intendedUse(
  wanted: readonly Capability[],
  fsParameter: FileSystem | undefined,
): FileSystem | 'block' | undefined {
  const named = new Set(wanted.flatMap((capability) => capability.fsType ?? []));
  if (fsParameter !== undefined) named.add(fsParameter);
  if (named.size > 1) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `The parameters and volume capabilities ask for different file systems (${[...named].join(', ')}). Keep one.`,
    );
  }
  const mounts = wanted.some((capability) => capability.accessType === 'mount');
  if (!mounts) return 'block';
  return [...named][0];
}

/** @throws INVALID_ARGUMENT for a volume that nobody could ever put something into. */
function refuseEmptyForReaders(wanted: readonly Capability[]): void {
  if (wanted.some((capability) => capability.mode !== 'MULTI_NODE_READER_ONLY')) return;
  throw new HoldfastError(
    'INVALID_ARGUMENT',
    'Access mode MULTI_NODE_READER_ONLY (ReadOnlyMany) alone needs a content source: an empty volume that nobody may write stays empty. Make it from a snapshot or a volume (dataSource), or add a writing mode.',
  );
}

export class ControllerService {
  readonly #metadata: MetadataApi;
  readonly #logger: Logger;
  readonly #inFlight = new InFlight();

  constructor(metadata: MetadataApi, logger: Logger) {
    this.#metadata = metadata;
    this.#logger = logger;
  }

  handlers(): Known<Csi.ControllerHandlers> {
    const log = this.#logger;
    return {
      CreateVolume: csiUnary(log, 'CreateVolume', (r, c) => this.createVolume(r, c)),
      DeleteVolume: csiUnary(log, 'DeleteVolume', (r, c) => this.deleteVolume(r, c)),
      ControllerPublishVolume: csiUnary(log, 'ControllerPublishVolume', (r, c) => this.publish(r, c)),
      ControllerUnpublishVolume: csiUnary(log, 'ControllerUnpublishVolume', (r, c) => this.unpublish(r, c)),
      ValidateVolumeCapabilities: csiUnary(log, 'ValidateVolumeCapabilities', (r, c) => this.validate(r, c)),
      ListVolumes: csiUnary(log, 'ListVolumes', (r, c) => this.listVolumes(r, c)),
      GetCapacity: csiUnary(log, 'GetCapacity', (r, c) => this.getCapacity(r, c)),
      ControllerGetCapabilities: csiUnary(log, 'ControllerGetCapabilities', async () => ({
        capabilities: capabilities.map((type) => ({ rpc: { type } })),
      })),
      ControllerExpandVolume: csiUnary(log, 'ControllerExpandVolume', (r, c) => this.expand(r, c)),
      ControllerGetVolume: csiUnary(log, 'ControllerGetVolume', (r, c) => this.getVolume(r, c)),
      ControllerModifyVolume: csiUnary(log, 'ControllerModifyVolume', (r, c) => this.modify(r, c)),
      ...new SnapshotService(this.#metadata, this.#inFlight).handlers(log),
    };
  }

  async createVolume(
    request: Csi.CreateVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.CreateVolumeResponse> {
    requireName(request.name);
    if (request.volume_capabilities.length === 0) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        'volume_capabilities is missing from the request. Give at least one.',
      );
    }
    const wanted = request.volume_capabilities.map((capability) => readCapability(capability));
    const mutable = readMutableParameters(request.mutable_parameters);
    const parameters = readParameters(request.parameters);
    const use = intendedUse(wanted, parameters.fsType);
    if (request.volume_content_source === null) refuseEmptyForReaders(wanted);
    const kept: Record<string, string> = {};
    // A copy has its source's file system; the service compares one that is asked for.
    const fsType = use ?? (request.volume_content_source === null ? DEFAULT_FILE_SYSTEM : undefined);
    if (fsType !== undefined && fsType !== 'block') kept[volumeParameterKeys.fsType] = fsType;
    if (parameters.mkfsOptions.length > 0) {
      kept[volumeParameterKeys.mkfsOptions] = parameters.mkfsOptions.join(' ');
    }
    const empty =
      request.volume_content_source === null
        ? sizeForCreate(request.capacity_range, fsType ?? 'block')
        : undefined;
    return this.#inFlight.run([`the volume named ${request.name}`], async () => {
      const copy = await this.#copy(request, context);
      const { sizeBytes, limitBytes } = empty ?? sizeForCopy(request.capacity_range, copy?.sizeBytes ?? 0n);
      const pool =
        parameters.pool === undefined
          ? undefined
          : poolNamed(await this.#metadata.listPools(context), parameters.pool);
      if (copy !== undefined) refuseOtherPool(request, copy, pool);
      const groups =
        copy === undefined ? placementGroups(request.accessibility_requirements, pool) : [[copy.poolUuid]];
      const volume = await this.#createInFirst(groups, context, {
        name: storedName(request.name),
        size_bytes: sizeBytes.toString(),
        limit_bytes: limitBytes.toString(),
        parameters: kept,
        mutable_parameters: mutable,
        ...copy?.request,
      });
      if (!isAccessible(request.accessibility_requirements, volume.pool_uuid)) {
        throw new HoldfastError(
          'ALREADY_EXISTS',
          `Volume ${request.name} exists in pool ${volume.pool_uuid}, which the accessibility requirements leave out. Use another name, or allow that pool.`,
        );
      }
      if (pool !== undefined && volume.pool_uuid !== pool.uuid) {
        throw new HoldfastError(
          'ALREADY_EXISTS',
          `Volume ${request.name} exists in pool ${volume.pool_uuid}, not in ${pool.name} (${pool.uuid}). Use another name.`,
        );
      }
      return { volume: toCsiVolume(volume) };
    });
  }

  /** The source of a copy. One that is there already, made by an earlier call, does not need its source any more. */
  async #copy(
    request: Csi.CreateVolumeRequest__Output,
    context: CallContext,
  ): Promise<ContentSource | undefined> {
    const source = request.volume_content_source;
    if (source === null) return undefined;
    const existing = await this.#metadata.volumeNamed(storedName(request.name), context);
    if (existing === undefined || !isMadeFrom(existing, source)) {
      return contentSource(this.#metadata, source, context);
    }
    return {
      poolUuid: existing.pool_uuid,
      // The source may have grown meanwhile; what was asked for then is asked for now.
      sizeBytes: BigInt(request.capacity_range?.required_bytes ?? 0) > 0n ? 0n : BigInt(existing.size_bytes),
      request:
        existing.source_snapshot_uuid === ''
          ? { source_volume_uuid: existing.source_volume_uuid }
          : { source_snapshot_uuid: existing.source_snapshot_uuid },
    };
  }

  /** The preferred pools first; the next group only where one is full or is being drained. */
  async #createInFirst(
    groups: readonly string[][],
    context: CallContext,
    request: Omit<CreateVolumeRequest, 'request_id' | 'pool_uuids'>,
  ): Promise<Volume__Output> {
    let full: unknown;
    for (const group of groups) {
      try {
        return await this.#metadata.createVolume({ ...request, pool_uuids: group }, context);
      } catch (error) {
        if (!(error instanceof HoldfastError) || !['NO_SPACE', 'POOL_DRAINING'].includes(error.code))
          throw error;
        full = error;
      }
    }
    throw full;
  }

  async deleteVolume(
    request: Csi.DeleteVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.DeleteVolumeResponse> {
    requireField(request.volume_id, 'volume_id');
    const handle = parseHandle(request.volume_id);
    if (handle === undefined) return {};
    return this.#inFlight.run([`volume ${request.volume_id}`], async () => {
      await this.#metadata.deleteVolume(handle.volumeUuid, context);
      return {};
    });
  }

  async publish(
    request: Csi.ControllerPublishVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.ControllerPublishVolumeResponse> {
    requireField(request.volume_id, 'volume_id');
    requireField(request.node_id, 'node_id');
    const capability = readCapability(request.volume_capability);
    const handle = requireHandle(request.volume_id);
    const readOnly = request.readonly || isReaderMode(capability.mode);
    return this.#inFlight.run([`volume ${request.volume_id}`], async () => {
      const publishId = await this.#metadata.publishVolume(
        {
          uuid: handle.volumeUuid,
          node_id: request.node_id,
          access_mode: `ACCESS_MODE_${capability.mode}` satisfies AccessMode,
          read_only: readOnly,
          volume_context: request.volume_context,
        },
        context,
      );
      return { publish_context: { [PUBLISH_ID]: publishId, [PUBLISH_READ_ONLY]: String(readOnly) } };
    });
  }

  async unpublish(
    request: Csi.ControllerUnpublishVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.ControllerUnpublishVolumeResponse> {
    requireField(request.volume_id, 'volume_id');
    const handle = parseHandle(request.volume_id);
    if (handle === undefined) return {};
    return this.#inFlight.run([`volume ${request.volume_id}`], async () => {
      try {
        await this.#metadata.unpublishVolume(handle.volumeUuid, request.node_id, context);
      } catch (error) {
        if (!(error instanceof HoldfastError)) throw error;
        if (error.code === 'DEADLINE_EXCEEDED') {
          throw new HoldfastError(
            'DEADLINE_EXCEEDED',
            `Taking volume ${request.volume_id} back from ${request.node_id || 'its nodes'} goes on without this call. Repeat the call: it joins what is under way. \`holdfast node show\` tells what it waits for.`,
            { cause: error },
          );
        }
        // A volume that the service does not have is published nowhere.
        if (error.code !== 'NOT_FOUND') throw error;
      }
      return {};
    });
  }

  async validate(
    request: Csi.ValidateVolumeCapabilitiesRequest__Output,
    context: CallContext,
  ): Promise<Csi.ValidateVolumeCapabilitiesResponse> {
    requireField(request.volume_id, 'volume_id');
    if (request.volume_capabilities.length === 0) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        'volume_capabilities is missing from the request. Give at least one.',
      );
    }
    const volume = await this.#existing(request.volume_id, context, request.volume_context);
    try {
      const wanted = request.volume_capabilities.map((capability) => readCapability(capability));
      const parameters = readParameters(request.parameters);
      const made = volume.parameters[volumeParameterKeys.fsType];
      const asked = new Set([
        ...wanted.flatMap((capability) => capability.fsType ?? []),
        ...(parameters.fsType === undefined ? [] : [parameters.fsType]),
      ]);
      for (const fsType of asked) {
        if (made !== undefined && fsType !== made) {
          return { message: `The volume was made for ${made}, not for ${fsType}.` };
        }
      }
      readMutableParameters(request.mutable_parameters);
    } catch (error) {
      if (!(error instanceof HoldfastError)) throw error;
      return { message: error.message };
    }
    return {
      confirmed: {
        volume_context: request.volume_context,
        volume_capabilities: request.volume_capabilities,
        parameters: request.parameters,
        mutable_parameters: request.mutable_parameters,
      },
    };
  }

  async listVolumes(
    request: Csi.ListVolumesRequest__Output,
    context: CallContext,
  ): Promise<Csi.ListVolumesResponse> {
    if (request.max_entries < 0) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        'max_entries is negative. Give a number of entries, or 0 for all.',
      );
    }
    const pools = await this.#metadata.listPools(context);
    const entries: Csi._csi_v1_ListVolumesResponse_Entry[] = [];
    let token = request.starting_token;
    do {
      const page = await this.#metadata.listVolumes(
        request.max_entries === 0 ? 0 : request.max_entries - entries.length,
        token,
        context,
      );
      for (const volume of page.volumes) {
        entries.push({ volume: toCsiVolume(volume), status: status(volume, pools) });
      }
      token = page.next_token;
    } while (token !== '' && (request.max_entries === 0 || entries.length < request.max_entries));
    return { entries, next_token: token };
  }

  async getCapacity(
    request: Csi.GetCapacityRequest__Output,
    context: CallContext,
  ): Promise<Csi.GetCapacityResponse> {
    for (const capability of request.volume_capabilities) readCapability(capability);
    const parameters = readParameters(request.parameters);
    const named =
      parameters.pool === undefined
        ? undefined
        : poolNamed(await this.#metadata.listPools(context), parameters.pool);
    let uuids: string[] | undefined = named === undefined ? undefined : [named.uuid];
    if (request.accessible_topology !== null) {
      const reachable = poolsOfTopology(request.accessible_topology.segments);
      uuids = uuids === undefined ? reachable : uuids.filter((uuid) => reachable.includes(uuid));
    }
    if (uuids !== undefined && uuids.length === 0) return { available_capacity: '0' };
    const answer = await this.#metadata.getCapacity(uuids ?? [], context);
    return {
      available_capacity: answer.available_bytes,
      maximum_volume_size: { value: answer.maximum_volume_bytes },
      minimum_volume_size: { value: answer.minimum_volume_bytes },
    };
  }

  async expand(
    request: Csi.ControllerExpandVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.ControllerExpandVolumeResponse> {
    requireField(request.volume_id, 'volume_id');
    const { sizeBytes, limitBytes } = sizeForExpand(request.capacity_range);
    if (request.volume_capability !== null) readCapability(request.volume_capability);
    const handle = requireHandle(request.volume_id);
    return this.#inFlight.run([`volume ${request.volume_id}`], async () => {
      const volume = await this.#metadata.expandVolume(
        { uuid: handle.volumeUuid, size_bytes: sizeBytes.toString(), limit_bytes: limitBytes.toString() },
        context,
      );
      // The node has work to do either way: the device takes the new size, and a file system grows into it.
      return { capacity_bytes: volume.size_bytes, node_expansion_required: true };
    });
  }

  async modify(
    request: Csi.ControllerModifyVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.ControllerModifyVolumeResponse> {
    requireField(request.volume_id, 'volume_id');
    const handle = requireHandle(request.volume_id);
    return this.#inFlight.run([`volume ${request.volume_id}`], async () => {
      // The specification's table has NOT_FOUND before what is wrong with the parameters; csi-sanity asks in that order.
      await this.#existing(request.volume_id, context);
      const mutable = readMutableParameters(request.mutable_parameters);
      await this.#metadata.modifyVolume(handle.volumeUuid, mutable, context);
      return {};
    });
  }

  async getVolume(
    request: Csi.ControllerGetVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.ControllerGetVolumeResponse> {
    const volume = await this.#existing(request.volume_id, context);
    const pools = await this.#metadata.listPools(context);
    return { volume: toCsiVolume(volume), status: status(volume, pools) };
  }

  /** @throws NOT_FOUND for a volume that is gone, being wiped, or in another pool than its handle says. */
  async #existing(
    volumeId: string,
    context: CallContext,
    volumeContext: Record<string, string> = {},
  ): Promise<Volume__Output> {
    const handle = requireHandle(volumeId);
    const volume = await this.#metadata.getVolume(handle.volumeUuid, volumeContext, context);
    if (volume.pool_uuid !== handle.poolUuid || volume.state === 'DELETING') {
      throw new HoldfastError(
        'NOT_FOUND',
        volume.state === 'DELETING'
          ? `Volume ${volumeId} is being deleted.`
          : `Volume ${handle.volumeUuid} is in pool ${volume.pool_uuid}, not in ${handle.poolUuid}. Correct volumeHandle in the PersistentVolume.`,
      );
    }
    return volume;
  }
}

/** A copy shares its source's data, so it is on its pool. @throws INVALID_ARGUMENT, RESOURCE_EXHAUSTED */
function refuseOtherPool(
  request: Csi.CreateVolumeRequest__Output,
  copy: ContentSource,
  pool: Pool__Output | undefined,
): void {
  if (pool !== undefined && pool.uuid !== copy.poolUuid) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `The source is on pool ${copy.poolUuid}, and parameter "pool" names ${pool.name} (${pool.uuid}). A copy shares its source's data: use a StorageClass of that pool.`,
    );
  }
  if (!isAccessible(request.accessibility_requirements, copy.poolUuid)) {
    throw new HoldfastError(
      'TOO_MANY',
      `The source is on pool ${copy.poolUuid}, and no node in the accessibility requirements reaches it. Allow a node that does.`,
    );
  }
}

function status(
  volume: Volume__Output,
  pools: readonly Pool__Output[],
): Csi._csi_v1_ControllerGetVolumeResponse_VolumeStatus {
  return {
    published_node_ids: [...new Set(volume.publications.map((publication) => publication.node_id))],
    volume_condition: volumeCondition(volume, pools),
  };
}
