export * from './area.ts';
export * from './wait.ts';
