// What a bench made and must take away again, whether it ends, fails or is interrupted.
const closers = [];

/** `close` is called at the end, or when the function that this returns is called before; once. */
export function closing(close) {
  const once = async () => {
    const at = closers.indexOf(once);
    if (at < 0) return;
    closers.splice(at, 1);
    await close();
  };
  closers.push(once);
  return once;
}

/** Last made, first closed. What fails is told, and the rest is closed all the same. */
export async function closeAll() {
  for (let close = closers.at(-1); close !== undefined; close = closers.at(-1)) {
    try {
      await close();
    } catch (error) {
      console.error(`clean-up: ${error instanceof Error ? error.message : error}`);
    }
  }
}

/** Runs `body` to its end, or until SIGINT or SIGTERM; closes all. @throws what body threw, or that it was interrupted. */
export async function untilInterrupted(body) {
  const interrupted = new Promise((_, reject) => {
    for (const signal of ['SIGINT', 'SIGTERM']) {
      process.on(signal, () => {
        console.error('Interrupted; what was started is stopped and removed…');
        reject(new Error('it was interrupted'));
      });
    }
  });
  try {
    await Promise.race([body(), interrupted]);
  } finally {
    await closeAll();
  }
}
