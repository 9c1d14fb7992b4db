// Plays the server of each transcript against a testee; see README.md.
import { spawn } from 'node:child_process';
import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { readdirSync, readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const HERE = dirname(fileURLToPath(import.meta.url));
const WITHIN_MS = 15_000;
const SIDE_BY_SIDE = 3;

const words = process.argv.slice(2);
const cut = words.indexOf('--');
if (cut < 0) {
  console.error('usage: run.mjs [--ws DIR] [NAME…] -- PROGRAM [WORD…]');
  process.exit(64);
}
const command = words.slice(cut + 1);
const own = words.slice(0, cut);
const at = own.indexOf('--ws');
const wsAt = at < 0 ? process.cwd() : own.splice(at, 2)[1];
const { WebSocketServer } = createRequire(join(resolve(wsAt), 'x.js'))('ws');

const matches = (is, wanted) => Object.entries(wanted).every(([name, value]) =>
  (value !== null && typeof value === 'object' && !Array.isArray(value))
    ? is?.[name] !== null && typeof is?.[name] === 'object' && matches(is[name], value)
    : JSON.stringify(is?.[name]) === JSON.stringify(value));

/** Events that are waited for, in the order in which they came. */
class Inbox {
  constructor() { this.kept = []; this.waiting = null; }
  put(event) { this.kept.push(event); this.waiting?.(); }
  async until(what, wanted, withinMs = WITHIN_MS) {
    const end = Date.now() + withinMs;
    const seen = [];
    for (;;) {
      while (this.kept.length) {
        const event = this.kept.shift();
        if (wanted(event)) return event;
        seen.push(event);
      }
      const left = end - Date.now();
      if (left <= 0) throw new Error(`${what} did not come in ${withinMs} ms; came: ${JSON.stringify(seen).slice(0, 600)}`);
      await new Promise((go) => {
        const timer = setTimeout(go, left);
        this.waiting = () => { clearTimeout(timer); go(); };
      });
      this.waiting = null;
    }
  }
  async never(what, wanted, ms) {
    const seen = await this.until(what, wanted, ms).catch(() => null);
    if (seen) throw new Error(`${what} came: ${JSON.stringify(seen)}`);
  }
}

class World {
  constructor(header) {
    this.header = header;
    this.sockets = {};
    this.arrivals = new Inbox();
    this.app = new Inbox();
    this.asked = [];
    this.tokens = 'ok';
    this.refusals = [];
    this.ticket = 0;
  }

  async start() {
    this.http = createServer((request, response) => this.answer(request, response));
    this.ws = new WebSocketServer({ noServer: true });
    this.http.on('upgrade', (request, socket, head) => {
      const refusal = this.refusals.shift();
      if (refusal) {
        const more = refusal.retry_after ? `Retry-After: ${refusal.retry_after}\r\n` : '';
        socket.end(`HTTP/1.1 ${refusal.refuse} No\r\n${more}Content-Length: 0\r\nConnection: close\r\n\r\n`);
        return;
      }
      this.ws.handleUpgrade(request, socket, head, (opened) => this.opened(opened, request));
    });
    await new Promise((go) => this.http.listen(0, '127.0.0.1', go));
    this.url = `http://127.0.0.1:${this.http.address().port}`;
    this.testee = spawn(command[0], command.slice(1), { stdio: ['pipe', 'pipe', 'inherit'] });
    this.testee.stdin.on('error', () => {});
    createInterface({ input: this.testee.stdout }).on('line', (line) => this.app.put(JSON.parse(line)));
  }

  answer(request, response) {
    const { pathname, searchParams } = new URL(request.url, this.url);
    if (pathname === '/token') {
      this.asked.push(searchParams.get('reason'));
      const [status, body] = { ok: [200, `token-${this.asked.length}`], refuse: [403, ''], fail: [500, ''], rubbish: [200, ' '] }[this.tokens];
      response.writeHead(status).end(body);
      return;
    }
    const refusal = pathname === '/v1/connect' && this.header.connect && this.refusals[0]?.at === 'connect' && this.refusals.shift();
    if (refusal) {
      const headers = { 'content-type': 'application/problem+json', ...(refusal.retry_after && { 'retry-after': String(refusal.retry_after) }) };
      response.writeHead(refusal.refuse, headers).end(JSON.stringify({ status: refusal.refuse, reason: refusal.reason, detail: 'no' }));
      return;
    }
    if (pathname !== '/v1/connect' || !this.header.connect) return response.writeHead(404).end();
    const socket = `${this.url.replace('http', 'ws')}/v1/ws`;
    const ticket = `ticket-${this.ticket += 1}`;
    const place = { url: `${socket}?ticket=${ticket}`, node: 'push-0', expires_in_ms: 30000 };
    if (this.header.connect === 'socket') Object.assign(place, { socket, ticket });
    response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(place));
  }

  opened(socket, request) {
    const arrival = { socket, at: Date.now(), frames: new Inbox(), closed: null };
    arrival.gone = new Promise((go) => socket.on('close', (code) => { arrival.closed = code; go(code); }));
    const query = Object.fromEntries(new URL(request.url, this.url).searchParams);
    if (query.ticket) {
      arrival.auth = query;
      this.arrivals.put(arrival);
    }
    socket.on('message', (data) => {
      const frame = JSON.parse(data);
      if (arrival.auth) return arrival.frames.put(frame);
      arrival.auth = frame;
      this.arrivals.put(arrival);
    });
    socket.on('error', () => {});
  }

  tell(command) { this.testee.stdin.write(`${JSON.stringify(command)}\n`); }

  welcome(name, more = {}) {
    const { auth, socket } = this.sockets[name];
    const now = Date.now();
    const since = Number(auth.since ?? 0);
    socket.send(JSON.stringify({
      type: 'welcome', user: 'alice', device: auth.device ?? 'd', node: 'push-0', session: 's', generation: 'g', epoch: 1,
      since, ping_every_ms: 25000, heartbeat_ms: 25000, reconnect: { min_ms: 0, max_ms: 300 },
      token_expires_at: new Date(now + 3_600_000).toISOString(), server_time: new Date(now).toISOString(),
      features: ['heartbeat', 'window', 'begin', 'ticket', 'history'], ...more,
    }));
  }

  async stop() {
    this.testee.kill('SIGKILL');
    for (const client of this.ws.clients) client.terminate();
    this.ws.close();
    this.http.closeAllConnections?.();
    await new Promise((go) => this.http.close(go));
  }
}

