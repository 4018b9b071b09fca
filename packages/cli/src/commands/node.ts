/** holdfast node: list, show, fence, confirm-off. */
import { randomUUID } from 'node:crypto';
import { userInfo } from 'node:os';
import { call } from '@holdfast/common';
import type { Host__Output, Node__Output } from '@holdfast/proto';
import type { Command } from 'commander';
import { globals, withMetadata } from '../context.ts';
import { age, camelKeys, enumWord, printJson, properties, table } from '../output.ts';

const fenceTimeoutMs = 120_000;

function hostView(host: Host__Output): Record<string, unknown> {
  return {
    ...(camelKeys(host) as Record<string, unknown>),
    state: enumWord('HOST_STATE', host.state),
  };
}

/** The stable JSON shape of a node. */
export function nodeView(node: Node__Output): Record<string, unknown> {
  return { ...(camelKeys(node) as Record<string, unknown>), hosts: node.hosts.map(hostView) };
}

function hostsTable(hosts: readonly Host__Output[]): string {
  return table(
    ['POOL', 'HOST', 'GENERATION', 'STATE', 'SINCE', 'WAITS FOR'],
    hosts.map((host) => [
      host.pool_uuid,
      String(host.host_id),
      host.generation,
      enumWord('HOST_STATE', host.state),
      age(host.since_unix_ms),
      host.waiting_for || '-',
    ]),
  );
}

async function list(_flags: unknown, command: Command): Promise<void> {
  const nodes = await withMetadata(command, (api) => api.nodes());
  if (globals(command).output === 'json') {
    printJson(nodes.map(nodeView));
    return;
  }
  if (nodes.length === 0) {
    console.log('No node is known. Start an agent that points at this metadata service.');
    return;
  }
  console.log(
    table(
      ['NAME', 'NODE ID', 'CONNECTED', 'LAST SEEN', 'POOLS', 'VERSION'],
      nodes.map((node) => [
        node.name,
        node.node_id,
        node.connected ? 'yes' : 'no',
        age(node.last_seen_unix_ms),
        node.hosts.map((host) => enumWord('HOST_STATE', host.state)).join(', ') || '-',
        node.agent_version,
      ]),
    ),
  );
}

async function show(word: string, _flags: unknown, command: Command): Promise<void> {
  const node = await withMetadata(command, (api) => api.node(word));
  if (globals(command).output === 'json') {
    printJson(nodeView(node));
    return;
  }
  console.log(
    properties([
      ['Name', node.name],
      ['Node id', node.node_id],
      ['Connected', node.connected ? 'yes' : 'no'],
      ['Last seen', `${age(node.last_seen_unix_ms)} ago`],
      ['Agent', node.agent_version],
      ['Max volumes', String(node.max_volumes)],
    ]),
  );
  if (node.hosts.length > 0) console.log(`\n${hostsTable(node.hosts)}`);
}

async function fence(
  word: string,
  flags: { pool?: string; reason: string; wait: boolean },
  command: Command,
): Promise<void> {
  const hosts = await withMetadata(command, async (api) => {
    const node = await api.node(word);
    const poolUuid = flags.pool === undefined ? '' : (await api.pool(flags.pool)).uuid;
    const answer = await api.run((client) =>
      call(
        client,
        client.FenceNode,
        {
          request_id: randomUUID(),
          node_id: node.node_id,
          pool_uuid: poolUuid,
          reason: flags.reason,
          no_wait: !flags.wait,
        },
        { timeoutMs: fenceTimeoutMs },
      ),
    );
    return answer.hosts;
  });
  printHosts(command, hosts, 'The node issues no more I/O to:', 'The fence has begun:');
}

async function confirmOff(word: string, flags: { by?: string }, command: Command): Promise<void> {
  const hosts = await withMetadata(command, async (api) => {
    const node = await api.node(word);
    const answer = await api.run((client, timeoutMs) =>
      call(
        client,
        client.ConfirmNodeOff,
        {
          request_id: randomUUID(),
          node_id: node.node_id,
          confirmed_by: flags.by ?? process.env['SUDO_USER'] ?? userInfo().username,
        },
        { timeoutMs },
      ),
    );
    return answer.hosts;
  });
  printHosts(command, hosts, 'Recorded as off:', 'Recorded; still under way:');
}

function printHosts(command: Command, hosts: readonly Host__Output[], done: string, underWay: string): void {
  if (globals(command).output === 'json') {
    printJson(hosts.map(hostView));
    return;
  }
  if (hosts.length === 0) {
    console.log('The node is a host on no pool: there is nothing to do.');
    return;
  }
  console.log(hosts.every((host) => host.state === 'HOST_STATE_DEAD') ? done : underWay);
  console.log(hostsTable(hosts));
}

export function addNodeCommands(program: Command): void {
  const node = program.command('node').description('nodes and their fences');
  node.command('list').alias('ls').description('all nodes').action(list);
  node.command('show <node>').description('one node, by name or node id').action(show);
  node
    .command('fence <node>')
    .description('make sure that a node can issue no more I/O; its volumes may then start elsewhere')
    .option('--pool <pool>', 'on this pool only (default: all its pools)')
    .option('--reason <text>', 'goes to the audit record', 'asked for on the command line')
    .option('--no-wait', 'come back when the fence has begun')
    .action(fence);
  node
    .command('confirm-off <node>')
    .description(
      'say that this machine is OFF; completes its fences. Wrong, it lets two nodes write one volume',
    )
    .option('--by <name>', 'who says so; goes to the audit record')
    .action(confirmOff);
}
