// The real server for the browser's tests, on free ports and a directory of its own.

import { spawn } from 'node:child_process';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';

import { DEADLINE } from './launch.mjs';

const ROLES = ['push', 'collect', 'auth', 'dispatch', 'ops'];

export class Server {
  /** Addresses by role, the code of the page's URL, and the admin key. */
  ports; code; adminKey;
  #data; #process; #env; #key;

  static async start(env = {}) {
    const server = new Server();
    server.#env = env;
    server.#data = await mkdtemp(join(tmpdir(), 'ringpush-browser-'));
    await server.up();
    return server;
  }

  /** Starts, where it ran before if it did. */
  async up() {
    await rm(join(this.#data, 'listen.json'), { force: true });
    const env = { ...process.env, RINGPUSH_LIMITS__RECONNECT_JITTER_MS: '200', ...this.#env };
    for (const role of ROLES) env[`RINGPUSH_${role.toUpperCase()}__LISTEN`] = this.ports?.[role] ?? '127.0.0.1:0';
    this.#process = spawn(process.env.RINGPUSH_PROGRAM, ['serve', '--data', this.#data], { env, stdio: ['ignore', 'pipe', 'inherit'] });
    let greeting = '';
    this.#process.stdout.on('data', (text) => { greeting += text; });
    for (const end = Date.now() + DEADLINE; Date.now() < end; await pause(20)) {
      try {
        this.ports = JSON.parse(await readFile(join(this.#data, 'listen.json'), 'utf8'));
        this.code = greeting.match(/^ *page +http:\S+\?code=(\S+)$/m)?.[1];
        const keys = await readFile(join(this.#data, 'dev-keys.toml'), 'utf8');
        [this.#key, this.adminKey] = ['api_key', 'admin_key'].map((name) => keys.match(new RegExp(`^${name} = "(.*)"$`, 'm'))[1]);
        // With keys of its own there is no page of development.
        if (this.code || this.#env.RINGPUSH_COLLECT__KEYS) return;
      } catch { /* not ready yet */ }
    }
    // Or it would keep this script alive.
    this.#process.kill('SIGKILL');
    throw new Error('the server did not start');
  }

  down(signal) {
    return new Promise((resolve) => {
      this.#process.once('exit', resolve);
      this.#process.kill(signal);
    });
  }

  /** A call of collect's API, or of auth's. */
  async call(method, path, body, role = 'collect') {
    const key = role === 'auth' ? this.adminKey : this.#key;
    const answer = await fetch(`http://${this.ports[role]}${path}`, {
      method,
      headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    if (!answer.ok) throw new Error(`${method} ${path}: ${answer.status} ${await answer.text()}`);
    return answer.json();
  }

  async token(user, ttl = 3600) {
    return (await this.call('POST', '/v1/tokens', { user, ttl_s: ttl }, 'auth')).token;
  }

  /** Publishes payloads for a user, one after another. Returns their numbers. */
  async publish(user, payloads) {
    const seqs = [];
    for (const payload of payloads) {
      seqs.push((await this.call('POST', '/v1/messages', { to: { user }, payload })).accepted[0].seq);
    }
    return seqs;
  }

  async stop() {
    if (this.#process.exitCode === null && this.#process.signalCode === null) await this.down('SIGTERM');
    await rm(this.#data, { recursive: true, force: true });
  }
}
