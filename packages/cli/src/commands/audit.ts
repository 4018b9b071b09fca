/** holdfast audit: what was decided about who may write, and why it was safe. */
import { call } from '@holdfast/common';
import { InvalidArgumentError, type Command } from 'commander';
import { globals, withMetadata } from '../context.ts';
import { camelKeys, printJson, table } from '../output.ts';

function count(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new InvalidArgumentError('Give a number above 0.');
  return value;
}

async function audit(
  flags: { volume?: string; node?: string; after: string; limit: number },
  command: Command,
): Promise<void> {
  const records = await withMetadata(command, async (api) => {
    const volumeUuid = flags.volume === undefined ? '' : (await api.volume(flags.volume)).uuid;
    const nodeId = flags.node === undefined ? '' : (await api.node(flags.node)).node_id;
    const answer = await api.run((client, timeoutMs) =>
      call(
        client,
        client.ListAudit,
        { volume_uuid: volumeUuid, node_id: nodeId, after_sequence: flags.after, max_entries: flags.limit },
        { timeoutMs },
      ),
    );
    return answer.records;
  });
  if (globals(command).output === 'json') {
    printJson(camelKeys(records));
    return;
  }
  if (records.length === 0) {
    console.log('No audit records.');
    return;
  }
  console.log(
    table(
      ['SEQ', 'AT', 'EVENT', 'NODE', 'VOLUME', 'EPOCH', 'GEN', 'PROOF', 'DETAIL'],
      records.map((record) => [
        record.sequence,
        new Date(Number(record.at_unix_ms)).toISOString(),
        record.event,
        record.node_id || '-',
        record.volume_uuid || '-',
        record.epoch === '0' ? '-' : (BigInt(record.epoch) & ((1n << 40n) - 1n)).toString(),
        record.generation === '0' ? '-' : record.generation,
        record.proof || '-',
        record.detail,
      ]),
    ),
  );
}

export function addAuditCommand(program: Command): void {
  program
    .command('audit')
    .description('every decision that concerns safety: grants, revocations, fences and their proofs')
    .option('--volume <volume>', 'of one volume')
    .option('--node <node>', 'of one node')
    .option('--after <sequence>', 'records after this sequence number', '0')
    .option('-n, --limit <count>', 'at most so many', count, 200)
    .action(audit);
}
