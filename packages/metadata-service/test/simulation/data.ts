/**
 * What the simulated disk holds: slab pages that say which logical blocks of a layer are in them, and the data, a version number
 * for each block. A strip takes bits out of a page; the data stays until the slab is wiped, as on a real disk.
 */
import type { Grant, Layer } from '@holdfast/proto';

export interface Page {
  readonly layerId: bigint;
  readonly generation: bigint;
  readonly blocks: Set<number>;
}

export type Content = ReadonlyMap<number, number>;

/** A volume record. */
export interface RecordOnDisk {
  volumeId: string;
  slot: number;
  epoch: bigint;
  state: string;
  top: bigint;
}

/** A layer record. */
export interface LayerOnDisk {
  layerId: bigint;
  parentId: bigint;
  deleted: boolean;
}

/** Layer records by slot. */
export type LayerTable = ReadonlyMap<number, LayerOnDisk>;

/** A chain from a layer down as the records have it, tombstones passed over. @throws when a parent has no record */
export function chainOnDisk(table: LayerTable, topId: bigint): LayerOnDisk[] {
  const byId = new Map([...table.values()].map((record) => [record.layerId, record]));
  const chain: LayerOnDisk[] = [];
  for (let id = topId, steps = 0; id !== 0n; steps++) {
    const record = byId.get(id);
    if (record === undefined || steps > table.size)
      throw new Error(`layer ${id} below ${topId} has no record`);
    if (!record.deleted) chain.push(record);
    id = record.parentId;
  }
  return chain;
}

/** Blocks that a slab has room for: few, so that chains get slabs. */
export const blocksPerSlab = 3;
/** Logical blocks of every volume. */
export const blocksPerVolume = 10;

/** An open volume inside an engine. */
export interface OpenVolume {
  readonly uuid: string;
  readonly volumeId: string;
  readonly epoch: bigint;
  readonly slot: number;
  readonly readOnly: boolean;
  /** Opened for a cut only: nobody writes. */
  readonly hasDevice: boolean;
  /** Its writable layer, the slot of that one's record, and what it stands on as far as the engine knows. */
  layerId: bigint;
  layerSlot: number;
  parentId: bigint;
  open: boolean;
  inFlight: number;
  /** New writes wait for a cut. */
  held: boolean;
  unreported: { slab: number; generation: bigint; layerId: bigint }[];
  /** Slabs of frozen layers that it knows places in, until it is told to forget them. */
  readonly told: Map<number, bigint>;
  /** Slabs of its writable layer with the blocks that have a place there, and the generation of each. */
  own: Map<number, { generation: bigint; blocks: Set<number> }>;
  /** The forward map: which slab answers for a block. */
  map: Map<number, number>;
  /** Blocks with a write in flight. */
  readonly busy: Set<number>;
}

export interface Blocks {
  readonly pages: ReadonlyMap<number, Page>;
  readonly data: ReadonlyMap<number, ReadonlyMap<number, number>>;
}

/** The pages of slabs that still name the layer and the generation. */
export function pagesOf(disk: Blocks, layer: Layer): [slab: number, page: Page][] {
  const found: [number, Page][] = [];
  for (const run of layer.slabs ?? []) {
    for (let n = 0; n < (run.count ?? 0); n++) {
      const slab = Number(run.first) + n;
      const page = disk.pages.get(slab);
      const ours =
        page?.layerId === BigInt(String(layer.layer_id)) &&
        page.generation === BigInt(String(run.generation));
      if (page !== undefined && ours) found.push([slab, page]);
    }
  }
  return found;
}

/** Which slab answers for which block in a chain, newest layer first. */
export function mapOf(disk: Blocks, layers: readonly Layer[]): Map<number, number> {
  const map = new Map<number, number>();
  for (const layer of layers) {
    const here = new Map(
      pagesOf(disk, layer).flatMap(([slab, page]) => [...page.blocks].map((block) => [block, slab])),
    );
    for (const [block, slab] of here) if (!map.has(block)) map.set(block, slab);
  }
  return map;
}

export function contentOf(disk: Blocks, map: ReadonlyMap<number, number>): Content {
  return new Map([...map].map(([block, slab]) => [block, disk.data.get(slab)?.get(block) ?? -1]));
}

/** In words; empty: they are the same. */
export function difference(got: Content, wanted: Content, except: ReadonlySet<number> = new Set()): string {
  const blocks = new Set([...got.keys(), ...wanted.keys()]);
  return [...blocks]
    .filter((block) => !except.has(block) && got.get(block) !== wanted.get(block))
    .map((block) => `block ${block} is ${got.get(block) ?? 'nowhere'}, not ${wanted.get(block) ?? 'zero'}`)
    .join('; ');
}

/** What an engine that takes over makes of the slabs that the one before was told of: by their pages, newer layers first. */
export function mapFromTold(disk: Blocks, volume: OpenVolume): Map<number, number> {
  const known = [...volume.own.keys(), ...volume.told.keys()].flatMap((slab) => {
    const page = disk.pages.get(slab);
    return page === undefined ? [] : [{ slab, page }];
  });
  const map = new Map<number, number>();
  const byAge = known.toSorted((a, b) =>
    a.page.layerId < b.page.layerId ? 1 : a.page.layerId > b.page.layerId ? -1 : 0,
  );
  for (const { slab, page } of byAge) {
    for (const block of page.blocks) if (!map.has(block)) map.set(block, slab);
  }
  return map;
}

/** As an engine opens it: by the pages of the slabs that it was told of. */
export function openFrom(disk: Blocks, grant: Grant, hasDevice: boolean): OpenVolume {
  const layers = grant.layers ?? [];
  const [top] = layers;
  const told = new Map<number, bigint>();
  for (const layer of layers.slice(1)) {
    for (const [slab, page] of pagesOf(disk, layer)) told.set(slab, page.generation);
  }
  const own = pagesOf(disk, top ?? {}).map(
    ([slab, page]) => [slab, { generation: page.generation, blocks: new Set(page.blocks) }] as const,
  );
  return {
    uuid: grant.volume_uuid ?? '',
    volumeId: String(grant.volume_id),
    epoch: BigInt(String(grant.epoch)),
    slot: grant.slot ?? 0,
    readOnly: grant.read_only === true,
    hasDevice,
    layerId: BigInt(String(top?.layer_id)),
    layerSlot: top?.slot ?? 0,
    parentId: BigInt(String(top?.parent_layer_id)),
    open: true,
    inFlight: 0,
    held: false,
    unreported: [],
    told,
    own: new Map(own),
    map: mapOf(disk, layers),
    busy: new Set(),
  };
}
