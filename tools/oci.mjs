// OCI image archives without Docker or a registry: `docker load`, `podman load` and `ctr images import` take them.
//
// An image is a list of directories, one layer each, and a configuration. The same content gives the same bytes: names are
// sorted, owners and times fixed (SOURCE_DATE_EPOCH), so layers that images share are stored once by whoever imports them.
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { chmodSync, copyFileSync, cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, realpathSync, renameSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';

export const epoch = Number(process.env.SOURCE_DATE_EPOCH ?? 1_700_000_000);
const architecture = { x64: 'amd64', arm64: 'arm64' }[process.arch] ?? process.arch;

function sha256Of(path) {
  const hash = createHash('sha256');
  hash.update(readFileSync(path));
  return hash.digest('hex');
}

function tarOf(directory, to, names = ['.']) {
  execFileSync('tar', [
    '--create', '--format=posix', '--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime', '--sort=name',
    `--mtime=@${epoch}`, '--owner=0', '--group=0', '--numeric-owner', `--file=${to}`, `--directory=${directory}`, ...names,
  ]);
}

class Blobs {
  constructor(layout) {
    this.directory = join(layout, 'blobs', 'sha256');
    mkdirSync(this.directory, { recursive: true });
  }

  addFile(path, mediaType) {
    const digest = sha256Of(path);
    const { size } = statSync(path);
    renameSync(path, join(this.directory, digest));
    return { mediaType, digest: `sha256:${digest}`, size };
  }

  addJson(value, mediaType) {
    const text = JSON.stringify(value);
    const digest = createHash('sha256').update(text).digest('hex');
    writeFileSync(join(this.directory, digest), text);
    return { mediaType, digest: `sha256:${digest}`, size: Buffer.byteLength(text) };
  }
}

/**
 * Writes one image as an archive.
 * @param reference the full name, `registry/name:tag`
 * @param layers directories, lowest first
 * @param config the `config` part of the image configuration (Entrypoint, Env, User, Labels, …)
 * @returns bytes of all layers
 */
export function writeImage({ reference, layers, config, output }) {
  const layout = mkdtempSync(join(tmpdir(), 'holdfast-oci-'));
  try {
    const blobs = new Blobs(layout);
    const descriptors = layers.map((directory, i) => {
      const tar = join(layout, `layer-${i}.tar`);
      tarOf(directory, tar);
      return blobs.addFile(tar, 'application/vnd.oci.image.layer.v1.tar');
    });
    const created = new Date(epoch * 1000).toISOString();
    const image = blobs.addJson(
      {
        created,
        architecture,
        os: 'linux',
        config,
        rootfs: { type: 'layers', diff_ids: descriptors.map((d) => d.digest) },
        history: descriptors.map(() => ({ created, created_by: 'holdfast images' })),
      },
      'application/vnd.oci.image.config.v1+json',
    );
    const manifest = blobs.addJson(
      { schemaVersion: 2, mediaType: 'application/vnd.oci.image.manifest.v1+json', config: image, layers: descriptors },
      'application/vnd.oci.image.manifest.v1+json',
    );
    writeFileSync(join(layout, 'oci-layout'), '{"imageLayoutVersion":"1.0.0"}');
    const annotations = { 'io.containerd.image.name': reference, 'org.opencontainers.image.ref.name': reference.split(':').pop() };
    writeFileSync(
      join(layout, 'index.json'),
      JSON.stringify({
        schemaVersion: 2,
        mediaType: 'application/vnd.oci.image.index.v1+json',
        manifests: [{ ...manifest, platform: { architecture, os: 'linux' }, annotations }],
      }),
    );
    // For a Docker that keeps images in its own store: it does not read the index.
    const place = ({ digest }) => `blobs/sha256/${digest.slice('sha256:'.length)}`;
    writeFileSync(join(layout, 'manifest.json'), JSON.stringify([{ Config: place(image), RepoTags: [reference], Layers: descriptors.map(place) }]));
    mkdirSync(dirname(output), { recursive: true });
    tarOf(layout, `${output}.new`, ['oci-layout', 'index.json', 'manifest.json', 'blobs']);
    renameSync(`${output}.new`, output);
    return descriptors.reduce((sum, d) => sum + d.size, 0);
  } finally {
    rmSync(layout, { recursive: true, force: true });
  }
}

/** Where a file of this machine belongs in an image: its directory without links, so that /lib and /usr/lib are one. */
function placeOf(path) {
  return join(realpathSync(dirname(path)), basename(path));
}

/** Shared libraries and loader of programs, as this machine resolves them. A static program has none. */
export function librariesOf(...programs) {
  return programs.flatMap((program) => {
    try {
      const said = execFileSync('ldd', [program], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] });
      return [...said.matchAll(/^\s*(?:\S+ => )?(\/\S+) \(0x/gm)].map((match) => match[1]);
    } catch {
      return [];
    }
  });
}

