// Claims and pods: writing, moving, file systems, raw block, groups of pods.
import assert from 'node:assert/strict';
import { digest, writeNoise } from '../lib/holdfast.mjs';
import { until } from '../lib/shell.mjs';

function movesWith(storageClass, fsType) {
  return {
    name: `a claim of ${storageClass} becomes a volume with ${fsType} whose data is there after its pod moved to another node`,
    body: async ({ holdfast }) => {
      const name = `move-${fsType}`;
      await holdfast.claim(name, { storageClass });
      await holdfast.pod(`${name}-a`, name, { node: 'node-2' });
      assert.match(await holdfast.sh(`${name}-a`, 'grep " /data " /proc/mounts'), new RegExp(` ${fsType} `));
      const written = await writeNoise(holdfast, `${name}-a`, '/data/file');
      await holdfast.deletePod(`${name}-a`);
      await holdfast.pod(`${name}-b`, name, { node: 'node-3' });
      assert.equal(await digest(holdfast, `${name}-b`, '/data/file'), written);
      await holdfast.deletePod(`${name}-b`);
      await holdfast.deleteClaims(name);
    },
  };
}

export const volumeSpecs = [
  movesWith('holdfast', 'ext4'),
  movesWith('holdfast-xfs', 'xfs'),
  movesWith('holdfast-btrfs', 'btrfs'),
  {
    name: 'a raw block volume reads back on another node what was written to it, and zeros where nothing was',
    body: async ({ holdfast }) => {
      await holdfast.claim('raw', { mode: 'Block', size: '256Mi' });
      await holdfast.pod('raw-a', 'raw', { node: 'node-1', block: true });
      assert.equal(await holdfast.sh('raw-a', 'blockdev --getsize64 /dev/data'), String(256 << 20));
      const written = await holdfast.sh('raw-a', 'dd if=/dev/urandom of=/dev/data bs=1M seek=100 count=8 conv=fsync 2>/dev/null; dd if=/dev/data bs=1M skip=100 count=8 2>/dev/null | sha256sum');
      await holdfast.deletePod('raw-a');
      await holdfast.pod('raw-b', 'raw', { node: 'node-2', block: true });
      assert.equal(await holdfast.sh('raw-b', 'dd if=/dev/data bs=1M skip=100 count=8 2>/dev/null | sha256sum'), written);
      assert.equal(await holdfast.sh('raw-b', 'dd if=/dev/data bs=1M count=8 2>/dev/null | tr -d "\\0" | wc -c'), '0');
      await holdfast.deletePod('raw-b');
      await holdfast.deleteClaims('raw');
    },
  },
  {
    name: 'a pod that is not root writes by its fsGroup',
    body: async ({ holdfast }) => {
      await holdfast.claim('group');
      await holdfast.pod('group', 'group', { securityContext: { runAsUser: 1234, runAsGroup: 1234, fsGroup: 5678 } });
      await holdfast.sh('group', 'echo mine > /data/file');
      assert.equal(await holdfast.sh('group', 'stat -c %u:%g /data/file'), '1234:5678');
      await holdfast.deletePod('group');
      await holdfast.deleteClaims('group');
    },
  },
  {
    name: 'a ReadWriteOnce volume that runs on one node starts on no other, and does when its pod is gone',
    body: async ({ cluster, holdfast }) => {
      await holdfast.claim('once');
      await holdfast.pod('once-a', 'once', { node: 'node-1' });
      await holdfast.sh('once-a', 'echo first > /data/file && sync');
      const second = holdfast.pod('once-b', 'once', { node: 'node-2' });
      second.catch(() => undefined);
      await until('the second attachment to be refused', async () => {
        const { items } = await cluster.get('events', '--field-selector', 'involvedObject.name=once-b,type=Warning');
        return items.some(({ reason }) => reason === 'FailedAttachVolume' || reason === 'FailedMount');
      });
      assert.equal(await holdfast.sh('once-a', 'cat /data/file'), 'first');
      await holdfast.deletePod('once-a');
      await second;
      assert.equal(await holdfast.sh('once-b', 'cat /data/file'), 'first');
      await holdfast.deletePod('once-b');
      await holdfast.deleteClaims('once');
    },
  },
  {
    name: 'a claim takes its VolumeAttributesClass, and another one later; one with an unknown parameter is refused with an event',
    body: async ({ cluster, holdfast }) => {
      await holdfast.claim('attributes', { storageClass: 'holdfast-now', attributesClass: 'holdfast-stays' });
      const current = (name) => async () => {
        const { status } = await cluster.get('pvc', 'attributes');
        return status.phase === 'Bound' && status.currentVolumeAttributesClassName === name;
      };
      const change = (name) => cluster.kubectl(['patch', 'pvc', 'attributes', '--patch', JSON.stringify({ spec: { volumeAttributesClassName: name } })]);
      await until('the claim to be bound with its class', current('holdfast-stays'));
      const { csi } = (await cluster.get('pv', (await cluster.get('pvc', 'attributes')).spec.volumeName)).spec;
      const parameters = async () => (await holdfast.cli('volume', 'show', csi.volumeHandle)).mutableParameters;
      assert.deepEqual(await parameters(), { 'holdfast.io/evict': 'false' });
      await change('holdfast-moves');
      await until('the claim to have its second class', current('holdfast-moves'));
      assert.deepEqual(await parameters(), { 'holdfast.io/evict': 'true' });
      await change('holdfast-unknown');
      await until('the unknown parameter to be refused', async () => {
        const { items } = await cluster.get('events', '--field-selector', 'involvedObject.name=attributes,type=Warning');
        return items.some(({ reason, message }) => reason === 'VolumeModifyFailed' && /Unknown mutable parameter "iops"\. Known: holdfast\.io\/evict/.test(message));
      });
      assert.equal((await cluster.get('pvc', 'attributes')).status.currentVolumeAttributesClassName, 'holdfast-moves');
      assert.deepEqual(await parameters(), { 'holdfast.io/evict': 'true' });
      await holdfast.deleteClaims('attributes');
    },
  },
  {
    name: 'storage capacity is published for each class, so that the scheduler sees how much room a pool has',
    body: async ({ cluster }) => {
      await until('CSIStorageCapacity objects', async () => {
        const { items } = await cluster.get('csistoragecapacities', '--all-namespaces');
        return items.some(({ storageClassName, capacity }) => storageClassName === 'holdfast' && capacity !== undefined && capacity !== '0');
      });
    },
  },
];
