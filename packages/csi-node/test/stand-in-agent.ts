/**
 * Speaks agent.proto over plain loop devices on sparse files, so that the node plugin can be tested alone, and so that what
 * a real agent never does on demand (a volume that dies under its mount) can be forced.
 */
import { open, stat, truncate } from 'node:fs/promises';
import { randomUUID } from 'node:crypto';
import { createLogger, HoldfastError, serve, unary, type GrpcServer } from '@holdfast/common';
import {
  holdfast,
  type CloseVolumeRequest__Output,
  type GetOpenVolumeRequest__Output,
  type Known,
  type NodeAgentHandlers,
  type OpenVolumeInfo,
  type OpenVolumeRequest__Output,
  type ResizeVolumeRequest__Output,
} from '@holdfast/proto';
import type { LoopDevice, TestArea } from '@holdfast/testing';

interface Volume {
  readonly uuid: string;
  readonly file: string;
  sizeBytes: bigint;
  loop: LoopDevice | undefined;
  state: 'open' | 'held' | 'revoked' | 'fenced';
}

export class StandInAgent {
  readonly poolUuid = randomUUID();
  readonly nodeId = 'node-a.0000abcd';
  readonly endpoint: string;
  readonly #area: TestArea;
  readonly #volumes = new Map<string, Volume>();
  #server: GrpcServer | undefined;

  private constructor(area: TestArea) {
    this.#area = area;
    this.endpoint = `unix:${area.path('agent.sock')}`;
  }

  static async start(area: TestArea): Promise<StandInAgent> {
    const agent = new StandInAgent(area);
    await agent.up();
    area.onDispose(() => agent.down());
    return agent;
  }

  async up(): Promise<void> {
    const logger = createLogger('stand-in-agent');
    this.#server ??= await serve(this.endpoint, (grpc) =>
      grpc.addService(holdfast.NodeAgent.service, this.#handlers(logger)),
    );
  }

  async down(): Promise<void> {
    await this.#server?.close(100);
    this.#server = undefined;
  }

  /** A volume as a pool would have it: all zeros. Its handle. */
  async addVolume(sizeBytes: number | bigint): Promise<string> {
    const uuid = randomUUID();
    const file = this.#area.path(`volume-${uuid}.img`);
    await (await open(file, 'wx')).close();
    await truncate(file, Number(sizeBytes));
    this.#volumes.set(uuid, { uuid, file, sizeBytes: BigInt(sizeBytes), loop: undefined, state: 'open' });
    return `${this.poolUuid}/${uuid}`;
  }

  #volume(handle: string): Volume {
    const volume = this.#volumes.get(handle.split('/').at(-1) ?? '');
    if (volume === undefined) throw new HoldfastError('NOT_FOUND', `There is no volume ${handle}.`);
    return volume;
  }

  file(handle: string): string {
    return this.#volume(handle).file;
  }
  device(handle: string): string | undefined {
    return this.#volume(handle).loop?.path;
  }
  async growTo(handle: string, sizeBytes: bigint): Promise<void> {
    const volume = this.#volume(handle);
    volume.sizeBytes = sizeBytes;
    await truncate(volume.file, Number(sizeBytes));
  }
  setState(handle: string, state: Volume['state']): void {
    this.#volume(handle).state = state;
  }
  /** Reads of the device fail with EIO from now on, as those of a fenced volume do. */
  async kill(handle: string): Promise<void> {
    this.setState(handle, 'fenced');
    await truncate(this.#volume(handle).file, 0);
  }
  /** A new agent that knows nothing of what the old one had open; the old device lives on under its mount. */
  async forget(handle: string): Promise<void> {
    const volume = this.#volume(handle);
    await volume.loop?.detach();
    volume.loop = undefined;
  }

  async #info(volume: Volume): Promise<OpenVolumeInfo> {
    return {
      volume_uuid: volume.uuid,
      pool_uuid: this.poolUuid,
      device_path: volume.loop?.path ?? '',
      size_bytes: volume.sizeBytes.toString(),
      epoch: '1',
      frontend: 'loop',
      state: volume.state,
      reason: volume.state === 'open' ? '' : `forced to ${volume.state}`,
      mapped_bytes: String((await stat(volume.file)).blocks * 512),
    };
  }

  #handlers(logger: ReturnType<typeof createLogger>): Known<NodeAgentHandlers> {
    const opened = (uuid: string): Volume => {
      const volume = this.#volume(uuid);
      if (volume.loop === undefined) throw new HoldfastError('NOT_FOUND', `Volume ${uuid} is not open.`);
      return volume;
    };
    return {
      OpenVolume: unary(logger, 'OpenVolume', async (request: OpenVolumeRequest__Output) => {
        const volume = this.#volume(request.volume_uuid);
        if (volume.state === 'fenced' || volume.state === 'revoked') {
          throw new HoldfastError('FENCED', `Volume ${volume.uuid} is ${volume.state}.`);
        }
        volume.loop ??= await this.#area.attach(volume.file, { sectorSize: 4096 });
        return {
          device_path: volume.loop.path,
          size_bytes: volume.sizeBytes.toString(),
          epoch: '1',
          frontend: 'loop',
        };
      }),
      CloseVolume: unary(logger, 'CloseVolume', async (request: CloseVolumeRequest__Output) => {
        const volume = this.#volumes.get(request.volume_uuid);
        if (volume?.loop === undefined) return {};
        // An exclusive open is refused while the device is mounted.
        const probe = await open(volume.loop.path, 0o200).catch((error: Error) => {
          throw new HoldfastError('IN_USE', `${volume.loop?.path} is in use: ${error.message}`);
        });
        await probe.close();
        await this.forget(volume.uuid);
        return {};
      }),
      ResizeVolume: unary(logger, 'ResizeVolume', async (request: ResizeVolumeRequest__Output) => {
        const volume = opened(request.volume_uuid);
        await volume.loop?.refresh();
        return { size_bytes: volume.sizeBytes.toString() };
      }),
      GetOpenVolume: unary(logger, 'GetOpenVolume', async (request: GetOpenVolumeRequest__Output) =>
        this.#info(opened(request.volume_uuid)),
      ),
      ListOpenVolumes: unary(logger, 'ListOpenVolumes', async () => ({
        volumes: await Promise.all(
          [...this.#volumes.values()].filter((v) => v.loop !== undefined).map((v) => this.#info(v)),
        ),
      })),
      GetAgentInfo: unary(logger, 'GetAgentInfo', async () => ({
        node_id: this.nodeId,
        name: 'node-a',
        max_volumes: 32,
        service_connected: true,
        pools: [{ uuid: this.poolUuid, name: 'pool', lease: 'valid' }],
      })),
    };
  }
}
