/**
 * Every mutation carries a request id; its first answer is stored with the change itself, and a repeat gets it again. At most
 * `answerLimit` answers are kept, the oldest go first.
 */
import { createHash } from 'node:crypto';
import { HoldfastError } from '@holdfast/common';
import type { Value } from '../store/store.ts';
import type { Decision } from './decision.ts';
import { tables } from './records.ts';

export const answerLimit = 20_000n;

export interface Answer<T> {
  answer: T;
  /** The request was answered before, and nothing was done now. */
  repeated: boolean;
}

/** Runs `body` unless this request id has its answer already. */
export function once<T extends Value>(
  d: Decision,
  method: string,
  request: { request_id: string },
  body: () => T,
): Answer<T> {
  const id = request.request_id;
  if (id === '' || id.length > 128) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `${method} needs a request_id (a UUID drawn by the caller, the same one when it repeats the call).`,
    );
  }
  const digest = createHash('sha256').update(JSON.stringify(request)).digest('base64');
  const known = tables.answer.get(d.tx, id);
  if (known !== undefined) {
    if (known.method !== method || known.digest !== digest) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `request_id ${id} was used for another ${known.method} request. Draw a new UUID for each request.`,
      );
    }
    return { answer: known.answer as T, repeated: true };
  }
  const answer = body();
  const sequence = (tables.counter.get(d.tx, 'answer') ?? 0n) + 1n;
  tables.counter.put(d.tx, sequence, 'answer');
  tables.answer.put(d.tx, { method, digest, answer, atUnixMs: d.nowUnixMs }, id);
  tables.answerOrder.put(d.tx, id, sequence);
  const oldest = sequence > answerLimit ? tables.answerOrder.get(d.tx, sequence - answerLimit) : undefined;
  if (oldest !== undefined) {
    tables.answer.delete(d.tx, oldest);
    tables.answerOrder.delete(d.tx, sequence - answerLimit);
  }
  return { answer, repeated: false };
}
