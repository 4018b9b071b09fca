// The specs, in the order they run. Each is a sentence that it proves, cleans up its own objects, and names them after itself.
import { snapshotSpecs } from './snapshots.mjs';
import { upgradeSpecs } from './upgrades.mjs';
import { volumeSpecs } from './volumes.mjs';

export const specs = [...volumeSpecs, ...snapshotSpecs, ...upgradeSpecs];
