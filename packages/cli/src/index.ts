export { DevCluster, type DevOptions } from './dev/cluster.ts';
export { readState, type DevState, type DevNode, type DevProcess } from './dev/state.ts';
export { buildProgram } from './program.ts';
