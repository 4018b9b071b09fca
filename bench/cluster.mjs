// A `holdfast dev up` of its own and the CSI calls that a bench needs, over the same sockets that Kubernetes would use.
import { spawn } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import * as grpc from '@grpc/grpc-js';
import { call } from '../packages/common/dist/index.js';
import { closing } from './closing.mjs';
import { csi, holdfast } from '../packages/proto/dist/index.js';
import { renewFreeLoops } from './targets.mjs';

const insecure = grpc.credentials.createInsecure();

/** With `reclaimSeconds`, what deleted snapshots leave behind is looked at that often instead of every half minute. */
export async function startCluster(directory, { nodes = 1, size, reclaimSeconds }) {
  mkdirSync(directory, { recursive: true });
  renewFreeLoops(); // one of them becomes its disk
  const cli = new URL('../packages/cli/dist/main.js', import.meta.url).pathname;
  const reclaim = reclaimSeconds === undefined ? [] : ['--reclaim-interval', String(reclaimSeconds)];
  const child = spawn(process.execPath, [cli, 'dev', 'up', '--dir', directory, '--nodes', String(nodes), '--size', size, ...reclaim], {
    stdio: ['ignore', 'pipe', 'inherit'],
    detached: true, // an interrupt from the terminal is for the bench, which then stops it
  });
  const ended = new Promise((r) => child.once('exit', r));
  const close = closing(async () => {
    child.kill('SIGTERM');
    await ended;
  });
  let output = '';
  await new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`dev up was not ready within 60 s:\n${output}`)), 60_000);
    child.stdout.on('data', (data) => {
      output += data;
      if (/\bready\b/i.test(output)) {
        clearTimeout(timer);
        resolve();
      }
    });
    child.once('exit', (code) => {
      clearTimeout(timer);
      reject(new Error(`dev up ended with code ${code}:\n${output}`));
    });
  });
  const state = JSON.parse(readFileSync(join(directory, 'state.json'), 'utf8'));
  const metadata = new holdfast.Metadata(state.metadata, insecure);
  const controller = new csi.Controller(`unix:${join(directory, 'controller.sock')}`, insecure);
  const node = (i) => ({
    identity: new csi.Identity(`unix:${join(directory, `node-${i}`, 'csi.sock')}`, insecure),
    csi: new csi.Node(`unix:${join(directory, `node-${i}`, 'csi.sock')}`, insecure),
    agent: new holdfast.NodeAgent(`unix:${join(directory, `node-${i}`, 'agent.sock')}`, insecure),
  });
  return {
    state,
    metadata,
    controller,
    node,
    close,
  };
}

const minutes = (n) => ({ timeoutMs: n * 60_000 });
const capability = {
  access_mode: { mode: 'SINGLE_NODE_WRITER' },
  block: {},
  access_type: 'block',
};

/** Creates, publishes, stages and publishes a raw block volume on node i; the device is the target file. */
export async function attach(cluster, i, directory, name, bytes) {
  const { controller } = cluster;
  const created = await call(controller, controller.CreateVolume, {
    name,
    capacity_range: { required_bytes: String(bytes) },
    volume_capabilities: [capability],
    parameters: {},
  }, minutes(1));
  const volume = { id: created.volume.volume_id, context: created.volume.volume_context, name, node: i };
  await stage(cluster, volume, i, directory);
  return volume;
}

export async function stage(cluster, volume, i, directory) {
  const { controller } = cluster;
  const node = cluster.node(i);
  const info = await call(node.csi, node.csi.NodeGetInfo, {}, minutes(1));
  const published = await call(controller, controller.ControllerPublishVolume, {
    volume_id: volume.id, node_id: info.node_id, volume_capability: capability, volume_context: volume.context, readonly: false,
  }, minutes(1));
  volume.node = i;
  volume.nodeId = info.node_id;
  volume.stagingPath = join(directory, `stage-${volume.name}`);
  volume.device = join(directory, `device-${volume.name}`);
  if (!existsSync(volume.stagingPath)) mkdirSync(volume.stagingPath, { recursive: true });
  const common = {
    volume_id: volume.id, publish_context: published.publish_context, volume_context: volume.context,
    volume_capability: capability, staging_target_path: volume.stagingPath,
  };
  const started = performance.now();
  await call(node.csi, node.csi.NodeStageVolume, common, minutes(2));
  volume.stageMs = performance.now() - started;
  await call(node.csi, node.csi.NodePublishVolume, { ...common, target_path: volume.device, readonly: false }, minutes(2));
  volume.attachMs = performance.now() - started;
}

export async function unstage(cluster, volume) {
  const { controller } = cluster;
  const node = cluster.node(volume.node);
  await call(node.csi, node.csi.NodeUnpublishVolume, { volume_id: volume.id, target_path: volume.device }, minutes(2));
  await call(node.csi, node.csi.NodeUnstageVolume, { volume_id: volume.id, staging_target_path: volume.stagingPath }, minutes(2));
  await call(controller, controller.ControllerUnpublishVolume, { volume_id: volume.id, node_id: volume.nodeId }, minutes(2));
}

export async function destroy(cluster, volume) {
  await call(cluster.controller, cluster.controller.DeleteVolume, { volume_id: volume.id }, minutes(2));
}

/** What the agent of node i says of one open volume. */
export async function openVolumeInfo(cluster, i, volume) {
  const { agent } = cluster.node(i);
  return call(agent, agent.GetOpenVolume, { volume_uuid: volume.id.split('/')[1] }, minutes(1));
}
