/** Makes a pool ours for this term: an agent that sees it writes the authority page, waits, and reads it back. */
import type { PoolRecord } from '../model/records.ts';
import { tables } from '../model/records.ts';
import { poolClaimed, poolClaiming } from '../model/pools.ts';
import type { Core } from './core.ts';
import { OrderFailed, type Session, type Sessions } from './sessions.ts';

/**
 * How long a rival that looked at the page before our write may take to write its own. On one machine it is the kernel's
 * queue; elsewhere as long as a host may sit on a page that it has read: one renewal.
 */
function rivalMs(pool: PoolRecord): number {
  return pool.fencing === 'loop' ? 50 : pool.renewIntervalMs;
}

const staleCodes = ['HF_STALE', 'STALE'];

export async function claimPool(core: Core, sessions: Sessions, poolUuid: string): Promise<void> {
  const pool = core.read((tx) => tables.pool.get(tx, poolUuid));
  const [session] = sessions
    .all()
    .filter((candidate) => candidate.pools.has(poolUuid))
    .sort((a, b) => a.lastFailureMs - b.lastFailureMs);
  if (pool === undefined || session === undefined) return;
  const waitMs = rivalMs(pool);
  await core.decide((d) => poolClaiming(d, poolUuid));
  try {
    await sessions.order(
      session.nodeId,
      poolUuid,
      { claim_authority: { store_id: core.service.storeId, wait_ms: waitMs } },
      waitMs + 15_000,
    );
  } catch (error) {
    if (!(error instanceof OrderFailed) || !staleCodes.includes(error.code)) throw error;
    const message =
      `Pool ${pool.name} (${poolUuid}) was claimed by another metadata service, or under a newer term than ` +
      `${core.service.term}: ${error.message} Nothing is granted on it. Stop this service and start the one with the ` +
      'newest database.';
    core.refusals.set(poolUuid, message);
    core.logger.error({ pool: poolUuid }, message);
    core.changed();
    return;
  }
  await core.decide((d) => poolClaimed(d, session.nodeId, poolUuid));
  core.logger.info(
    { pool: poolUuid, node: session.nodeId, term: core.service.term.toString() },
    'Claimed the pool',
  );
  for (const other of sessions.all()) other.welcome(core, acceptedPools(core, other));
}

/** Pools that a node may join now: it sees the device, and the page is ours in this term. */
export function acceptedPools(core: Core, session: Session): string[] {
  return core.read((tx) =>
    [...session.pools.keys()].filter((uuid) => {
      const pool = tables.pool.get(tx, uuid);
      return (
        pool?.state === 'ACTIVE' &&
        !pool.removing &&
        pool.claimed?.term === core.service.term &&
        pool.claimed.incarnation === core.service.incarnation &&
        !core.refusals.has(uuid)
      );
    }),
  );
}
