/** holdfast volume: list, show. Volumes are made and deleted by CSI. */
import { call } from '@holdfast/common';
import type { AuditRecord__Output, Volume__Output } from '@holdfast/proto';
import type { Command } from 'commander';
import { globals, withMetadata } from '../context.ts';
import type { MetadataApi } from '../metadata.ts';
import { age, camelKeys, enumWord, formatBytes, printJson, properties, table } from '../output.ts';

/** Records asked for at a time. */
const auditPage = 1000;

/** The stable JSON shape of a volume. */
export function volumeView(volume: Volume__Output): Record<string, unknown> {
  return {
    handle: `${volume.pool_uuid}/${volume.uuid}`,
    ...(camelKeys(volume) as Record<string, unknown>),
    state: volume.state.toLowerCase(),
    grant: enumWord('GRANT_STATE', volume.grant),
    readers: volume.readers.map((reader) => ({
      ...(camelKeys(reader) as Record<string, unknown>),
      grant: enumWord('GRANT_STATE', reader.grant),
    })),
    publications: volume.publications.map((publication) => ({
      ...(camelKeys(publication) as Record<string, unknown>),
      accessMode: enumWord('ACCESS_MODE', publication.access_mode),
    })),
  };
}

function sourceOf(volume: Volume__Output): string {
  if (volume.source_snapshot_uuid !== '') return `snapshot ${volume.source_snapshot_uuid}`;
  return volume.source_volume_uuid === '' ? '-' : `volume ${volume.source_volume_uuid}`;
}

/** Slabs of its own layers, of layers that others need too, and how much of its own is only waiting to be freed. */
function spaceOf(volume: Volume__Output): string {
  const parts = [`${formatBytes(volume.own_bytes)} own`, `${formatBytes(volume.shared_bytes)} shared`];
  if (BigInt(volume.reclaimable_bytes) > 0n) {
    parts.push(`${formatBytes(volume.reclaimable_bytes)} reclaimable`);
  }
  return parts.join(', ');
}

/** What is reclaimable comes back block by block where newer writes cover it, and slab by slab where compaction moves the rest. */
async function lastCompaction(api: MetadataApi, uuid: string): Promise<string> {
  let last: AuditRecord__Output | undefined;
  for (let after = '0', more = true; more; ) {
    const { records } = await api.run((client, timeoutMs) =>
      call(
        client,
        client.ListAudit,
        { volume_uuid: uuid, node_id: '', after_sequence: after, max_entries: auditPage },
        { timeoutMs },
      ),
    );
    last = records.findLast(({ event }) => event === 'compact' || event === 'merge') ?? last;
    more = records.length === auditPage;
    after = records.at(-1)?.sequence ?? after;
  }
  return last === undefined ? 'never' : `${age(last.at_unix_ms)} ago, ${last.detail}`;
}

/** Epoch: the pool's incarnation, and the counter within it. */
const epochText = (epoch: string): string => `${BigInt(epoch) >> 40n}/${BigInt(epoch) & ((1n << 40n) - 1n)}`;

async function list(_flags: unknown, command: Command): Promise<void> {
  const volumes = await withMetadata(command, (api) => api.volumes());
  if (globals(command).output === 'json') {
    printJson(volumes.map(volumeView));
    return;
  }
  if (volumes.length === 0) {
    console.log('There are no volumes.');
    return;
  }
  console.log(
    table(
      ['NAME', 'UUID', 'SIZE', 'ALLOCATED', 'STATE', 'GRANT', 'PUBLISHED TO', 'AGE'],
      volumes.map((volume) => [
        volume.name,
        volume.uuid,
        formatBytes(volume.size_bytes),
        formatBytes(volume.allocated_bytes),
        volume.state.toLowerCase(),
        volume.granted_node_id === ''
          ? enumWord('GRANT_STATE', volume.grant)
          : `${enumWord('GRANT_STATE', volume.grant)} ${volume.granted_node_id}`,
        volume.publications.map((p) => p.node_id).join(', ') || '-',
        age(volume.created_unix_ms),
      ]),
    ),
  );
}

async function show(word: string, _flags: unknown, command: Command): Promise<void> {
  const { volume, compaction } = await withMetadata(command, async (api) => {
    const found = await api.volume(word);
    const asJson = globals(command).output === 'json';
    return { volume: found, compaction: asJson ? '' : await lastCompaction(api, found.uuid) };
  });
  if (globals(command).output === 'json') {
    printJson(volumeView(volume));
    return;
  }
  console.log(
    properties([
      ['Name', volume.name],
      ['Handle', `${volume.pool_uuid}/${volume.uuid}`],
      ['Volume id', `${volume.volume_id} (slot ${volume.slot})`],
      ['State', volume.state.toLowerCase()],
      ['Size', `${formatBytes(volume.size_bytes)}, ${formatBytes(volume.allocated_bytes)} allocated`],
      ['Space', spaceOf(volume)],
      ['Compacted', compaction],
      ['Chain', `${volume.layers.length} ${volume.layers.length === 1 ? 'layer' : 'layers'}`],
      ['Made from', sourceOf(volume)],
      ['Epoch', epochText(volume.epoch)],
      [
        'Grant',
        `${enumWord('GRANT_STATE', volume.grant)}${volume.granted_node_id === '' ? '' : ` at ${volume.granted_node_id}`}`,
      ],
      [
        'Parameters',
        Object.entries(volume.parameters)
          .map(([k, v]) => `${k}=${v}`)
          .join(', ') || '-',
      ],
      [
        'Mutable',
        Object.entries(volume.mutable_parameters)
          .map(([k, v]) => `${k}=${v}`)
          .join(', ') || '-',
      ],
      ['Age', age(volume.created_unix_ms)],
    ]),
  );
  if (volume.publications.length > 0) {
    console.log();
    console.log(
      table(
        ['PUBLISHED TO', 'MODE', 'READ ONLY', 'STAGED', 'SINCE', 'PUBLISH ID'],
        volume.publications.map((p) => [
          p.node_id,
          enumWord('ACCESS_MODE', p.access_mode),
          p.read_only ? 'yes' : 'no',
          p.staged ? 'yes' : 'no',
          age(p.since_unix_ms),
          p.publish_id,
        ]),
      ),
    );
  }
  if (volume.readers.length > 0) {
    console.log();
    console.log(
      table(
        ['READER', 'GRANT', 'EPOCH'],
        volume.readers.map((reader) => [
          reader.node_id,
          enumWord('GRANT_STATE', reader.grant),
          epochText(reader.epoch),
        ]),
      ),
    );
  }
  if (volume.layers.length > 0) {
    console.log();
    console.log(
      table(
        ['LAYER', 'PARENT', 'FROZEN', 'SIZE', 'SLABS'],
        volume.layers.map((layer) => [
          layer.layer_id,
          layer.parent_layer_id === '0' ? '-' : layer.parent_layer_id,
          layer.frozen ? 'yes' : 'no',
          formatBytes(layer.size_bytes),
          String(layer.slabs.reduce((sum, run) => sum + run.count, 0)),
        ]),
      ),
    );
  }
}

export function addVolumeCommands(program: Command): void {
  const volume = program.command('volume').description('volumes (made and deleted by CSI)');
  volume.command('list').alias('ls').description('all volumes').action(list);
  volume.command('show <volume>').description('one volume, by name, UUID or handle').action(show);
}
