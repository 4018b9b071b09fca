/** How `dev start-node` and the like reach a running `dev up`: one JSON line each way on D/dev.sock. */
import { rmSync } from 'node:fs';
import { createConnection, createServer, type Server } from 'node:net';
import { createInterface } from 'node:readline';
import { HoldfastError } from '@holdfast/common';

export interface ControlCommand {
  command: string;
  node?: number;
}

interface ControlAnswer {
  error?: string;
}

export class ControlServer {
  readonly #server: Server;

  private constructor(server: Server) {
    this.#server = server;
  }

  static listen(path: string, handle: (command: ControlCommand) => Promise<unknown>): Promise<ControlServer> {
    rmSync(path, { force: true });
    const server = createServer((socket) => {
      socket.on('error', () => undefined);
      createInterface({ input: socket }).on('line', (line) => {
        const answer = async (): Promise<ControlAnswer> => {
          try {
            await handle(JSON.parse(line) as ControlCommand);
            return {};
          } catch (error) {
            return { error: error instanceof Error ? error.message : String(error) };
          }
        };
        void answer().then((result) => socket.end(`${JSON.stringify(result)}\n`));
      });
    });
    return new Promise((resolve, reject) => {
      server.once('error', reject);
      server.listen(path, () => resolve(new ControlServer(server)));
    });
  }

  close(): Promise<void> {
    return new Promise((resolve) => {
      this.#server.close(() => resolve());
    });
  }
}

/** Sends one command and waits for its end. @throws what the other side threw. */
export function sendControl(path: string, command: ControlCommand): Promise<void> {
  return new Promise((resolve, reject) => {
    const socket = createConnection(path);
    let text = '';
    socket.setEncoding('utf8');
    socket.on('error', (error) => reject(error));
    socket.on('data', (data: string) => {
      text += data;
    });
    socket.on('end', () => {
      const answer = text === '' ? { error: 'no answer' } : (JSON.parse(text) as ControlAnswer);
      if (answer.error === undefined) resolve();
      else reject(new HoldfastError('FAILED_PRECONDITION', answer.error));
    });
    socket.write(`${JSON.stringify(command)}\n`);
  });
}