const wait = (ms) => new Promise((go) => setTimeout(go, ms));
const message = (frame) => ({ type: 'message', id: `m-${frame.seq}`, accepted_at: '2026-11-28T00:00:00.000Z',
  expires_at: '2036-11-28T00:00:00.000Z', payload: frame.seq, ...frame });

const STEPS = {
  async accept(world, step) {
    const began = Date.now();
    const arrival = await world.arrivals.until('a socket', () => true, step.within_ms);
    if (step.after_ms && arrival.at - began < step.after_ms) throw new Error(`it came after ${arrival.at - began} ms`);
    if (step.auth && !matches(arrival.auth, step.auth)) throw new Error(`it said ${JSON.stringify(arrival.auth)}`);
    for (const name of step.with ?? []) if (!arrival.auth[name]) throw new Error(`it said no ${name}: ${JSON.stringify(arrival.auth)}`);
    for (const name of step.without ?? []) {
      if (name in arrival.auth) throw new Error(`it said ${name}: ${JSON.stringify(arrival.auth)}`);
    }
    world.sockets[step.accept] = arrival;
  },
  welcome: (world, step) => world.welcome(step.welcome, step.more),
  say(world, { say, frame }) {
    const said = frame.type === 'message' ? message(frame) : frame;
    world.sockets[say].socket.send(JSON.stringify(said));
  },
  say_text: (world, step) => world.sockets[step.say_text].socket.send(step.text),
  messages(world, { messages, from, to }) {
    for (let seq = from; seq <= to; seq += 1) world.sockets[messages].socket.send(JSON.stringify(message({ seq })));
  },
  move(world, { move, after_ms: afterMs }) {
    const url = `${world.url.replace('http', 'ws')}/v1/ws?hops=1&epoch=2`;
    const order = { type: 'move', url, node: 'push-1', epoch: 2, after_ms: afterMs, reason: 'owner' };
    world.sockets[move].socket.send(JSON.stringify(order));
  },
  async count(world, step) {
    let count = 0;
    for (;;) {
      const frame = await world.sockets[step.count].frames.until(JSON.stringify(step.last), (f) => matches(f, step.frame), step.within_ms);
      count += 1;
      if (matches(frame, step.last)) break;
    }
    if (count > step.most) throw new Error(`${count} came`);
  },
  hear: (world, step) => world.sockets[step.hear].frames.until(JSON.stringify(step.frame), (f) => matches(f, step.frame), step.within_ms),
  unheard: (world, step) => world.sockets[step.unheard].frames.never(JSON.stringify(step.frame), (f) => matches(f, step.frame), step.ms),
  app: (world, step) => world.app.until(JSON.stringify(step.app), (event) => matches(event, step.app), step.within_ms),
  unseen: (world, step) => world.app.never(JSON.stringify(step.unseen), (event) => matches(event, step.unseen), step.ms),
  close: (world, step) => world.sockets[step.close].socket.close(step.code, step.reason ?? ''),
  drop: (world, step) => world.sockets[step.drop].socket.terminate(),
  async gone(world, step) {
    const late = wait(step.within_ms ?? WITHIN_MS).then(() => { throw new Error(`${step.gone} is open still`); });
    await Promise.race([world.sockets[step.gone].gone, late]);
  },
  refuse: (world, step) => { world.refusals.push(step); },
  nobody: (world, step) => world.arrivals.never('a socket', () => true, step.nobody),
  token: (world, step) => { world.tokens = step.token; },
  async asked(world, step) {
    const count = () => world.asked.filter((reason) => reason === step.asked.reason).length;
    const end = Date.now() + (step.within_ms ?? WITHIN_MS);
    while (count() < step.times && Date.now() < end) await wait(10);
    if (count() !== step.times) throw new Error(`tokens were asked for because of ${JSON.stringify(world.asked)}`);
  },
  do: (world, step) => world.tell(step.do),
  async sleep(world, step) {
    world.testee.kill('SIGSTOP');
    await wait(step.sleep);
    world.testee.kill('SIGCONT');
  },
  async storm(world, { storm: { clients, hint } }) {
    const all = [];
    for (let n = 0; n < clients; n += 1) {
      const arrival = await world.arrivals.until(`socket ${n}`, () => true, 20_000);
      world.sockets.storm = arrival;
      world.welcome('storm', { reconnect: hint });
      all.push(arrival);
    }
    await wait(300);
    const began = Date.now();
    for (const { socket } of all) socket.terminate();
    const delays = [];
    for (let n = 0; n < clients; n += 1) {
      const arrival = await world.arrivals.until(`socket ${n} again`, () => true, hint.max_ms + 5_000);
      delays.push(arrival.at - began);
    }
    const [early, late] = [Math.min(...delays), Math.max(...delays)];
    if (early < hint.min_ms - 5 || late > hint.max_ms + 1_000) throw new Error(`they came after ${early} to ${late} ms`);
    const quarter = (hint.max_ms - hint.min_ms) / 4;
    for (let n = 0; n < 4; n += 1) {
      const count = delays.filter((delay) => delay >= hint.min_ms + n * quarter && delay < hint.min_ms + (n + 1) * quarter).length;
      if (count < clients / 10) throw new Error(`${count} of ${clients} came in quarter ${n + 1}`);
    }
  },
};

