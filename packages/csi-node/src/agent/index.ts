export { startAgent, agentVersion, type Agent, type AgentOptions } from './agent.ts';
export { loadIdentity, type Identity } from './identity.ts';
