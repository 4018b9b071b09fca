import { describe, expect, it } from 'vitest';
import { ApiContact, KubeletLeases } from './silence.ts';

/** The API server answers every 2 s from `fromMs` up to and with `toMs`. */
function answers(contact: ApiContact, fromMs: number, toMs: number): void {
  for (let ms = fromMs; ms <= toMs; ms += 2000) contact.answered(ms);
}

describe('the silence of a kubelet', () => {
  it('is counted from the last renewal that was seen, as long as the API server answers', () => {
    const contact = new ApiContact();
    const leases = new KubeletLeases(contact);
    answers(contact, 0, 20_000);
    leases.seen('n1', '10', 4000);
    leases.seen('n1', '11', 8000);
    expect(leases.silentMs('n1', 20_000)).toBe(12_000);
    expect(leases.isAlive('n1', 13_000, 20_000)).toBe(true);
    expect(leases.isAlive('n1', 13_000, 21_000)).toBe(false);
  });

  it('does not count time in which the API server was away: nobody could renew', () => {
    const contact = new ApiContact();
    const leases = new KubeletLeases(contact);
    answers(contact, 0, 10_000);
    leases.seen('n1', '10', 10_000);
    expect(leases.silentMs('n1', 60_000)).toBe(0);
    contact.answered(60_000);
    expect(leases.silentMs('n1', 60_000)).toBe(0);
    answers(contact, 62_000, 70_000);
    expect(leases.silentMs('n1', 70_000)).toBe(10_000);
  });

  it('begins when somebody looks for the first time, and that is no sign of life', () => {
    const contact = new ApiContact();
    const leases = new KubeletLeases(contact);
    answers(contact, 0, 10_000);
    leases.seen('n1', '10', 9000);
    expect(leases.silentMs('n1', 10_000)).toBe(1000);
    expect(leases.isAlive('n1', 13_000, 10_000)).toBe(false);
  });

  it('does not begin anew with an older version that arrives late, or the same one', () => {
    const contact = new ApiContact();
    const leases = new KubeletLeases(contact);
    answers(contact, 0, 10_000);
    leases.seen('n1', '11', 1000);
    leases.seen('n1', '11', 8000);
    leases.seen('n1', '9', 8000);
    expect(leases.silentMs('n1', 10_000)).toBe(9000);
  });

  it('is unknown for a node without a Lease', () => {
    const leases = new KubeletLeases(new ApiContact());
    leases.seen('n1', '1', 0);
    leases.gone('n1');
    expect(leases.silentMs('n1', 99_000)).toBeUndefined();
  });
});
