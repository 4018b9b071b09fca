/** Arithmetic on slab runs: sets of slabs, each with the generation of its allocation, kept sorted and merged. */
import type { SlabRun } from './records.ts';

/** Sorted by first slab; neighbours of one generation are one run. The runs must not overlap. */
export function normalized(runs: readonly SlabRun[]): SlabRun[] {
  const sorted = runs.filter((run) => run.count > 0).sort((a, b) => a.first - b.first);
  const merged: SlabRun[] = [];
  for (const run of sorted) {
    const last = merged.at(-1);
    if (last !== undefined && last.first + last.count === run.first && last.generation === run.generation) {
      last.count += run.count;
    } else {
      merged.push({ ...run });
    }
  }
  return merged;
}

export function countSlabs(runs: readonly SlabRun[]): number {
  return runs.reduce((sum, run) => sum + run.count, 0);
}

/** The run of sorted `runs` that has this slab. */
export function findRun(runs: readonly SlabRun[], slab: number): SlabRun | undefined {
  let low = 0;
  let high = runs.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    const run = runs[middle] as SlabRun;
    if (run.first + run.count <= slab) low = middle + 1;
    else high = middle;
  }
  const run = runs[low];
  return run !== undefined && run.first <= slab ? run : undefined;
}

/** Whether every slab of `part` is in sorted `whole`, in the same generation. */
export function covers(whole: readonly SlabRun[], part: readonly SlabRun[]): boolean {
  return part.every((run) => {
    for (let slab = run.first; slab < run.first + run.count; ) {
      const found = findRun(whole, slab);
      if (found === undefined || found.generation !== run.generation) return false;
      slab = found.first + found.count;
    }
    return true;
  });
}

/** Sorted `whole` without the slabs of `part`, whatever their generation. */
export function without(whole: readonly SlabRun[], part: readonly SlabRun[]): SlabRun[] {
  const cuts = normalized(part);
  return whole.flatMap((run) => {
    const kept: SlabRun[] = [];
    let from = run.first;
    const end = run.first + run.count;
    for (const cut of cuts) {
      if (cut.first + cut.count <= from || cut.first >= end) continue;
      if (cut.first > from) kept.push({ ...run, first: from, count: cut.first - from });
      from = cut.first + cut.count;
    }
    if (from < end) kept.push({ ...run, first: from, count: end - from });
    return kept;
  });
}

/** The slabs that are in both, in the same generation. */
export function common(a: readonly SlabRun[], b: readonly SlabRun[]): SlabRun[] {
  const sorted = normalized(b);
  return normalized(
    a.flatMap((run) =>
      sorted.flatMap((other) => {
        const first = Math.max(run.first, other.first);
        const end = Math.min(run.first + run.count, other.first + other.count);
        return end > first && run.generation === other.generation
          ? [{ ...run, first, count: end - first }]
          : [];
      }),
    ),
  );
}

/** Whether any slab is named twice. */
export function overlaps(runs: readonly SlabRun[]): boolean {
  const sorted = [...runs].sort((a, b) => a.first - b.first);
  return sorted.some((run, index) => {
    const before = sorted[index - 1];
    return before !== undefined && before.first + before.count > run.first;
  });
}

/** Cut at the borders of regions. */
export function byRegion(runs: readonly SlabRun[], slabsPerRegion: number): Map<number, SlabRun[]> {
  const regions = new Map<number, SlabRun[]>();
  for (const run of runs) {
    for (let first = run.first; first < run.first + run.count; ) {
      const region = Math.floor(first / slabsPerRegion);
      const end = Math.min(run.first + run.count, (region + 1) * slabsPerRegion);
      const list = regions.get(region) ?? [];
      list.push({ ...run, first, count: end - first });
      regions.set(region, list);
      first = end;
    }
  }
  return regions;
}
