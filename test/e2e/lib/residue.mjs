// What a cluster leaves in the kernel when its processes are gone, and taking it away: FUSE connections, the loop devices over them, the shared
// disk's loop device, cgroups, settings that the kubelet changes for the whole machine. Only what is provably ours is touched.
import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs';

const kubeletSettings = ['/proc/sys/vm/overcommit_memory', '/proc/sys/vm/panic_on_oom', '/proc/sys/kernel/panic', '/proc/sys/kernel/panic_on_oops', '/proc/sys/kernel/keys/root_maxkeys', '/proc/sys/kernel/keys/root_maxbytes'];

export function readSettings() {
  return kubeletSettings.flatMap((path) => {
    try {
      return [[path, readFileSync(path, 'utf8').trim()]];
    } catch {
      return [];
    }
  });
}

export function restoreSettings(settings) {
  for (const [path, value] of settings) if (readFileSync(path, 'utf8').trim() !== value) writeFileSync(path, value);
}

export function childrenOf(pid) {
  return readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim().split(' ').filter(Boolean).map(Number);
}

/** Processes in the process namespace of `pid` and in those below it: what the lab's first process takes with it. */
export function processesBelow(pid) {
  const parents = new Map();
  for (const name of readdirSync('/proc').filter((n) => /^\d+$/.test(n))) {
    try {
      const stat = readFileSync(`/proc/${name}/stat`, 'utf8');
      parents.set(Number(name), Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[1]));
    } catch {
      // it ended meanwhile
    }
  }
  const below = (candidate) => {
    for (let at = candidate; at > 1; at = parents.get(at) ?? 0) if (at === pid) return true;
    return false;
  };
  return [...parents.keys()].filter(below);
}

/** Those of the processes whose command line has this word. */
export function running(pids, word) {
  return pids.filter((pid) => {
    try {
      return readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0').includes(word);
    } catch {
      return false;
    }
  });
}

/** Numbers of the FUSE connections that processes serve (/dev/fuse descriptors name theirs). */
export function fuseConnections(pids) {
  const found = new Set();
  for (const pid of pids) {
    try {
      for (const fd of readdirSync(`/proc/${pid}/fd`)) {
        if (readlinkSync(`/proc/${pid}/fd/${fd}`) !== '/dev/fuse') continue;
        const match = /^fuse_connection:\s*(\d+)$/m.exec(readFileSync(`/proc/${pid}/fdinfo/${fd}`, 'utf8'));
        if (match) found.add(Number(match[1]));
      }
    } catch {
      // it ended meanwhile
    }
  }
  return found;
}

export function abortConnections(connections) {
  for (const connection of connections) {
    try {
      writeFileSync(`/sys/fs/fuse/connections/${connection}/abort`, '1');
    } catch {
      // gone with its last descriptor
    }
  }
}

/** Attached loop devices: path, file, and the device number of the file system that the file is on. */
function loops() {
  const said = execFileSync('losetup', ['--json', '--list', '--output', 'NAME,BACK-FILE,BACK-MAJ:MIN'], { encoding: 'utf8' });
  if (said.trim() === '') return [];
  return JSON.parse(said).loopdevices.map((loop) => ({ path: loop.name, file: loop['back-file'] ?? '', on: String(loop['back-maj:min'] ?? '').trim() }));
}

/** Loop devices over files of these connections: a connection's number is the minor number of the file system's anonymous device. */
export function loopsOver(connections) {
  return loops()
    .filter(({ on }) => /^0:\d+$/.test(on) && connections.has(Number(on.slice(2))))
    .map(({ path }) => path);
}

/** Those, and the ones over files in a directory. */
export function loopsOf(connections, directory) {
  const inside = loops().filter(({ file }) => file.startsWith(`${directory}/`));
  return [...inside.map(({ path }) => path), ...loopsOver(connections)];
}

export function detach(paths) {
  const left = [];
  for (const path of paths) {
    try {
      execFileSync('losetup', ['--detach', path], { stdio: 'ignore', timeout: 10_000 });
    } catch {
      left.push(path);
    }
  }
  return left;
}
