/**
 * A stand-in for kube-apiserver, for machines that do not have one: objects in memory, versions and conflicts, list and watch, merge
 * patches, the status subresource, pods that terminate, and RBAC by the documented table. The tests that it serves run over the
 * real one too where there is one; what they both do is what the tests rest on.
 */
import { randomUUID } from 'node:crypto';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { V1PolicyRule } from '@kubernetes/client-node';

interface ApiObject {
  metadata: {
    name: string;
    namespace?: string;
    uid: string;
    resourceVersion: string;
    [key: string]: unknown;
  };
  [key: string]: unknown;
}

interface Target {
  group: string;
  resource: string;
  namespace: string;
  name: string;
  subresource: string;
}

class ApiError extends Error {
  readonly code: number;
  constructor(code: number, message: string) {
    super(message);
    this.code = code;
  }
}

type Change = { version: number; prefix: string; type: 'ADDED' | 'MODIFIED' | 'DELETED'; object: ApiObject };

export class StandInApiServer {
  readonly #rules: ReadonlyMap<string, readonly V1PolicyRule[]>;
  readonly #ownNamespace: string;
  readonly #objects = new Map<string, ApiObject>();
  readonly #changes: Change[] = [];
  readonly #watchers = new Set<() => void>();
  #version = 0;
  #server: Server | undefined;

  constructor(rules: ReadonlyMap<string, readonly V1PolicyRule[]>, ownNamespace: string) {
    this.#rules = rules;
    this.#ownNamespace = ownNamespace;
  }

  async listen(port: number): Promise<void> {
    const server = createServer((request, response) => void this.#answer(request, response));
    await new Promise<void>((resolve) => server.listen(port, '127.0.0.1', resolve));
    this.#server = server;
  }

  /** Every connection breaks; the objects stay. */
  async kill(): Promise<void> {
    const server = this.#server;
    if (server === undefined) return;
    this.#server = undefined;
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    try {
      const url = new URL(request.url ?? '/', 'http://localhost');
      const target = targetOf(url.pathname);
      const watch = url.searchParams.get('watch') === 'true';
      this.#authorize(request, target, watch);
      const chunks: Buffer[] = [];
      for await (const chunk of request) chunks.push(chunk as Buffer);
      const text = Buffer.concat(chunks).toString();
      const body = text === '' ? {} : (JSON.parse(text) as Record<string, unknown>);
      if (watch)
        return this.#watch(target, Number(url.searchParams.get('resourceVersion') ?? 0), request, response);
      reply(response, 200, this.#handle(request, target, url, body));
    } catch (error) {
      const code = error instanceof ApiError ? error.code : 500;
      reply(response, code, { kind: 'Status', status: 'Failure', code, message: String(error) });
    }
  }

  #authorize(request: IncomingMessage, target: Target, watch: boolean): void {
    if (request.headers.authorization === 'Bearer admin-token') return;
    if (request.headers.authorization !== 'Bearer controller-token') throw new ApiError(401, 'who are you?');
    const read = watch ? 'watch' : target.name === '' ? 'list' : 'get';
    const verbs: Record<string, string> = {
      GET: read,
      POST: 'create',
      PUT: 'update',
      PATCH: 'patch',
      DELETE: 'delete',
    };
    const verb = verbs[request.method ?? ''] ?? '';
    const resource = target.subresource === '' ? target.resource : `${target.resource}/${target.subresource}`;
    const where = target.namespace === this.#ownNamespace ? 'own' : target.namespace;
    const rules = [...(this.#rules.get('cluster') ?? []), ...(this.#rules.get(where) ?? [])];
    const allowed = rules.some(
      (rule) =>
        rule.apiGroups?.includes(target.group) === true &&
        rule.resources?.includes(resource) === true &&
        rule.verbs.includes(verb),
    );
    if (!allowed)
      throw new ApiError(
        403,
        `holdfast-controller cannot ${verb} ${resource} in ${target.namespace || 'the cluster'}`,
      );
  }

  #handle(request: IncomingMessage, target: Target, url: URL, body: Record<string, unknown>): object {
    switch (request.method) {
      case 'GET':
        return target.name === '' ? this.#list(target, url) : this.#find(target);
      case 'POST':
        return this.#create(target, body);
      case 'PUT':
        return this.#update(target, body, (before) =>
          target.subresource === '' ? body : { ...before, [target.subresource]: body[target.subresource] },
        );
      case 'PATCH':
        if (request.headers['content-type'] !== 'application/merge-patch+json')
          throw new ApiError(415, 'merge patches only');
        return this.#update(
          target,
          body,
          (before) => merged(before, patchFor(target, body)) as Record<string, unknown>,
        );
      case 'DELETE':
        return this.#delete(target, body);
      default:
        throw new ApiError(405, 'method');
    }
  }

