/**
 * CSI Node. Every call goes the same way: check the request, take the volume's turn (ABORTED when another call has it),
 * look at what stands (mountinfo, the agent), do what is missing. Each step may be the last of a killed process; the
 * repeated call finds what was done and goes on from there.
 */
import { isAbsolute } from 'node:path';
import {
  csiUnary,
  HoldfastError,
  InFlight,
  parseHandle,
  poolTopology,
  readCapability,
  requireField,
  requireHandle,
  type CallContext,
  type Logger,
  type VolumeHandle,
} from '@holdfast/common';
import type { Csi, Known } from '@holdfast/proto';
import { mountPath } from '../mount/mountinfo.ts';
import type { Step } from '../mount/step.ts';
import type { AgentApi } from './agent-client.ts';
import { Publishing } from './publishing.ts';
import { VolumeRecords } from './records.ts';
import { expandVolume } from './expansion.ts';
import { Staging, type StageRequest } from './staging.ts';
import { volumeStats } from './stats.ts';

const capabilities = [
  'STAGE_UNSTAGE_VOLUME',
  'GET_VOLUME_STATS',
  'EXPAND_VOLUME',
  'VOLUME_CONDITION',
  'SINGLE_NODE_MULTI_WRITER',
] as const;

export interface NodeServiceOptions {
  readonly agent: AgentApi;
  readonly stateDir: string;
  readonly logger: Logger;
  readonly step: Step;
}

function requirePath(path: string, name: string): void {
  requireField(path, name);
  if (!isAbsolute(path) || path.split('/').includes('..')) {
    throw new HoldfastError('INVALID_ARGUMENT', `${name} "${path}" is not an absolute path. Give one.`);
  }
}

/** For calls about a volume at a path: where no volume can be is NOT_FOUND, not a malformed request. */
function requireVolumeAt(request: { volume_id: string; volume_path: string }): VolumeHandle {
  requireField(request.volume_id, 'volume_id');
  requireField(request.volume_path, 'volume_path');
  if (!isAbsolute(request.volume_path)) {
    throw new HoldfastError(
      'NOT_FOUND',
      `No volume is at "${request.volume_path}": volume_path has to be absolute.`,
    );
  }
  return requireHandle(request.volume_id);
}

export class NodeService {
  readonly #agent: AgentApi;
  readonly #logger: Logger;
  readonly #records: VolumeRecords;
  readonly #staging: Staging;
  readonly #publishing: Publishing;
  readonly #step: Step;
  readonly #inFlight = new InFlight();

  constructor(options: NodeServiceOptions) {
    this.#agent = options.agent;
    this.#logger = options.logger;
    this.#step = options.step;
    this.#records = new VolumeRecords(options.stateDir);
    this.#staging = new Staging({ ...options, records: this.#records });
    this.#publishing = new Publishing({ ...options, records: this.#records, staging: this.#staging });
  }

  handlers(): Known<Csi.NodeHandlers> {
    const log = this.#logger;
    return {
      NodeStageVolume: csiUnary(log, 'NodeStageVolume', (r, c) => this.stage(r, c)),
      NodeUnstageVolume: csiUnary(log, 'NodeUnstageVolume', (r, c) => this.unstage(r, c)),
      NodePublishVolume: csiUnary(log, 'NodePublishVolume', (r, c) => this.publish(r, c)),
      NodeUnpublishVolume: csiUnary(log, 'NodeUnpublishVolume', (r, c) => this.unpublish(r, c)),
      NodeGetVolumeStats: csiUnary(log, 'NodeGetVolumeStats', (r, c) => this.stats(r, c)),
      NodeExpandVolume: csiUnary(log, 'NodeExpandVolume', (r, c) => this.expand(r, c)),
      NodeGetCapabilities: csiUnary(log, 'NodeGetCapabilities', async () => ({
        capabilities: capabilities.map((type) => ({ rpc: { type } })),
      })),
      NodeGetInfo: csiUnary(log, 'NodeGetInfo', (_, c) => this.info(c)),
    };
  }

