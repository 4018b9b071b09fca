/** What each stable code means and what to do about it. docs/errors.md is made from this table (`renderErrorsDoc`). */
import { status } from '@grpc/grpc-js';
import { errorCodes, type ErrorCode } from './errors.ts';

interface Help {
  readonly meaning: string;
  readonly action: string;
}

/** Codes of the services, the CSI plugins and the CLI. */
export const errorHelp: Record<ErrorCode, Help> = {
  INVALID_ARGUMENT: {
    meaning: 'A parameter, size, name or option is unknown, malformed or contradicts another.',
    action: 'Correct what the message names; repeating the same call fails the same way.',
  },
  OUT_OF_RANGE: {
    meaning:
      'A size is outside what the pool, the format or the limit of the call allows, or a volume would shrink.',
    action: 'Ask for a size inside the range that the message names.',
  },
  NOT_FOUND: {
    meaning: 'No volume, node or pool of this name or id is known.',
    action: 'Check the id with `holdfast volume list`, `node list` or `pool list`.',
  },
  ALREADY_EXISTS: {
    meaning:
      'The name stands for a volume of another size or other parameters, or the volume is already published in another way.',
    action: 'Choose another name, or ask for what exists.',
  },
  FAILED_PRECONDITION: {
    meaning: 'The object is not in a state that allows this.',
    action: 'Do what the message says first, then repeat the call.',
  },
  STALE: {
    meaning: 'The message carries an old term, generation or epoch. Nothing was changed.',
    action: 'Nothing: the sender has been replaced. A live agent learns its new state by itself.',
  },
  PUBLISHED_ELSEWHERE: {
    meaning: 'The volume is published to another node.',
    action: 'Unpublish it there first (Kubernetes does that when the pod has gone).',
  },
  IN_USE: {
    meaning: 'The volume is granted, published, mounted or held open.',
    action: 'Stop what uses it, then repeat the call.',
  },
  FENCE_NEEDS_CONFIRMATION: {
    meaning: "The pool's fencing class has no proof of its own that a silent node is off.",
    action: 'Make sure that the machine is off, then run `holdfast node confirm-off NODE`.',
  },
  FENCED: {
    meaning: 'This host generation or this volume is fenced: it may issue no more I/O.',
    action: 'Unmount it. The node joins again under a new generation when none of its volumes is in use.',
  },
  NO_SPACE: {
    meaning: 'The pool has no free slab or record slot left.',
    action: 'Delete volumes, trim file systems (fstrim), or grow the device.',
  },
  POOL_DRAINING: {
    meaning:
      'The pool is being drained: no new volume, copy or restore is placed on it. What is there goes on.',
    action: 'Use another pool, or take the drain back with `holdfast pool undrain POOL`.',
  },
  TOO_MANY: {
    meaning: 'A limit on the number of objects is reached: volumes per node, hosts per pool.',
    action: 'Spread the load, or raise the limit that the message names.',
  },
  OPERATION_PENDING: {
    meaning: 'Another call for the same object is under way.',
    action: 'Repeat the call a little later.',
  },
  BAD_TOKEN: {
    meaning: 'A paging token was not made by this service.',
    action: 'Start the listing again without a token.',
  },
  UNAVAILABLE: {
    meaning: 'A part that is needed can not be reached now.',
    action: 'Repeat the call. What is open goes on meanwhile.',
  },
  DEADLINE_EXCEEDED: {
    meaning: 'The call took longer than its caller allowed. What it began goes on.',
    action: 'Repeat the call: it joins what is under way.',
  },
  KUBERNETES_REFUSED: {
    meaning:
      'The Kubernetes API does not let the controller do what it needs for moving pods off dead nodes. Nothing was changed.',
    action: 'Give its service account the rights of docs/kubernetes-safety.md (the chart does).',
  },
  KUBERNETES_UNAVAILABLE: {
    meaning: 'The Kubernetes API did not answer the controller. Nobody is fenced for that.',
    action: 'Nothing: it is asked again. If it lasts, look at the API server and the network between.',
  },
  UNIMPLEMENTED: {
    meaning: 'This version does not have the feature.',
    action: 'Do without it, or upgrade.',
  },
  CORRUPT: {
    meaning: 'Metadata on the disk fails its check in both copies. It was not followed.',
    action: 'Run `holdfast pool check`; it names the volume and the range. Data outside it is intact.',
  },
  INTERNAL: {
    meaning: 'A fault in Holdfast or in the system below it.',
    action: 'Look at the log of the process that the message names, and report it.',
  },
};