  #find(target: Target): ApiObject {
    const found = this.#objects.get(keyOf(target));
    if (found === undefined) throw new ApiError(404, `${target.resource} ${target.name} not found`);
    return found;
  }

  #list(target: Target, url: URL): object {
    const selector = url.searchParams.get('fieldSelector');
    const node = selector?.replace(/^spec\.nodeName=/, '');
    const items = [...this.#objects]
      .filter(([key]) => key.startsWith(prefixOf(target)))
      .map(([, object]) => object)
      .filter((object) => node === undefined || (object['spec'] as { nodeName?: string }).nodeName === node);
    return { kind: 'List', metadata: { resourceVersion: String(this.#version) }, items };
  }

  #create(target: Target, body: Record<string, unknown>): ApiObject {
    const metadata = body['metadata'] as { name: string };
    const named = { ...target, name: metadata.name };
    if (this.#objects.has(keyOf(named))) throw new ApiError(409, `${metadata.name} already exists`);
    const namespace = target.namespace === '' ? {} : { namespace: target.namespace };
    const object = {
      ...body,
      metadata: { ...metadata, ...namespace, uid: randomUUID(), resourceVersion: '' },
    };
    return this.#store(named, object, 'ADDED');
  }

  #update(
    target: Target,
    body: Record<string, unknown>,
    change: (before: ApiObject) => Record<string, unknown>,
  ): ApiObject {
    const before = this.#find(target);
    const wanted = (body['metadata'] as { resourceVersion?: string } | undefined)?.resourceVersion;
    if (wanted !== undefined && wanted !== before.metadata.resourceVersion) {
      throw new ApiError(409, `the object has been modified`);
    }
    const next = change(before);
    const metadata = { ...(next['metadata'] as object), uid: before.metadata.uid } as ApiObject['metadata'];
    return this.#store(target, { ...next, metadata }, 'MODIFIED');
  }

  #delete(target: Target, body: Record<string, unknown>): ApiObject {
    const before = this.#find(target);
    const { uid, resourceVersion } = (body['preconditions'] ?? {}) as {
      uid?: string;
      resourceVersion?: string;
    };
    const other =
      (uid !== undefined && uid !== before.metadata.uid) ||
      (resourceVersion !== undefined && resourceVersion !== before.metadata.resourceVersion);
    if (other) throw new ApiError(409, 'precondition failed');
    const grace = Number(body['gracePeriodSeconds'] ?? 30);
    if (target.resource === 'pods' && grace > 0) {
      const deletionTimestamp = new Date(Date.now() + grace * 1000).toISOString();
      const metadata = { ...before.metadata, deletionTimestamp, deletionGracePeriodSeconds: grace };
      return this.#store(target, { ...before, metadata }, 'MODIFIED');
    }
    this.#objects.delete(keyOf(target));
    this.#tell(target, 'DELETED', before);
    return before;
  }

  #store(target: Target, object: ApiObject, type: 'ADDED' | 'MODIFIED'): ApiObject {
    const stored = {
      ...object,
      metadata: { ...object.metadata, resourceVersion: String(this.#version + 1) },
    };
    this.#objects.set(keyOf(target), stored);
    this.#tell(target, type, stored);
    return stored;
  }

  #tell(target: Target, type: Change['type'], object: ApiObject): void {
    this.#changes.push({ version: ++this.#version, prefix: keyOf(target), type, object });
    for (const wake of this.#watchers) wake();
  }

  #watch(target: Target, since: number, request: IncomingMessage, response: ServerResponse): void {
    let sent = since;
    response.writeHead(200, { 'content-type': 'application/json' });
    response.flushHeaders();
    const send = (): void => {
      for (const change of this.#changes.slice(sent)) {
        sent = change.version;
        if (!change.prefix.startsWith(prefixOf(target))) continue;
        response.write(`${JSON.stringify({ type: change.type, object: change.object })}\n`);
      }
    };
    this.#watchers.add(send);
    request.once('close', () => this.#watchers.delete(send));
    response.once('close', () => this.#watchers.delete(send));
    send();
  }
}

function reply(response: ServerResponse, code: number, body: object): void {
  response.writeHead(code, { 'content-type': 'application/json' });
  response.end(JSON.stringify(body));
}

/** /api/v1/… or /apis/GROUP/VERSION/…, then [namespaces/NS/]RESOURCE[/NAME[/SUBRESOURCE]] */
function targetOf(path: string): Target {
  const parts = path
    .split('/')
    .filter((part) => part !== '')
    .map(decodeURIComponent);
  const group = parts[0] === 'apis' ? (parts[1] ?? '') : '';
  const rest = parts.slice(parts[0] === 'apis' ? 3 : 2);
  const namespaced = rest[0] === 'namespaces' && rest.length > 2;
  const [resource = '', name = '', subresource = ''] = namespaced ? rest.slice(2) : rest;
  return { group, resource, namespace: namespaced ? (rest[1] ?? '') : '', name, subresource };
}

/** Of one object, or with an empty namespace or name of all that are under it. */
function keyOf({ group, resource, namespace, name }: Target): string {
  return `${group}/${resource}/${namespace}/${name}`;
}
function prefixOf({ group, resource, namespace }: Target): string {
  return namespace === '' ? `${group}/${resource}/` : `${group}/${resource}/${namespace}/`;
}

/** A patch of a subresource changes that alone; one of the object, all but its status. */
function patchFor(target: Target, body: Record<string, unknown>): Record<string, unknown> {
  if (target.subresource !== '') return { [target.subresource]: body[target.subresource] };
  const { status: _status, ...rest } = body;
  return rest;
}

/** RFC 7386. */
function merged(before: unknown, patch: unknown): unknown {
  if (typeof patch !== 'object' || patch === null || Array.isArray(patch)) return patch;
  const result = typeof before === 'object' && before !== null && !Array.isArray(before) ? { ...before } : {};
  for (const [key, value] of Object.entries(patch)) {
    const all = result as Record<string, unknown>;
    if (value === null) delete all[key];
    else all[key] = merged(all[key], value);
  }
  return result;
}
