import { defineConfig } from 'vitest/config';

// Workspace packages resolve to their TypeScript sources (the `@holdfast/source` export condition),
// so that a test never runs against a stale build.
export default defineConfig({
  resolve: { conditions: ['@holdfast/source', 'node'] },
  ssr: { resolve: { conditions: ['@holdfast/source', 'node'] } },
  test: {
    include: [
      'packages/*/src/**/*.test.ts',
      'packages/*/test/**/*.test.ts',
      'native/test/**/*.test.ts',
      'charts/test/*.test.ts',
      'tools/*.test.mjs',
    ],
    testTimeout: 30_000,
    hookTimeout: 60_000,
    pool: 'forks',
    maxWorkers: 2,
  },
});
