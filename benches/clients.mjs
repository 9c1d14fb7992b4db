// What the JavaScript library costs: 1,000 clients in one Node process, beside as many bare sockets of `ws` with JSON.parse.
//
//     cargo build --release && node benches/clients.mjs
//
// Prints the processor time per message of both, in turn, and their ratio (target: at most 1.5). It needs `ws` where
// scripts/test has put it.

import { spawn } from 'node:child_process';
import { createRequire } from 'node:module';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as pause } from 'node:timers/promises';

const root = resolve(import.meta.dirname, '..');
const CLIENTS = 1_000;
const MESSAGES = 200; // to each
/** So many at once for a client: alone, as most messages come, and in bursts. */
const BURSTS = [1, 10];
const BATCH = 1_000;
const RUNS = 3;
const PAYLOAD = { text: 'x'.repeat(80) };

/** As a child: opens the sockets, says `ready`, and then the processor time of all messages in microseconds. */
async function receive(kind) {
  const { WebSocket } = createRequire(join(root, 'target/tools/x.js'))('ws');
  const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
  const { url, tokens, device } = JSON.parse((await lines.next()).value);
  let count = 0;
  let began;
  let done;
  const all = new Promise((go) => { done = go; });
  const received = () => {
    count += 1;
    if (count === CLIENTS * MESSAGES) done(process.cpuUsage(began));
  };
  if (kind === 'library') {
    const { connect } = await import('../clients/javascript/src/index.js');
    await Promise.all(tokens.map(({ user, token }) => {
      const client = connect({ url, user, device, begin: 'latest', token: () => token, WebSocket });
      client.on('*', received);
      return client.caughtUp();
    }));
  } else {
    await Promise.all(tokens.map(({ token }) => new Promise((go) => {
      const socket = new WebSocket(`${url.replace('http', 'ws')}/v1/ws?device=bare&since=latest`, { headers: { authorization: `Bearer ${token}` } });
      socket.on('message', (data) => {
        const frame = JSON.parse(data);
        if (frame.type === 'message') received(frame.payload);
        else if (frame.type === 'caught_up') go();
      });
    })));
  }
  began = process.cpuUsage();
  console.log('ready');
  const { user, system } = await all;
  console.log(user + system);
  process.exit(0);
}

async function measure(server, kind, burst) {
  const child = spawn('node', [import.meta.filename, kind], { stdio: ['pipe', 'pipe', 'inherit'] });
  const exited = new Promise((go) => { child.once('exit', go); });
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  // A new device each time: one that is known would first get what the run before has published.
  const device = `bench-${child.pid}`;
  child.stdin.write(`${JSON.stringify({ url: server.url, tokens: server.tokens, device })}\n`);
  await lines.next();
  for (let n = 0; n < MESSAGES; n += burst) {
    const messages = server.tokens.flatMap(({ user }) => Array.from({ length: burst }, () => ({ to: { user }, payload: PAYLOAD, ttl_s: 60 })));
    for (let from = 0; from < messages.length; from += BATCH) {
      await server.call(server.collect, '/v1/messages/batch', server.key, { messages: messages.slice(from, from + BATCH) });
    }
  }
  const cpu = Number((await lines.next()).value) / (CLIENTS * MESSAGES);
  await exited;
  return cpu;
}

async function start() {
  const data = await mkdtemp(join(tmpdir(), 'ringpush-bench-'));
  const env = { ...process.env, RINGPUSH_PUSH__ACCEPT_PER_S: '100000' };
  for (const role of ['PUSH', 'COLLECT', 'AUTH', 'DISPATCH', 'OPS']) env[`RINGPUSH_${role}__LISTEN`] = '127.0.0.1:0';
  const child = spawn(join(root, 'target/release/ringpush'), ['serve', '--data', data], { env, stdio: 'ignore' });
  let ports;
  for (let n = 0; !ports && n < 500; n += 1) {
    await pause(20);
    ports = await readFile(join(data, 'listen.json'), 'utf8').then(JSON.parse, () => null);
  }
  const keys = await readFile(join(data, 'dev-keys.toml'), 'utf8');
  const key = (name) => keys.match(new RegExp(`^${name} = "(.*)"$`, 'm'))[1];
  const call = async (at, path, bearer, body) => {
    const headers = { authorization: `Bearer ${bearer}`, 'content-type': 'application/json' };
    const answer = await fetch(`http://${at}${path}`, { method: 'POST', headers, body: JSON.stringify(body) });
    if (!answer.ok) throw new Error(`${path}: ${answer.status} ${await answer.text()}`);
    return answer.json();
  };
  const tokens = [];
  for (let n = 0; n < CLIENTS; n += 1) {
    const user = `client-${n}`;
    tokens.push({ user, token: (await call(ports.auth, '/v1/tokens', key('admin_key'), { user, ttl_s: 3600 })).token });
  }
  const stop = async () => {
    child.kill();
    await new Promise((go) => { child.once('exit', go); });
    await rm(data, { recursive: true, force: true });
  };
  return { url: `http://${ports.push}`, collect: ports.collect, key: key('api_key'), tokens, call, stop };
}

if (process.argv[2]) await receive(process.argv[2]);
else {
  const server = await start();
  try {
    for (const burst of BURSTS) {
      const ratios = [];
      for (let run = 0; run < RUNS; run += 1) {
        const bare = await measure(server, 'bare', burst);
        const library = await measure(server, 'library', burst);
        ratios.push(library / bare);
        console.log(`${burst} at once: bare ws ${bare.toFixed(1)} us a message, library ${library.toFixed(1)} us: x ${(library / bare).toFixed(2)}`);
      }
      const median = ratios.sort((a, b) => a - b)[Math.floor(RUNS / 2)];
      console.log(`${burst} at once: x ${median.toFixed(2)}  (target: at most 1.5)  ${median <= 1.5 ? 'met' : 'NOT MET'}`);
    }
  } finally {
    await server.stop();
  }
}
