import { describe, expect, it } from 'vitest';
import { secretFields, withoutSecrets } from './secrets.ts';

describe('withoutSecrets', () => {
  it('knows every request that carries secrets', () => {
    expect(secretFields.size).toBe(19);
    expect([...secretFields.keys()].every((name) => name.endsWith('Request'))).toBe(true);
  });

  it('masks the values of secret fields and leaves the rest and the original alone', () => {
    const request = {
      volume_id: 'a/b',
      secrets: { passphrase: 'hunter2' },
      volume_capability: { mount: { fs_type: 'ext4' } },
    };
    const safe = withoutSecrets('csi.v1.NodeStageVolumeRequest', request);
    expect(JSON.stringify(safe)).not.toContain('hunter2');
    expect(safe).toEqual({ ...request, secrets: { passphrase: '[secret]' } });
    expect(request.secrets.passphrase).toBe('hunter2');
  });

  it('refuses a message type that it does not know', () => {
    expect(() => withoutSecrets('csi.v1.NoSuchRequest', {})).toThrow(/NoSuchRequest/);
  });
});
