/** The `holdfast` command: its tree of commands and its global options. */
import { Command, Option } from 'commander';
import { addAuditCommand } from './commands/audit.ts';
import { addDevCommands } from './commands/dev.ts';
import { addNodeCommands } from './commands/node.ts';
import { addPoolCommands } from './commands/pool.ts';
import { addSnapshotCommands } from './commands/snapshot.ts';
import { addSupportBundleCommand } from './commands/support-bundle.ts';
import { addVolumeCommands } from './commands/volume.ts';

export const cliVersion = '0.1.0';

export function buildProgram(): Command {
  const program = new Command('holdfast')
    .description('Kubernetes volumes on a block device that every node can reach')
    .version(cliVersion)
    .addOption(new Option('-o, --output <format>', 'table (default) or json').choices(['table', 'json']))
    .option(
      '--metadata <host:port>',
      'the metadata service (default: HOLDFAST_METADATA, or the running `dev up`)',
    )
    .enablePositionalOptions()
    .showHelpAfterError('(--help shows what there is)')
    .exitOverride();
  addPoolCommands(program);
  addVolumeCommands(program);
  addSnapshotCommands(program);
  addNodeCommands(program);
  addAuditCommand(program);
  addSupportBundleCommand(program);
  addDevCommands(program);
  inherit(program);
  return program;
}

/**
 * Global options stand anywhere on the line: every command on the way has them, and takes those that stand behind its own name. Every
 * command ends through one way out.
 */
function inherit(command: Command): void {
  for (const child of command.commands) {
    child.copyInheritedSettings(command);
    // Where -o names a file (support-bundle), the format has its long name only.
    const short = child.options.some((option) => option.short === '-o') ? '' : '-o, ';
    child.addOption(new Option(`${short}--output <format>`).choices(['table', 'json']).hideHelp());
    child.addOption(new Option('--metadata <host:port>').hideHelp());
    inherit(child);
  }
}
