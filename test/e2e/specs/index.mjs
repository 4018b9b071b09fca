// The specs, in the order they begin. Each is a sentence that it proves, cleans up its own objects, and names them after itself.
import { accessSpecs } from './access.mjs';
import { failureSpecs } from './failures.mjs';
import { scaleSpecs } from './scale.mjs';
import { snapshotSpecs } from './snapshots.mjs';
import { upgradeSpecs } from './upgrades.mjs';
import { volumeSpecs } from './volumes.mjs';

/** Several at one time: they mostly wait for kubelets, measure nothing and disturb nobody. The longest are first. */
export const sharedSpecs = [...snapshotSpecs, ...accessSpecs, ...volumeSpecs];
/** One after another, with nothing else in the cluster: those that measure, and those that replace or break what others need. */
export const loneSpecs = [...scaleSpecs, ...upgradeSpecs, ...failureSpecs];
/** Before the chart is there, and when it is gone. */
export { refusalSpecs } from './refusals.mjs';
export { residueSpecs } from './residue.mjs';
