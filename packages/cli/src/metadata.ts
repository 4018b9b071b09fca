/** The metadata service as commands see it: where it is, and the few calls they make. */
import { call, clientOptions, grpcTarget, HoldfastError } from '@holdfast/common';
import {
  holdfast,
  type MetadataClient,
  type Node__Output,
  type Pool__Output,
  type Snapshot__Output,
  type Volume__Output,
} from '@holdfast/proto';
import { credentials, type ChannelCredentials } from '@grpc/grpc-js';
import { listDevClusters } from './dev/registry.ts';

/** --metadata, HOLDFAST_METADATA, or the one `holdfast dev up` that runs on this machine. */
export function metadataEndpoint(flag: string | undefined): string {
  const named = flag ?? process.env['HOLDFAST_METADATA'];
  if (named !== undefined && named !== '') return named;
  const running = listDevClusters();
  const [first, second] = running;
  if (first !== undefined && second === undefined) return first.metadata;
  if (first !== undefined) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `${running.length} development clusters run here (${running.map((c) => c.dir).join(', ')}). Name one: --metadata ${first.metadata}.`,
    );
  }
  throw new HoldfastError(
    'INVALID_ARGUMENT',
    'No metadata service is known. Give --metadata HOST:PORT, set HOLDFAST_METADATA, or start `holdfast dev up`.',
  );
}

const timeoutMs = 15_000;

export class MetadataApi {
  readonly #client: MetadataClient;
  readonly endpoint: string;

  constructor(endpoint: string, channelCredentials: ChannelCredentials = credentials.createInsecure()) {
    this.endpoint = endpoint;
    this.#client = new holdfast.Metadata(grpcTarget(endpoint), channelCredentials, clientOptions);
  }

  close(): void {
    this.#client.close();
  }

  /** One call; an unreachable service is said in a sentence with its address. */
  async run<Res>(body: (client: MetadataClient, timeoutMs: number) => Promise<Res>): Promise<Res> {
    try {
      return await body(this.#client, timeoutMs);
    } catch (error) {
      const unreachable =
        error instanceof HoldfastError &&
        error.code === 'UNAVAILABLE' &&
        /No connection established|ECONNREFUSED|ENOENT/.test(error.message);
      if (!unreachable) throw error;
      throw new HoldfastError(
        'UNAVAILABLE',
        `The metadata service at ${this.endpoint} does not answer. Check that it runs and that --metadata is right.`,
        { cause: error },
      );
    }
  }

  async pools(): Promise<Pool__Output[]> {
    return (await this.run((c, ms) => call(c, c.ListPools, {}, { timeoutMs: ms }))).pools;
  }

  async nodes(): Promise<Node__Output[]> {
    return (await this.run((c, ms) => call(c, c.ListNodes, {}, { timeoutMs: ms }))).nodes;
  }

  /** All of them, page by page, those being deleted too. */
  async volumes(): Promise<Volume__Output[]> {
    const volumes: Volume__Output[] = [];
    for (let token = ''; ; ) {
      const page = await this.run((c, ms) =>
        call(c, c.ListVolumes, { starting_token: token, include_deleting: true }, { timeoutMs: ms }),
      );
      volumes.push(...page.volumes);
      if (page.next_token === '') return volumes;
      token = page.next_token;
    }
  }

  /** By name, UUID, or handle ("<pool uuid>/<volume uuid>"). */
  async volume(word: string): Promise<Volume__Output> {
    const uuid = uuidIn(word);
    return await this.run((c, ms) =>
      call(c, c.GetVolume, uuid === undefined ? { name: word } : { uuid }, { timeoutMs: ms }),
    );
  }

  /** All of them, or those of one volume, page by page. */
  async snapshots(sourceVolumeUuid = ''): Promise<Snapshot__Output[]> {
    const snapshots: Snapshot__Output[] = [];
    for (let token = ''; ; ) {
      const page = await this.run((c, ms) =>
        call(
          c,
          c.ListSnapshots,
          { starting_token: token, source_volume_uuid: sourceVolumeUuid },
          { timeoutMs: ms },
        ),
      );
      snapshots.push(...page.snapshots);
      if (page.next_token === '') return snapshots;
      token = page.next_token;
    }
  }

  /** By name, UUID, or handle ("<pool uuid>/<snapshot uuid>"). */
  async snapshot(word: string): Promise<Snapshot__Output> {
    const uuid = uuidIn(word);
    return await this.run((c, ms) =>
      call(c, c.GetSnapshot, uuid === undefined ? { name: word } : { uuid }, { timeoutMs: ms }),
    );
  }

  /** By UUID or name. */
  async pool(word: string): Promise<Pool__Output> {
    const pools = (await this.pools()).filter((p) => p.uuid === word || p.name === word);
    return only(pools, word, 'pool', (p) => p.uuid);
  }

  /** By node id or name. */
  async node(word: string): Promise<Node__Output> {
    const nodes = await this.nodes();
    const exact = nodes.filter((n) => n.node_id === word);
    return only(
      exact.length > 0 ? exact : nodes.filter((n) => n.name === word),
      word,
      'node',
      (n) => n.node_id,
    );
  }
}

/** The object's UUID in a UUID or a handle; undefined for a name. */
function uuidIn(word: string): string | undefined {
  return /^(?:[0-9a-f-]{36}\/)?([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})$/.exec(
    word,
  )?.[1];
}

function only<T>(found: readonly T[], word: string, what: string, id: (item: T) => string): T {
  const [first, second] = found;
  if (first === undefined) {
    throw new HoldfastError(
      'NOT_FOUND',
      `There is no ${what} "${word}". \`holdfast ${what} list\` shows all.`,
    );
  }
  if (second !== undefined) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `"${word}" names ${found.length} ${what}s: ${found.map(id).join(', ')}. Give the id.`,
    );
  }
  return first;
}
