// Does what node-driver-registrar does for the kubelet, with the same flags: offers the plugin's socket on the kubelet's registration
// socket. Only for tests: that sidecar is not to be had as a Go module.
import './end.mjs';
import { unlinkSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { Client, credentials, Server, ServerCredentials } from '@grpc/grpc-js';
import * as loader from '@grpc/proto-loader';
import { csi } from '@holdfast/proto';

const { values } = parseArgs({ options: { 'csi-address': { type: 'string' }, 'kubelet-registration-path': { type: 'string' } } });

// k8s.io/kubelet/pkg/apis/pluginregistration/v1
const contract = loader.fromJSON(
  {
    nested: {
      pluginregistration: {
        nested: {
          PluginInfo: {
            fields: {
              type: { type: 'string', id: 1 },
              name: { type: 'string', id: 2 },
              endpoint: { type: 'string', id: 3 },
              supported_versions: { rule: 'repeated', type: 'string', id: 4 },
            },
          },
          RegistrationStatus: { fields: { plugin_registered: { type: 'bool', id: 1 }, error: { type: 'string', id: 2 } } },
          RegistrationStatusResponse: { fields: {} },
          InfoRequest: { fields: {} },
          Registration: {
            methods: {
              GetInfo: { requestType: 'InfoRequest', responseType: 'PluginInfo' },
              NotifyRegistrationStatus: { requestType: 'RegistrationStatus', responseType: 'RegistrationStatusResponse' },
            },
          },
        },
      },
    },
  },
  { keepCase: true },
);

function driverName() {
  const identity = new csi.Identity(`unix:${values['csi-address']}`, credentials.createInsecure());
  return new Promise((done, failed) => {
    identity.GetPluginInfo({}, { deadline: Date.now() + 30_000, waitForReady: true }, (error, answer) => {
      Client.prototype.close.call(identity);
      if (error) failed(error);
      else done(answer.name);
    });
  });
}

async function untilNamed() {
  for (;;) {
    try {
      return await driverName();
    } catch (error) {
      console.error(`The plugin does not answer yet: ${error.message}`);
      await new Promise((done) => setTimeout(done, 500));
    }
  }
}

const name = await untilNamed();
const socket = `/registration/${name}-reg.sock`;
try {
  unlinkSync(socket);
} catch {
  // the first start
}
const server = new Server();
server.addService(contract['pluginregistration.Registration'], {
  GetInfo: (_, answer) => answer(null, { type: 'CSIPlugin', name, endpoint: values['kubelet-registration-path'], supported_versions: ['1.0.0'] }),
  NotifyRegistrationStatus: ({ request }, answer) => {
    answer(null, {});
    console.error(request.plugin_registered ? `${name} is registered` : `The kubelet refuses ${name}: ${request.error}`);
    // Started again by the kubelet, which then tries anew, as the real one does.
    if (!request.plugin_registered) process.exit(1);
  },
});
await new Promise((done, failed) => server.bindAsync(`unix:${socket}`, ServerCredentials.createInsecure(), (error) => (error ? failed(error) : done())));
process.prependListener('SIGTERM', () => server.forceShutdown());
