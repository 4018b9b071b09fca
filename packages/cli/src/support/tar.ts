/** A tar archive of small text files in memory (POSIX ustar): enough for a support bundle, without a dependency or a temporary file. */
const blockBytes = 512;

export interface TextFile {
  /** Relative, at most 100 bytes. */
  path: string;
  text: string;
}

export function tarOf(files: readonly TextFile[], unixSeconds: number): Buffer {
  const parts = files.flatMap(({ path, text }) => {
    const content = Buffer.from(text);
    const padding = Buffer.alloc((blockBytes - (content.length % blockBytes)) % blockBytes);
    return [header(path, content.length, unixSeconds), content, padding];
  });
  return Buffer.concat([...parts, Buffer.alloc(2 * blockBytes)]);
}

/** Fields of the ustar header: name, mode, uid, gid, size, mtime, checksum, type, magic. Numbers are octal text. */
function header(path: string, bytes: number, unixSeconds: number): Buffer {
  if (Buffer.byteLength(path) > 100) throw new Error(`${path} is too long a name for the archive`);
  const block = Buffer.alloc(blockBytes);
  const octal = (value: number, at: number, width: number): void => {
    block.write(`${value.toString(8).padStart(width - 1, '0')}\0`, at, 'latin1');
  };
  block.write(path, 0);
  octal(0o600, 100, 8);
  octal(0, 108, 8);
  octal(0, 116, 8);
  octal(bytes, 124, 12);
  octal(Math.floor(unixSeconds), 136, 12);
  block.fill(' ', 148, 156); // the checksum counts itself as spaces
  block.write('0', 156);
  block.write('ustar\x0000', 257, 'latin1');
  const sum = block.reduce((total, byte) => total + byte, 0);
  block.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148, 'latin1');
  return block;
}
