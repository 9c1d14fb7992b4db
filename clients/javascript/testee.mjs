// The JavaScript library as the transcripts drive it: see clients/conformance/README.md.
import { createInterface } from 'node:readline';
import { createRequire } from 'node:module';
import { resolve } from 'node:path';
import { connect, Refused } from './src/index.js';

const WebSocket = globalThis.WebSocket ?? createRequire(resolve(process.env.RINGPUSH_WS ?? '.', 'x.js'))('ws').WebSocket;
const say = (event) => process.stdout.write(`${JSON.stringify(event)}\n`);
let handler = 'ok';
let released = () => {};
const clients = [];
const watching = new Map();

const token = (url) => async ({ reason, signal }) => {
  const answer = await fetch(`${url}/token?reason=${reason}`, { signal });
  if (answer.status === 403) throw new Refused();
  if (!answer.ok) throw new Error(`answered ${answer.status}`);
  return answer.text();
};

async function handle({ seq, event, payload, topic, inLog, live }) {
  // What is watched is shown by its loop.
  if (inLog && watching.has(topic)) return;
  say({ message: { seq, event, payload, topic, live } });
  if (handler === 'fail') throw new Error('as it was told');
  if (handler === 'hold') await new Promise((resolve) => { released = resolve; });
}

function begin({ url, clients: count = 1, device, ...options }) {
  for (let n = 0; n < count; n += 1) {
    const client = connect({
      url, WebSocket, token: token(url), device: count === 1 ? device : `d-${n}`, ...options,
      onError: (fault) => say({ error: fault.code }),
    });
    client.onState(({ name, cause }) => say({ state: name, cause }));
    client.onGap((gap) => say({ gap }));
    client.on('*', handle);
    clients.push(client);
  }
}

async function watch(client, { topic, since }) {
  const abort = new AbortController();
  watching.set(topic, abort);
  try {
    for await (const message of client.watch(topic, { since, signal: abort.signal })) {
      const { seq, payload, live } = message;
      say({ message: { seq, payload, topic, live } });
    }
  } catch (error) {
    say({ error: error.code });
  }
}

createInterface({ input: process.stdin }).on('line', async (line) => {
  const command = JSON.parse(line);
  if (command.connect) begin(command.connect);
  if (command.handler) { handler = command.handler; if (handler !== 'hold') released(); }
  for (const client of clients) {
    if (command.wake) client.wake();
    if (command.refresh) client.refresh();
    if (command.watch) watch(client, command.watch);
    if (command.unwatch) watching.get(command.unwatch)?.abort();
    if (command.close) client.close().then(() => say({ closed: true }));
  }
});
