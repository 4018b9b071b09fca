/** A volume's condition as the controller can see it: its pool, and the life of the node that holds it. */
import type { Csi, Pool__Output, Volume__Output } from '@holdfast/proto';

export function volumeCondition(volume: Volume__Output, pools: readonly Pool__Output[]): Csi.VolumeCondition {
  const abnormal = (message: string): Csi.VolumeCondition => ({ abnormal: true, message });
  const pool = pools.find((candidate) => candidate.uuid === volume.pool_uuid);
  if (pool === undefined) {
    return abnormal(`No node has reported pool ${volume.pool_uuid}. Start an agent that sees its device.`);
  }
  if (pool.state === 'REFUSED') return abnormal(`Pool ${pool.name} is refused: ${pool.message}`);
  const host = pool.hosts.find((candidate) => candidate.node_id === volume.granted_node_id);
  if (volume.granted_node_id !== '' && host !== undefined) {
    if (host.state === 'HOST_STATE_FENCING' || host.state === 'HOST_STATE_CUTTING') {
      return abnormal(
        `Node ${host.node_id}, which holds the volume, is being fenced (${host.fence_reason}); waiting for: ${host.waiting_for || 'the fence page'}.`,
      );
    }
  }
  if (volume.grant === 'GRANT_STATE_REVOKING') {
    return abnormal(`The right to write is being taken back from node ${volume.granted_node_id}.`);
  }
  if (BigInt(pool.slab_count) > 0n && BigInt(pool.slabs_free) === 0n) {
    return abnormal(
      `Pool ${pool.name} has no free slab left. Writes to new places wait; grow the pool or delete volumes.`,
    );
  }
  return { abnormal: false, message: 'The volume is in order.' };
}
