export { startController, type ControllerOptions, type RunningController } from './server.ts';
