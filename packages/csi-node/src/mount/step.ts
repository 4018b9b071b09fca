/**
 * A seam for tests: called, by name, after each thing that a call does to the outside. A test ends the process there and
 * repeats the call.
 */
export type Step = (name: string) => Promise<void>;

export const noStep: Step = async () => undefined;
