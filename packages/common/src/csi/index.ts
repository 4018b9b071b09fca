export * from './capability.ts';
export * from './driver.ts';
export * from './handle.ts';
export * from './handlers.ts';
export * from './identity.ts';
export * from './parameters.ts';
