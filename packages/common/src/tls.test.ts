import { expect, test } from 'vitest';
import { clientCredentials } from './tls.ts';

test('no file at all means no TLS', () => {
  expect(clientCredentials({})).toBeUndefined();
  expect(clientCredentials({ tlsCa: '', tlsCert: '', tlsKey: '' })).toBeUndefined();
});

test('some of the three files are refused, because a channel without TLS would be opened silently', () => {
  expect(() => clientCredentials({ tlsCa: '/ca.crt' })).toThrow(/all of --tls-ca, --tls-cert and --tls-key/);
  expect(() => clientCredentials({ tlsCert: '/a', tlsKey: '/b', tlsCa: '' })).toThrow(/all of/);
});

test('a file that cannot be read is named with its flag', () => {
  expect(() => clientCredentials({ tlsCa: '/nowhere/ca', tlsCert: '/nowhere/cert', tlsKey: '/k' })).toThrow(
    /--tls-ca \/nowhere\/ca cannot be read/,
  );
});
