/**
 * Knows a volume again that the database has lost, by its handle and context: a record on the pool wins; without one the volume
 * was never opened and holds nothing of its own. The slabs of a record are found by their pages, region by region.
 */
import { HoldfastError, parseVolumeContext, type VolumeContext } from '@holdfast/common';
import type { VolumeRecordReading__Output } from '@holdfast/proto';
import { requireAuthority, requirePool } from '../model/decision.ts';
import { tables, type PoolRecord, type SlabRun } from '../model/records.ts';
import { normalized } from '../model/runs.ts';
import { freeRuns, regionCount } from '../model/slabs.ts';
import { importVolume, type VolumeOnDisk } from '../model/volumes.ts';
import type { Core } from './core.ts';
import { anyLiveHost } from './helpers.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import { scanSlabs } from './scan.ts';

const timeoutMs = 30_000;

export class Importer {
  readonly #core: Core;
  readonly #sessions: Sessions;
  /** Reading a large pool takes longer than a call: repeated calls join. */
  readonly #underWay = new Map<string, Promise<void>>();

  constructor(core: Core, sessions: Sessions) {
    this.#core = core;
    this.#sessions = sessions;
  }

  /** Does nothing for a volume that is known. @throws HoldfastError NOT_FOUND without a context */
  async ensureKnown(uuid: string, volumeContext: Readonly<Record<string, string>>): Promise<void> {
    if (this.#core.read((tx) => tables.volume.get(tx, uuid)) !== undefined) return;
    if (!/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(uuid)) {
      throw new HoldfastError('NOT_FOUND', `Volume ${uuid} does not exist: that is not a volume's UUID.`);
    }
    const context = parseVolumeContext(volumeContext);
    if (context === undefined) throw new HoldfastError('NOT_FOUND', `Volume ${uuid} does not exist.`);
    let running = this.#underWay.get(uuid);
    if (running === undefined) {
      running = this.#import(uuid, context).finally(() => this.#underWay.delete(uuid));
      this.#underWay.set(uuid, running);
    }
    await running;
  }

  async #import(uuid: string, context: VolumeContext): Promise<void> {
    const pool = this.#core.read((tx) => requirePool({ tx }, context.poolUuid));
    const disk = await readDisk(this.#core, this.#sessions, pool, uuid);
    await this.#core.decide((d) => {
      requireAuthority(d, requirePool(d, pool.uuid));
      return importVolume(d, uuid, context, disk);
    });
    this.#core.logger.warn(
      { volume: uuid, pool: pool.uuid, fromDisk: disk !== undefined },
      `Volume ${describe(context)} was not in the database and is known again`,
    );
  }
}

function describe(context: VolumeContext): string {
  return `${context.name} (${context.sizeBytes} bytes)`;
}

async function readDisk(
  core: Core,
  sessions: Sessions,
  pool: PoolRecord,
  uuid: string,
): Promise<VolumeOnDisk | undefined> {
  try {
    const host = anyLiveHost(core, sessions, pool);
    const order = { read_volume_record: { slot: 0, volume_uuid: uuid } };
    const result = await sessions.order(host.nodeId, pool.uuid, order, timeoutMs);
    const record = result.volume_record;
    if (!record) throw new OrderFailed('INCOMPLETE', `The agent of ${host.nodeId} sent no volume record.`);
    if (!record.found) return undefined;
    if (record.state === 'deleted') {
      throw new HoldfastError(
        'NOT_FOUND',
        `Volume ${uuid} does not exist: its record on pool ${pool.name} says that it was deleted.`,
      );
    }
    return await withSlabs(core, sessions, pool, host.nodeId, fromReading(uuid, record));
  } catch (error) {
    if (!(error instanceof OrderFailed)) throw error;
    throw new HoldfastError(
      'UNAVAILABLE',
      `Volume ${uuid} is not in the database, and its record on pool ${pool.name} cannot be read: ${error.message} ` +
        'Repeat the call when an agent is live on the pool.',
      { cause: error },
    );
  }
}

function fromReading(uuid: string, record: VolumeRecordReading__Output): VolumeOnDisk {
  if (record.uuid !== uuid) {
    throw new OrderFailed('INCOMPLETE', `A volume record with UUID ${record.uuid} came instead.`);
  }
  return {
    volumeId: BigInt(record.volume_id),
    slot: record.slot,
    name: record.name,
    sizeBytes: BigInt(record.size_bytes),
    parameters: parametersOf(record),
    epoch: BigInt(record.epoch),
    state: record.state,
    hostId: record.host_id,
    generation: BigInt(record.generation),
    layers: record.layers.map((layer) => ({
      layerId: BigInt(layer.layer_id),
      slot: layer.slot,
      parentLayerId: BigInt(layer.parent_layer_id),
      birth: BigInt(layer.birth),
      sizeBytes: BigInt(layer.size_bytes),
      frozen: layer.frozen,
    })),
    slabs: [],
  };
}

function parametersOf(record: VolumeRecordReading__Output): Record<string, string> {
  if (record.parameters_json === '') return {};
  try {
    const parsed: unknown = JSON.parse(record.parameters_json);
    return Object.fromEntries(Object.entries(parsed as object).map(([key, value]) => [key, String(value)]));
  } catch (error) {
    throw new HoldfastError(
      'CORRUPT',
      `The parameters in the record of volume ${record.name} are not JSON.`,
      {
        cause: error,
      },
    );
  }
}

/** Every slab that this database thinks free is read: what names one of the volume's layers belongs to it. */
async function withSlabs(
  core: Core,
  sessions: Sessions,
  pool: PoolRecord,
  nodeId: string,
  disk: VolumeOnDisk,
): Promise<VolumeOnDisk> {
  const found = new Map<bigint, SlabRun[]>(disk.layers.map((layer) => [layer.layerId, []]));
  for (let region = 0; region < regionCount(pool); region++) {
    const runs = core.read((tx) => freeRuns(tx, pool, region));
    if (runs.length === 0) continue;
    for (const reading of await scanSlabs(sessions, nodeId, pool.uuid, runs)) {
      if (reading.state !== 'claimed') continue;
      found.get(reading.layerId)?.push({ first: reading.slab, count: 1, generation: reading.generation });
    }
  }
  return { ...disk, slabs: [...found].map(([layerId, runs]) => ({ layerId, runs: normalized(runs) })) };
}
