/** holdfast snapshot: create, list, show, delete, diff. */
import { randomUUID } from 'node:crypto';
import { call, HoldfastError, stream } from '@holdfast/common';
import type { ByteRange__Output, Snapshot__Output } from '@holdfast/proto';
import type { Command } from 'commander';
import { globals, withMetadata } from '../context.ts';
import type { MetadataApi } from '../metadata.ts';
import { age, camelKeys, formatBytes, printJson, properties, table } from '../output.ts';

/** A cut waits for the volume's holder, or for an agent that opens a closed volume. */
const cutTimeoutMs = 60_000;
/** Reading what changed takes as long as the disk does; the stream itself tells that it goes on. */
const diffTimeoutMs = 600_000;

/** The stable JSON shape of a snapshot. */
export function snapshotView(snapshot: Snapshot__Output): Record<string, unknown> {
  return {
    handle: `${snapshot.pool_uuid}/${snapshot.uuid}`,
    ...(camelKeys(snapshot) as Record<string, unknown>),
    state: snapshot.state.toLowerCase(),
    readyToUse: snapshot.state === 'READY',
  };
}

function parametersOf(snapshot: Snapshot__Output): string {
  return (
    Object.entries(snapshot.parameters)
      .map(([key, value]) => `${key}=${value}`)
      .join(', ') || '-'
  );
}

function show1(snapshot: Snapshot__Output, sourceName: string): string {
  return properties([
    ['Name', snapshot.name],
    ['Handle', `${snapshot.pool_uuid}/${snapshot.uuid}`],
    ['State', snapshot.state.toLowerCase()],
    ['Source', `${sourceName} (${snapshot.source_volume_uuid})`],
    ['Size', formatBytes(snapshot.size_bytes)],
    ['Own data', `${formatBytes(snapshot.layer_bytes)} in layer ${snapshot.layer_id}`],
    ['Group', snapshot.group_uuid || '-'],
    ['Parameters', parametersOf(snapshot)],
    ['Age', age(snapshot.created_unix_ms)],
  ]);
}

/** The volume's name; its UUID alone where it was deleted. */
async function nameOf(api: MetadataApi, volumeUuid: string): Promise<string> {
  try {
    return (await api.volume(volumeUuid)).name;
  } catch (error) {
    if (error instanceof HoldfastError && error.code === 'NOT_FOUND') return 'deleted';
    throw error;
  }
}

async function create(
  word: string,
  name: string,
  flags: { quiesce?: boolean },
  command: Command,
): Promise<void> {
  const { snapshot, source } = await withMetadata(command, async (api) => {
    const volume = await api.volume(word);
    const made = await api.run((client) =>
      call(
        client,
        client.CreateSnapshot,
        {
          request_id: randomUUID(),
          name,
          source_volume_uuid: volume.uuid,
          parameters: flags.quiesce === true ? { 'holdfast.io/quiesce': 'true' } : {},
        },
        { timeoutMs: cutTimeoutMs },
      ),
    );
    return { snapshot: made, source: volume.name };
  });
  if (globals(command).output === 'json') printJson(snapshotView(snapshot));
  else console.log(show1(snapshot, source));
}

async function list(flags: { volume?: string }, command: Command): Promise<void> {
  const { snapshots, names } = await withMetadata(command, async (api) => {
    const of = flags.volume === undefined ? undefined : await api.volume(flags.volume);
    const volumes = await api.volumes();
    return {
      snapshots: await api.snapshots(of?.uuid),
      names: new Map(volumes.map((volume) => [volume.uuid, volume.name])),
    };
  });
  if (globals(command).output === 'json') {
    printJson(snapshots.map(snapshotView));
    return;
  }
  if (snapshots.length === 0) {
    console.log('There are no snapshots.');
    return;
  }
  console.log(
    table(
      ['NAME', 'UUID', 'SOURCE', 'SIZE', 'OWN DATA', 'STATE', 'GROUP', 'AGE'],
      snapshots.map((snapshot) => [
        snapshot.name,
        snapshot.uuid,
        names.get(snapshot.source_volume_uuid) ?? `${snapshot.source_volume_uuid} (deleted)`,
        formatBytes(snapshot.size_bytes),
        formatBytes(snapshot.layer_bytes),
        snapshot.state.toLowerCase(),
        snapshot.group_uuid || '-',
        age(snapshot.created_unix_ms),
      ]),
    ),
  );
}

