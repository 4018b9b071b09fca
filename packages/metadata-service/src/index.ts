/** The metadata service for embedding: tests and `holdfast dev up` start it in their own process or by main.ts. */
export {
  startMetadataService,
  type MetadataService,
  type MetadataServiceOptions,
  type TlsFiles,
} from './service/server.ts';
export { MemoryStore } from './store/memory.ts';
export { SqliteStore } from './store/sqlite.ts';
export type { Store } from './store/store.ts';
