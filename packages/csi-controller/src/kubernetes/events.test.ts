import { createLogger } from '@holdfast/common';
import { describe, expect, it } from 'vitest';
import type { Clock } from './clock.ts';
import type { Notice } from './decide.ts';
import { EventRecorder, type EventSink, type EventText } from './events.ts';

const logger = createLogger('events-test');
logger.level = 'silent';

class Sink implements EventSink {
  readonly stored = new Map<string, number>();
  failing = false;
  create({ namespace, name }: EventText): Promise<boolean> {
    if (this.failing) return Promise.reject(new Error('no'));
    const key = `${namespace}/${name}`;
    if (this.stored.has(key)) return Promise.resolve(false);
    this.stored.set(key, 1);
    return Promise.resolve(true);
  }
  repeat({ namespace, name }: EventText, count: number): Promise<boolean> {
    const key = `${namespace}/${name}`;
    if (!this.stored.has(key)) return Promise.resolve(false);
    this.stored.set(key, Math.max(count, this.stored.get(key) ?? 0));
    return Promise.resolve(true);
  }
}

function scene(): { sink: Sink; recorder: () => EventRecorder; clock: Clock & { ms: number } } {
  const clock = { ms: 0, nowMs: () => clock.ms, sleep: () => Promise.resolve(), random: () => 0.5 };
  const sink = new Sink();
  return { sink, clock, recorder: () => new EventRecorder(sink, clock, logger) };
}

const notice = (message: string, change: Partial<Notice> = {}): Notice => ({
  about: { kind: 'Pod', namespace: 'default', name: 'a', uid: 'u' },
  warning: true,
  reason: 'HoldfastEvicted',
  message,
  ...change,
});

describe('events', () => {
  it('that say the same are one, whose count grows at most once a minute', async () => {
    const { sink, clock, recorder } = scene();
    const events = recorder();
    for (let second = 0; second < 150; second++) {
      clock.ms = second * 1000;
      events.tell(notice('moved'));
      await events.flush();
    }
    expect([...sink.stored.values()]).toEqual([3]);
  });

  it('are the same one for the next leader', async () => {
    const { sink, recorder } = scene();
    for (const events of [recorder(), recorder()]) {
      events.tell(notice('moved'));
      await events.flush();
    }
    expect(sink.stored.size).toBe(1);
  });

  it('that the API server has forgotten are made again', async () => {
    const { sink, clock, recorder } = scene();
    const events = recorder();
    events.tell(notice('moved'));
    await events.flush();
    sink.stored.clear();
    clock.ms = 61_000;
    events.tell(notice('moved'));
    await events.flush();
    expect(sink.stored.size).toBe(1);
  });

  it('about one object are limited, and do not use up what another one has', async () => {
    const { sink, recorder } = scene();
    const events = recorder();
    for (let index = 0; index < 50; index++) events.tell(notice(`sentence ${index}`));
    events.tell(notice('moved', { about: { kind: 'Node', namespace: '', name: 'n1', uid: 'n' } }));
    await events.flush();
    const keys = [...sink.stored.keys()];
    expect(keys.filter((key) => key.startsWith('default/a.'))).toHaveLength(12);
    expect(keys.filter((key) => key.startsWith('default/n1.'))).toHaveLength(1);
  });

  it('that cannot be written are dropped without a fuss', async () => {
    const { sink, recorder } = scene();
    sink.failing = true;
    const events = recorder();
    events.tell(notice('moved'));
    await events.flush();
    sink.failing = false;
    events.tell(notice('moved on'));
    await events.flush();
    expect(sink.stored.size).toBe(1);
  });
});
