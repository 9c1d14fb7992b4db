// Many clients in one process, as `ringpush audit --clients js` drives them. It reads one line of JSON from its standard
// input, {"url","device","users":[{"user","token"}]}, and writes one JSON array per line to its standard output:
// [n,"message",seq,id] or for a message of a log [n,"message",seq,id,topic], [n,"gap",after,before] or [n,"state",{…}] of user n. It ends when its input does.
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';
import { resolve } from 'node:path';
import { connect } from './src/index.js';

const WebSocket = globalThis.WebSocket ?? createRequire(resolve(process.env.RINGPUSH_WS ?? '.', 'x.js'))('ws').WebSocket;
const say = (...event) => process.stdout.write(`${JSON.stringify(event)}\n`);

const lines = createInterface({ input: process.stdin });
let clients = [];
lines.once('line', (line) => {
  const { url, device, users } = JSON.parse(line);
  clients = users.map(({ user, token }, n) => {
    const client = connect({
      url, user, device, begin: 'latest', WebSocket, token: () => token,
      onError: (fault) => process.stderr.write(`${user}: ${fault.code}: ${fault.message}\n`),
    });
    client.on('*', ({ seq, id, topic, inLog }) => say(n, 'message', seq, id, ...(inLog ? [topic] : [])));
    // The audit knows what a log lacks.
    client.onGap(({ after, before, topic }) => topic || say(n, 'gap', after, before));
    client.onState((state) => say(n, 'state', state));
    return client;
  });
});
lines.once('close', async () => {
  await Promise.all(clients.map((client) => client.close()));
  process.exit(0);
});