/** Codes of the native engine: `error.code` is HF_ and this name (native/src/core/status.h). */
export const nativeErrorHelp: Record<string, Help> = {
  HF_INVALID_ARGUMENT: {
    meaning: "The engine refuses the caller's words.",
    action: 'Correct what the message names.',
  },
  HF_NOT_FOUND: { meaning: 'No such device, record or volume.', action: 'Check the path or id.' },
  HF_ALREADY_EXISTS: { meaning: 'It is there already.', action: 'Nothing, or choose another name.' },
  HF_BUSY: {
    meaning: 'The device is mounted or open, or another process holds it.',
    action: 'Unmount it or end what holds it; the message names it where the kernel tells.',
  },
  HF_NOT_A_POOL: {
    meaning: 'Neither superblock copy is valid.',
    action: 'Check the path; `holdfast pool format` makes a new pool.',
  },
  HF_WRONG_POOL: {
    meaning: 'The device carries another pool, or is a copy of one (same UUID, other WWID).',
    action: 'Detach the copy, or point to the right device.',
  },
  HF_UNSUPPORTED: {
    meaning: 'A newer format version or a feature that this version does not know.',
    action: 'Upgrade Holdfast on this node.',
  },
  HF_CORRUPT: { meaning: 'Both copies of a page fail their check.', action: 'Run `holdfast pool check`.' },
  HF_FOREIGN_DATA: {
    meaning: 'The device holds something that is not ours.',
    action: 'Check that it is the right device; `--force` overwrites it.',
  },
  HF_TOO_SMALL: {
    meaning: 'The device is smaller than the smallest pool.',
    action: 'Use a device of the size named.',
  },
  HF_NO_SPACE: { meaning: 'No slab, slot or memory is left.', action: 'Free space or grow the device.' },
  HF_IO: {
    meaning: 'The device answered with an error.',
    action: 'Look at the kernel log and the path to the disk.',
  },
  HF_FENCED: {
    meaning: 'This host generation is fenced.',
    action: 'Unmount; the agent joins again by itself.',
  },
  HF_STALE: {
    meaning: 'The disk shows a newer epoch, generation or claim.',
    action: 'Nothing: another holder is right.',
  },
  HF_LEASE_EXPIRED: {
    meaning: 'The lease on the pool is not valid now.',
    action: 'Check the path to the disk; I/O is held and goes on when the lease is renewed.',
  },
  HF_UNAVAILABLE: { meaning: 'Not now.', action: 'Repeat the call.' },
  HF_HOLD_EXPIRED: {
    meaning: 'Writes were held for a snapshot for longer than agreed. They go on, and nothing was cut.',
    action: 'Repeat the snapshot, or allow more time.',
  },
};

/** The text of docs/errors.md. */
export function renderErrorsDoc(): string {
  const row = (cells: string[]): string => `| ${cells.join(' | ')} |`;
  const services = Object.entries(errorHelp).map(([code, help]) =>
    row([`\`${code}\``, status[errorCodes[code as ErrorCode]], help.meaning, help.action]),
  );
  const native = Object.entries(nativeErrorHelp).map(([code, help]) =>
    row([`\`${code}\``, help.meaning, help.action]),
  );
  return [
    '# Errors',
    '',
    'Made from packages/common/src/error-help.ts by `UPDATE_DOCS=1 pnpm test error-help`. Every error that reaches a person says what',
    'happened, to what, and what to do next; this page has a row for each stable code.',
    '',
    '## Services, CSI and the command line',
    '',
    'The code travels in the gRPC trailer `holdfast-code`; `-o json` prints it as `code`.',
    '',
    row(['code', 'gRPC status', 'meaning', 'what to do']),
    row(['---', '---', '---', '---']),
    ...services,
    '',
    '## The native engine',
    '',
    row(['code', 'meaning', 'what to do']),
    row(['---', '---', '---']),
    ...native,
    '',
  ].join('\n');
}
