// The specs, in the order they run. Each is a sentence that it proves, cleans up its own objects, and names them after itself.
import { accessSpecs } from './access.mjs';
import { failureSpecs } from './failures.mjs';
import { scaleSpecs } from './scale.mjs';
import { snapshotSpecs } from './snapshots.mjs';
import { upgradeSpecs } from './upgrades.mjs';
import { volumeSpecs } from './volumes.mjs';

export const specs = [...volumeSpecs, ...accessSpecs, ...snapshotSpecs, ...scaleSpecs, ...upgradeSpecs, ...failureSpecs];
/** Before the chart is there, and when it is gone. */
export { refusalSpecs } from './refusals.mjs';
export { residueSpecs } from './residue.mjs';
