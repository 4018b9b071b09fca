/**
 * The node plugin as a process that kills itself at one step: `crashing-node.ts ENDPOINT AGENT STATE_DIR STEP NTH`.
 * SIGKILL, so nothing is cleaned up, closed or flushed.
 */
import { startCsiNode } from '../src/csi/index.ts';

const [endpoint = '', agent = '', stateDir = '', step = '', nth = '1'] = process.argv.slice(2);
let seen = 0;

await startCsiNode({
  endpoint,
  agent,
  stateDir,
  step: async (name) => {
    if (name !== step) return;
    seen += 1;
    if (seen !== Number(nth)) return;
    process.kill(process.pid, 'SIGKILL');
    await new Promise(() => undefined);
  },
});
