// A process that owns an engine, driven by its parent over IPC (advanced serialization, so bigints pass): what tests
// kill, stop and restart. Plain JavaScript, so that it starts without a loader.
//
// A message {id, op, args} is answered by {id, result} or {id, error: {code, message}}; events come as {event}.
import { createRequire } from 'node:module';
import { isMainThread, parentPort } from 'node:worker_threads';

// oxlint-disable-next-line unicorn/require-post-message-target-origin -- a worker thread, not a window
const send = isMainThread ? (message) => process.send(message) : (message) => parentPort.postMessage(message);
const source = isMainThread ? process : parentPort;

const native = createRequire(import.meta.url)(process.env.HOLDFAST_NATIVE ?? '../../build/Release/holdfast.node');

let engine;
/** Stands in for the metadata service: gives `batch` slabs whenever the engine runs low, from `next` on. */
let supply;

const pools = () => engine.pools();
const pool = (uuid) => {
  const found = pools().find((candidate) => candidate.info.uuid === uuid);
  if (!found) throw Object.assign(new Error(`no pool ${uuid}`), { code: 'TEST_NO_POOL' });
  return found;
};
const volume = (uuid, id) => {
  const found = pool(uuid)
    .volumes()
    .find((candidate) => candidate.spec.volumeId === id);
  if (!found) throw Object.assign(new Error(`no volume ${id}`), { code: 'TEST_NO_VOLUME' });
  return found;
};
const describe = (opened) => ({ spec: opened.spec, export: opened.export });

function give(target, count) {
  target.addSlabs([{ first: supply.next, count, generation: supply.generation }]);
  supply.next += BigInt(count);
}

function onEvent(event) {
  if (event.type === 'slabs-low' && supply) {
    try {
      if (supply.next >= supply.end) pool(event.pool).declareFull();
      else give(pool(event.pool), Math.min(supply.batch, Number(supply.end) - Number(supply.next)));
    } catch (error) {
      send({ event: { type: 'test-error', message: String(error) } });
    }
  }
  send({ event });
}

const ops = {
  async create(options) {
    engine = await native.createEngine({ stateDir: '/', ...options, onEvent });
  },
  // What ran low before is served now.
  supply(next) {
    supply = next;
    if (!supply) return;
    for (const target of pools()) {
      if (target.stock().length === 0 && supply.next < supply.end) give(target, supply.batch);
    }
  },
  give: (uuid, count) => give(pool(uuid), count),
  async adopt() {
    const adopted = await engine.adopt();
    return adopted.map((p) => ({
      uuid: p.info.uuid,
      hostId: p.hostId,
      generation: p.generation,
      stock: p.stock(),
      volumes: p.volumes().map(describe),
    }));
  },
  async openPool(options) {
    const opened = await engine.openPool(options);
    if (pool(options.uuid) !== opened) throw new Error('pools() gives another object than openPool()');
    return opened.info;
  },
  openVolume: async (uuid, spec, options) => describe(await pool(uuid).openVolume(spec, options)),
  volume: (uuid, id) => describe(volume(uuid, id)),
  volumeCall: (uuid, id, method, ...args) => volume(uuid, id)[method](...args),
  poolCall: (uuid, method, ...args) => pool(uuid)[method](...args),
  engineCall: (method, ...args) => engine[method](...args),
  poolCount: () => pools().length,
  volumeCount: (uuid) => pool(uuid).volumes().length,
  memory: () => process.memoryUsage().rss,
  async collect() {
    for (let i = 0; i < 5; i += 1) {
      globalThis.gc();
      await new Promise((resolve) => {
        setTimeout(resolve, 10);
      });
    }
  },
  exit(code) {
    process.exit(code);
  },
};

source.on('message', async ({ id, op, args }) => {
  try {
    const result = await ops[op](...args);
    send({ id, result });
  } catch (error) {
    send({ id, error: { code: error.code, message: error.message } });
  }
});
if (isMainThread) process.on('disconnect', () => process.exit(0));
send({ ready: true });