async function play(file) {
  const lines = readFileSync(file, 'utf8').split('\n').filter((line) => line.trim() && !line.startsWith('#'));
  const [header, ...steps] = lines.map((line) => JSON.parse(line));
  const world = new World(header);
  await world.start();
  try {
    // How the handler begins is said first, or a message could come before it.
    while (steps[0] && 'do' in steps[0]) STEPS.do(world, steps.shift());
    world.tell({ connect: { url: world.url, user: 'alice', device: 'd-1', ...header.options } });
    const before = lines.length - steps.length;
    for (const [n, step] of steps.entries()) {
      const kind = Object.keys(STEPS).find((name) => name in step);
      if (!kind) throw new Error(`step ${n + 1 + before}: unknown: ${JSON.stringify(step)}`);
      try { await STEPS[kind](world, step); } catch (error) {
        throw new Error(`step ${n + 1 + before} ${JSON.stringify(step)}: ${error.message}`);
      }
    }
  } finally {
    await world.stop();
  }
  return header.title;
}

const folder = join(HERE, 'transcripts');
const files = readdirSync(folder).filter((name) => name.endsWith('.jsonl') && (own.length === 0 || own.some((word) => name.includes(word)))).sort();
let failed = 0;
const queue = [...files];
await Promise.all(Array.from({ length: SIDE_BY_SIDE }, async () => {
  for (let name = queue.shift(); name; name = queue.shift()) {
    try {
      const title = await play(join(folder, name));
      console.log(`ok      ${name.slice(0, -6)}: ${title}`);
    } catch (error) {
      failed += 1;
      console.log(`FAILED  ${name.slice(0, -6)}: ${error.message}`);
    }
  }
}));
console.log(`${files.length - failed} of ${files.length} passed`);
process.exit(failed === 0 && files.length > 0 ? 0 : 1);