  /** What stage and publish share: a publish may have to stage anew. */
  async #stageRequest(
    request: Pick<
      Csi.NodeStageVolumeRequest__Output,
      'volume_id' | 'staging_target_path' | 'publish_context' | 'volume_context' | 'volume_capability'
    >,
  ): Promise<StageRequest> {
    const capability = readCapability(request.volume_capability, 'FAILED_PRECONDITION');
    return {
      volumeId: request.volume_id,
      handle: requireHandle(request.volume_id),
      stagingPath: await mountPath(request.staging_target_path),
      capability,
      publishContext: request.publish_context,
      volumeContext: request.volume_context,
    };
  }

  async stage(
    request: Csi.NodeStageVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.NodeStageVolumeResponse> {
    requireField(request.volume_id, 'volume_id');
    requirePath(request.staging_target_path, 'staging_target_path');
    const stage = await this.#stageRequest(request);
    return this.#turn(request.volume_id, async () => {
      await this.#staging.stage(stage, context);
      return {};
    });
  }

  async unstage(
    request: Csi.NodeUnstageVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.NodeUnstageVolumeResponse> {
    requireField(request.volume_id, 'volume_id');
    requirePath(request.staging_target_path, 'staging_target_path');
    const handle = parseHandle(request.volume_id);
    if (handle === undefined) return {};
    const stagingPath = await mountPath(request.staging_target_path);
    return this.#turn(request.volume_id, async () => {
      await this.#staging.unstage(request.volume_id, handle, stagingPath, context);
      return {};
    });
  }

  async publish(
    request: Csi.NodePublishVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.NodePublishVolumeResponse> {
    requireField(request.volume_id, 'volume_id');
    requirePath(request.target_path, 'target_path');
    if (request.volume_capability !== null && request.staging_target_path === '') {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        'staging_target_path is missing from the request. Stage the volume and say where.',
      );
    }
    const stage = await this.#stageRequest(request);
    const targetPath = await mountPath(request.target_path);
    return this.#turn(request.volume_id, async () => {
      await this.#publishing.publish({ ...stage, targetPath, readOnly: request.readonly }, context);
      return {};
    });
  }

  async unpublish(
    request: Csi.NodeUnpublishVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.NodeUnpublishVolumeResponse> {
    requireField(request.volume_id, 'volume_id');
    requirePath(request.target_path, 'target_path');
    const targetPath = await mountPath(request.target_path);
    const handle = parseHandle(request.volume_id);
    if (handle === undefined) return {};
    return this.#turn(request.volume_id, async () => {
      await this.#publishing.unpublish(handle, targetPath, context);
      return {};
    });
  }

  async stats(
    request: Csi.NodeGetVolumeStatsRequest__Output,
    context: CallContext,
  ): Promise<Csi.NodeGetVolumeStatsResponse> {
    const handle = requireVolumeAt(request);
    return volumeStats(this.#agent, this.#records, handle, await mountPath(request.volume_path), context);
  }

  async expand(
    request: Csi.NodeExpandVolumeRequest__Output,
    context: CallContext,
  ): Promise<Csi.NodeExpandVolumeResponse> {
    const handle = requireVolumeAt(request);
    if (request.volume_capability !== null) readCapability(request.volume_capability);
    const volumePath = await mountPath(request.volume_path);
    return this.#turn(request.volume_id, () =>
      expandVolume(
        { agent: this.#agent, records: this.#records, step: this.#step },
        handle,
        volumePath,
        request.capacity_range,
        context,
      ),
    );
  }

  async info(context: CallContext): Promise<Csi.NodeGetInfoResponse> {
    const info = await this.#agent.info(context);
    return {
      node_id: info.node_id,
      max_volumes_per_node: String(info.max_volumes),
      accessible_topology: { segments: poolTopology(info.pools.map((pool) => pool.uuid)) },
    };
  }

  #turn<T>(volumeId: string, body: () => Promise<T>): Promise<T> {
    return this.#inFlight.run([`volume ${volumeId}`], body);
  }
}
