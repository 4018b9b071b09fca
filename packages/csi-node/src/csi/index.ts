export { startCsiNode, type CsiNodeOptions, type RunningCsiNode } from './server.ts';