/** A root directory: the links of a merged /usr, and what programs look for everywhere. */
export function makeRoot(directory) {
  for (const name of ['usr/bin', 'usr/sbin', 'usr/lib', 'usr/lib64', 'etc', 'tmp', 'run', 'var/lib', 'dev', 'proc', 'sys']) {
    mkdirSync(join(directory, name), { recursive: true, mode: 0o755 });
  }
  execFileSync('chmod', ['1777', join(directory, 'tmp')]);
  for (const name of ['bin', 'sbin', 'lib', 'lib64']) {
    if (!existsSync(join(directory, name))) execFileSync('ln', ['-s', `usr/${name}`, join(directory, name)]);
  }
  writeFileSync(join(directory, 'etc/passwd'), 'root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n');
  writeFileSync(join(directory, 'etc/group'), 'root:x:0:\nnonroot:x:65532:\n');
  writeFileSync(join(directory, 'etc/nsswitch.conf'), 'passwd: files\ngroup: files\nhosts: files dns\n');
}

/** Copies a static program, for everybody to run. */
export function addProgram(from, to) {
  mkdirSync(dirname(to), { recursive: true });
  copyFileSync(from, to);
  chmodSync(to, 0o755);
}

/** This machine's static busybox, under the names of these applets (all by default) where nothing else has them. */
export function addBusybox(directory, applets = execFileSync('/bin/busybox', ['--list'], { encoding: 'utf8' }).trim().split('\n')) {
  const programs = join(directory, 'usr/bin');
  addProgram('/bin/busybox', join(programs, 'busybox'));
  for (const applet of applets) {
    if (!existsSync(join(programs, applet))) symlinkSync('busybox', join(programs, applet));
  }
}

/** Copies programs with their libraries, and plain files, to the places that they have here. `except`: roots that have them already. */
export function copyFromHost(directory, paths, except = []) {
  const all = new Set(paths.flatMap((path) => [path, ...librariesOf(path)]));
  const copied = [];
  for (const path of all) {
    const place = placeOf(path);
    const target = join(directory, place);
    if (existsSync(target) || except.some((root) => existsSync(join(root, place)))) continue;
    mkdirSync(dirname(target), { recursive: true });
    copyFileSync(path, target);
    chmodSync(target, statSync(path).mode & 0o755); // no setuid: who runs here is root, or has no business to be
    copied.push(path);
  }
  copyLicences(directory, copied);
}

/** What Debian says about the copyright of the packages that files came from. */
function copyLicences(directory, paths) {
  for (const path of paths) {
    let owner;
    try {
      owner = execFileSync('dpkg-query', ['-S', realpathSync(path)], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] });
    } catch {
      continue;
    }
    const name = owner.split(':')[0].split(',')[0].trim();
    const copyright = `/usr/share/doc/${name}/copyright`;
    if (!existsSync(copyright)) continue;
    mkdirSync(join(directory, `/usr/share/doc/${name}`), { recursive: true });
    cpSync(copyright, join(directory, copyright), { dereference: true });
  }
}
