import { Metadata, status, type ServiceError } from '@grpc/grpc-js';
import { describe, expect, it } from 'vitest';
import type { Logger } from '../log.ts';
import { HoldfastError } from '../errors.ts';
import type { CallContext } from '../grpc.ts';
import { csiUnary, csiUnimplemented } from './handlers.ts';

function capture() {
  const lines: string[] = [];
  const write = (...parts: unknown[]): void => void lines.push(JSON.stringify(parts));
  const logger = { isLevelEnabled: () => true, debug: write, info: write, error: write } as unknown as Logger;
  return { lines, logger };
}

function invoke(
  handler: ReturnType<typeof csiUnary>,
  request: object,
  deadline: Date | number = Infinity,
): Promise<{ error: Partial<ServiceError> | null; response: unknown }> {
  return new Promise((resolve) => {
    const call = { request, metadata: new Metadata(), on: () => undefined, getDeadline: () => deadline };
    handler(call as never, (error, response) => resolve({ error, response }));
  });
}

describe('csiUnary', () => {
  it('logs every request without its secrets, also when the call fails', async () => {
    const { lines, logger } = capture();
    const request = { volume_id: 'a/b', secrets: { passphrase: 'hunter2' } };
    const handler = csiUnary<object, object>(logger, 'NodeStageVolume', async () => {
      throw new HoldfastError('NOT_FOUND', 'no such volume');
    });
    const { error } = await invoke(handler as ReturnType<typeof csiUnary>, request);
    expect(error?.code).toBe(status.NOT_FOUND);
    expect(lines.join()).toContain('a/b');
    expect(lines.join()).toContain('passphrase');
    expect(lines.join()).not.toContain('hunter2');
  });

  it('tells the handler how much of its time is left', async () => {
    const { logger } = capture();
    const left: (number | undefined)[] = [];
    const handler = csiUnary<object, object>(logger, 'Probe', async (_: object, context: CallContext) => {
      left.push(context.timeLeftMs());
      return {};
    });
    await invoke(handler as ReturnType<typeof csiUnary>, {}, new Date(Date.now() + 5000));
    await invoke(handler as ReturnType<typeof csiUnary>, {}, Infinity);
    expect(left[0]).toBeGreaterThan(4000);
    expect(left[0]).toBeLessThanOrEqual(5000);
    expect(left[1]).toBeUndefined();
  });

  it('answers UNIMPLEMENTED in words', async () => {
    const { logger } = capture();
    const handler = csiUnimplemented<object, object>(logger, 'CreateSnapshot', 'not in this version.');
    const { error } = await invoke(handler as ReturnType<typeof csiUnary>, {});
    expect(error).toMatchObject({
      code: status.UNIMPLEMENTED,
      details: expect.stringMatching(/not in this version/) as unknown,
    });
  });
});