async function show(word: string, _flags: unknown, command: Command): Promise<void> {
  const { snapshot, source } = await withMetadata(command, async (api) => {
    const found = await api.snapshot(word);
    return { snapshot: found, source: await nameOf(api, found.source_volume_uuid) };
  });
  if (globals(command).output === 'json') printJson(snapshotView(snapshot));
  else console.log(show1(snapshot, source));
}

async function remove(word: string, _flags: unknown, command: Command): Promise<void> {
  const snapshot = await withMetadata(command, async (api) => {
    const found = await api.snapshot(word);
    if (found.group_uuid !== '') {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Snapshot ${found.name} belongs to group ${found.group_uuid} and is deleted with it (in Kubernetes: delete the VolumeGroupSnapshot).`,
      );
    }
    await api.run((client, timeoutMs) =>
      call(client, client.DeleteSnapshot, { request_id: randomUUID(), uuid: found.uuid }, { timeoutMs }),
    );
    return found;
  });
  if (globals(command).output === 'json') printJson({ deleted: snapshotView(snapshot) });
  else {
    console.log(
      `Deleted snapshot ${snapshot.name}. What only it needed is freed in the background; \`holdfast pool show\` tells what is free.`,
    );
  }
}

async function diff(
  first: string,
  second: string | undefined,
  _flags: unknown,
  command: Command,
): Promise<void> {
  const json = globals(command).output === 'json';
  const ranges: ByteRange__Output[] = [];
  const { base, target } = await withMetadata(command, async (api) => {
    const one = await api.snapshot(first);
    const base = second === undefined ? undefined : one;
    const target = second === undefined ? one : await api.snapshot(second);
    const request = { base_snapshot_uuid: base?.uuid ?? '', target_snapshot_uuid: target.uuid };
    await api.run(async (client) => {
      for await (const message of stream(client, client.ListChanges, request, { timeoutMs: diffTimeoutMs })) {
        for (const range of message.ranges) append(ranges, range);
      }
    });
    return { base, target };
  });
  const total = ranges.reduce((sum, range) => sum + BigInt(range.length), 0n);
  if (json) {
    printJson({
      base: base === undefined ? null : snapshotView(base),
      target: snapshotView(target),
      totalBytes: total.toString(),
      ranges,
    });
    return;
  }
  if (ranges.length > 0) {
    console.log(
      table(
        ['OFFSET', 'LENGTH'],
        ranges.map((range) => [range.offset, range.length]),
      ),
    );
    console.log();
  }
  const what =
    base === undefined
      ? `Snapshot ${target.name} holds`
      : `Between ${base.name} and ${target.name} there may differ`;
  console.log(
    `${what} ${formatBytes(total)} of ${formatBytes(target.size_bytes)}, in ${ranges.length} ${ranges.length === 1 ? 'range' : 'ranges'}.`,
  );
}

/** Messages end where they are full; a range that goes on in the next one is one range. */
function append(ranges: ByteRange__Output[], next: ByteRange__Output): void {
  const last = ranges.at(-1);
  if (last !== undefined && BigInt(last.offset) + BigInt(last.length) === BigInt(next.offset)) {
    last.length = (BigInt(last.length) + BigInt(next.length)).toString();
  } else {
    ranges.push(next);
  }
}

export function addSnapshotCommands(program: Command): void {
  const snapshot = program.command('snapshot').description('snapshots of volumes');
  snapshot
    .command('create <volume> <name>')
    .description('freeze what a volume holds now, under a name')
    .option('--quiesce', 'freeze the mounted file system around the cut')
    .action(create);
  snapshot
    .command('list')
    .alias('ls')
    .description('all snapshots')
    .option('--volume <volume>', 'of this volume only')
    .action(list);
  snapshot.command('show <snapshot>').description('one snapshot, by name, UUID or handle').action(show);
  snapshot
    .command('delete <snapshot>')
    .alias('rm')
    .description('drop the name; what nothing else needs is freed')
    .action(remove);
  snapshot
    .command('diff <snapshot> [other]')
    .description('which ranges may differ from an older snapshot to a newer one; with one: which hold data')
    .action(diff);
}
