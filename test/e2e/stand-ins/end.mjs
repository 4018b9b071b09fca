// Imported first: the first process of a container ignores SIGTERM for as long as nobody handles it, and loading takes seconds on a busy node.
process.on('SIGTERM', () => process.exit(0));
