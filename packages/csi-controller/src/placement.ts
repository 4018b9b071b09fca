/** Where a new volume may go: the pool that the parameters name, within what the topology requirement allows. */
import { HoldfastError, isUuid, poolsOfTopology } from '@holdfast/common';
import type { Csi, Pool__Output } from '@holdfast/proto';

/** A pool by its name or UUID. @throws INVALID_ARGUMENT naming the known ones. */
export function poolNamed(pools: readonly Pool__Output[], name: string): Pool__Output {
  const found = pools.filter((pool) => pool.uuid === name || pool.name === name);
  if (found.length === 1) return found[0] as Pool__Output;
  const known = pools.map((pool) => `${pool.name} (${pool.uuid})`).join(', ') || 'none yet';
  throw new HoldfastError(
    'INVALID_ARGUMENT',
    found.length > 1
      ? `${found.length} pools are named "${name}". Name the UUID in the parameter "pool": ${known}.`
      : `Parameter "pool" names "${name}", which no node has reported. Known pools: ${known}. Correct the StorageClass, or start an agent that sees the pool's device.`,
  );
}

const uuidsOf = (terms: readonly Csi.Topology__Output[]): string[] =>
  terms.flatMap((term) => poolsOfTopology(term.segments)).filter(isUuid);

/**
 * Groups of pool UUIDs in the order in which they should be tried. Within a group the service takes the emptiest pool. A
 * term with several of our keys is a node that reaches several pools: any of them will do.
 * An empty group means "any pool".
 * @throws RESOURCE_EXHAUSTED where the requirement leaves no pool.
 */
export function placementGroups(
  requirement: Csi.TopologyRequirement__Output | null,
  pool: Pool__Output | undefined,
): string[][] {
  const requisite = requirement?.requisite ?? [];
  const preferred = requirement?.preferred ?? [];
  const within = (uuids: string[]): string[] =>
    pool === undefined ? uuids : uuids.filter((uuid) => uuid === pool.uuid);
  const allowed =
    requisite.length > 0 ? within(uuidsOf(requisite)) : pool !== undefined ? [pool.uuid] : undefined;
  if (allowed !== undefined && allowed.length === 0) {
    throw new HoldfastError(
      'TOO_MANY',
      pool === undefined
        ? 'No node in the accessibility requirements reaches a Holdfast pool. Check the agents of those nodes (holdfast node list).'
        : `No node in the accessibility requirements reaches pool ${pool.name} (${pool.uuid}). Allow a node that does, or choose another pool.`,
    );
  }
  const groups = preferred
    .map((term) => within(uuidsOf([term])).filter((uuid) => allowed === undefined || allowed.includes(uuid)))
    .filter((group) => group.length > 0);
  groups.push(allowed ?? []);
  const seen = new Set<string>();
  return groups
    .map((group) => [...new Set(group)].sort())
    .filter((group) => {
      const key = group.join();
      const fresh = !seen.has(key);
      seen.add(key);
      return fresh;
    });
}

/** Whether a volume in `poolUuid` is what the requirement asks for. */
export function isAccessible(requirement: Csi.TopologyRequirement__Output | null, poolUuid: string): boolean {
  const requisite = requirement?.requisite ?? [];
  return requisite.length === 0 || uuidsOf(requisite).includes(poolUuid);
}
