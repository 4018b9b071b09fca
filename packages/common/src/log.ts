/** Structured logs on stderr, one JSON object a line; stdout stays free for what a command prints. */
import { destination, pino, type Logger } from 'pino';

export type { Logger };

/** `role` is the process: metadata-service, csi-controller, csi-node, agent. Level from HOLDFAST_LOG_LEVEL (info). */
export function createLogger(role: string, bindings: Record<string, unknown> = {}): Logger {
  return pino(
    { level: process.env['HOLDFAST_LOG_LEVEL'] ?? 'info', base: { role, ...bindings } },
    destination({ fd: 2, sync: true }),
  );
}
