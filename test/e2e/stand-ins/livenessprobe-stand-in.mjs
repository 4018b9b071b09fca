// Does what livenessprobe does, with the same flags: answers GET /healthz with the plugin's own Probe. Only for tests: that sidecar is not to
// be had as a Go module.
import './end.mjs';
import { createServer } from 'node:http';
import { parseArgs } from 'node:util';
import { credentials } from '@grpc/grpc-js';
import { csi } from '@holdfast/proto';

const { values } = parseArgs({ options: { 'csi-address': { type: 'string' }, 'http-endpoint': { type: 'string', default: ':9808' } } });
const identity = new csi.Identity(`unix:${values['csi-address']}`, credentials.createInsecure());

createServer((_, response) => {
  identity.Probe({}, { deadline: Date.now() + 1000 }, (error, answer) => {
    const good = error === null && answer.ready?.value !== false;
    response.writeHead(good ? 200 : 500).end(good ? 'ok' : (error?.details ?? 'not ready'));
  });
}).listen(Number(values['http-endpoint'].split(':').pop()));
