/**
 * Runs csi-sanity (pinned in tools/go.mod, built by `make test` or by the command in that file) against a controller and a
 * node socket, and reads its report.
 */
import { existsSync } from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import type { TestArea } from '@holdfast/testing';
import { execa } from 'execa';

const program = fileURLToPath(new URL('../../../.cache/bin/csi-sanity', import.meta.url));

export interface SanityResult {
  readonly passed: string[];
  readonly skipped: { readonly name: string; readonly why: string }[];
  readonly failed: { readonly name: string; readonly why: string }[];
}

interface Spec {
  readonly ContainerHierarchyTexts: readonly string[] | null;
  readonly LeafNodeType: string;
  readonly LeafNodeText: string;
  readonly State: string;
  readonly Failure?: { readonly Message: string };
}

export async function runSanity(
  area: TestArea,
  sockets: { readonly controllerSocket: string; readonly nodeSocket: string },
  accessType: 'mount' | 'block',
): Promise<SanityResult> {
  if (!existsSync(program)) {
    throw new Error(
      `${program} is not built. Build it: cd tools && go build -o ../.cache/bin/csi-sanity github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity`,
    );
  }
  const work = area.path(`sanity-${accessType}`);
  await mkdir(work, { recursive: true });
  const report = `${work}/report.json`;
  const mutable = `${work}/mutable.yaml`;
  await writeFile(mutable, 'holdfast.io/evict: "false"\n');
  const ran = await execa(
    program,
    [
      `-csi.endpoint=unix://${sockets.nodeSocket}`,
      `-csi.controllerendpoint=unix://${sockets.controllerSocket}`,
      `-csi.mountdir=${work}/target`,
      `-csi.stagingdir=${work}/staging`,
      `-csi.testvolumeaccesstype=${accessType}`,
      '-csi.testnodevolumeattachlimit',
      `-csi.testvolumemutableparameters=${mutable}`,
      `-csi.testvolumesize=${512 << 20}`,
      `-csi.testvolumeexpandsize=${1 << 30}`,
      '-ginkgo.no-color',
      '-ginkgo.timeout=8m',
      `-ginkgo.json-report=${report}`,
    ],
    { reject: false, timeout: 540_000, all: true },
  );
  if (!existsSync(report))
    throw new Error(`csi-sanity gave no report (exit code ${ran.exitCode}):\n${ran.all}`);
  const suites = JSON.parse(await readFile(report, 'utf8')) as { SpecReports: Spec[] }[];
  const specs = suites.flatMap((suite) => suite.SpecReports).filter((spec) => spec.LeafNodeType === 'It');
  const of = (...states: string[]) =>
    specs
      .filter((spec) => states.includes(spec.State))
      .map((spec) => ({
        name: [...(spec.ContainerHierarchyTexts ?? []), spec.LeafNodeText].join(' '),
        why: spec.Failure?.Message ?? spec.State,
      }));
  return {
    passed: of('passed').map((spec) => spec.name),
    skipped: of('skipped', 'pending'),
    failed: of('failed', 'panicked', 'aborted', 'interrupted', 'timedout', 'invalid'),
  };
}
