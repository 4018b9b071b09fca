// Like engine-child.mjs, but the engine lives in a worker thread, which {op: 'terminate'} ends from outside.
import { Worker } from 'node:worker_threads';

const worker = new Worker(new URL('engine-child.mjs', import.meta.url));
worker.on('message', (message) => process.send(message));
worker.on('error', (error) => process.send({ event: { type: 'test-error', message: String(error) } }));
process.on('message', async (message) => {
  if (message.op === 'terminate') {
    await worker.terminate();
    process.send({ id: message.id, result: 'terminated' });
  } else {
    // oxlint-disable-next-line unicorn/require-post-message-target-origin -- a worker thread, not a window
    worker.postMessage(message);
  }
});
process.on('disconnect', () => process.exit(0));
