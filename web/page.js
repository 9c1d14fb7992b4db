// A client of ringpush in plain JavaScript: it connects, follows moves, resumes after what it has,
// and shows each message once, also through a restart of the server.

const LOG_LINES = 200;
const $ = (id) => document.getElementById(id);

// What this tab has: kept in the session storage, so that a reload resumes too.
const kept = {
  get device() {
    let device = sessionStorage.getItem('device');
    if (!device) {
      device = `web-${Math.random().toString(36).slice(2, 8)}`;
      sessionStorage.setItem('device', device);
    }
    return device;
  },
  set device(name) { sessionStorage.setItem('device', name); },
};

// The server prints the page's URL with a code that lets it make tokens and publish. It is kept in this browser, out of the
// address bar, and sent with each such request.
const given = new URL(location.href).searchParams.get('code');
if (given) {
  localStorage.setItem('code', given);
  history.replaceState(null, '', '/');
}

let development = false;
let client = null;

function state(name, words) {
  $('state').dataset.state = name;
  $('state').textContent = words;
}

function log(type, words) {
  const line = document.createElement('li');
  const kind = document.createElement('b');
  kind.textContent = type;
  line.append(kind, ` ${words}`);
  line.dataset.type = type;
  $('log').prepend(line);
  while ($('log').children.length > LOG_LINES) $('log').lastChild.remove();
}

class Client {
  constructor(token, device) {
    this.token = token;          // () => Promise<string>
    this.device = device;
    this.last = null;            // the last seq shown, or known to be gone
    this.received = 0;
    this.connections = 0;
    this.hint = { min_ms: 0, max_ms: 2000 };
    this.failures = 0;
    this.socket = null;          // the one in use
    this.next = null;            // the one a move is opening
    this.stopped = false;
    this.order = null;           // the last move, and how often it was tried
    this.tries = 0;
  }

  async start() {
    if (this.stopped) return;
    state('catching-up', 'connecting');
    try {
      const token = await this.token();
      const scheme = location.protocol === 'https:' ? 'wss' : 'ws';
      this.socket = this.open(`${scheme}://${location.host}/v1/ws`, token);
    } catch (error) {
      if (error.refused) this.refused(error.message);
      else this.comeBack(error.message);
    }
  }

  stop() {
    this.stopped = true;
    clearTimeout(this.timer);
    this.socket?.close(1000);
    this.next?.close(1000);
    state('off', 'not connected');
  }

  open(url, token) {
    const socket = new WebSocket(url, 'ringpush.v1.json');
    socket.onopen = () => {
      const auth = { type: 'auth', token, device: this.device };
      if (this.last !== null) auth.since = this.last;
      socket.send(JSON.stringify(auth));
    };
    socket.onmessage = (event) => this.frame(socket, JSON.parse(event.data));
    socket.onclose = (event) => this.closed(socket, event.code);
    return socket;
  }

  closed(socket, code) {
    if (this.stopped) return;
    if (socket === this.next) {
      this.next = null;
      if (this.tries < 3) this.tryMove();
      return;
    }
    if (socket !== this.socket) return;
    if (this.next) { this.socket = this.next; this.next = null; return; }
    if (code >= 4500 && code < 5000) this.refused(`closed with ${code}`);
    else this.comeBack(`closed with ${code}`);
  }

  refused(why) {
    this.stopped = true;
    log('refused', why);
    state('refused', 'refused');
    $('toggle').textContent = 'Connect';
    client = null;
  }

  // Back after a time drawn from the server's hint; the longer it stays away, the longer.
  comeBack(why) {
    if (this.stopped) return;
    this.failures += 1;
    const longest = Math.min(10000, Math.max(this.hint.max_ms, 200 * 2 ** Math.min(this.failures, 6)));
    const rest = this.hint.min_ms + Math.random() * (longest - this.hint.min_ms);
    log('waiting', `${why}; again in ${Math.round(rest)} ms`);
    state('waiting', 'waiting');
    this.timer = setTimeout(() => this.start(), rest);
  }

  frame(socket, frame) {
    switch (frame.type) {
      case 'welcome':
        this.failures = 0;
        this.connections += 1;
        this.hint = frame.reconnect;
        $('node').textContent = frame.node;
        $('connections').textContent = this.connections;
        if (socket === this.socket) state('catching-up', 'catching up');
        break;
      case 'message':
        if (this.last !== null && frame.seq <= this.last) return;
        this.last = frame.seq;
        this.received += 1;
        $('last').textContent = frame.seq;
        $('count').textContent = this.received;
        socket.send(JSON.stringify({ type: 'ack', seq: frame.seq }));
        break;
      case 'gap':
        // During a move both sockets may tell of the same gap; only a reset goes back.
        if (frame.reason === 'reset') this.last = frame.before - 1;
        else this.last = Math.max(this.last ?? 0, frame.before - 1);
        break;
      case 'caught_up':
        if (socket === this.next) {
          const old = this.socket;
          [this.socket, this.next] = [this.next, null];
          old.close(1000);
        }
        state('live', 'live');
        break;
      case 'move':
        this.move(frame);
        break;
      case 'error':
        if (frame.reconnect) this.hint = frame.reconnect;
        break;
    }
    const { type, ...rest } = frame;
    log(type, JSON.stringify(rest));
  }

  move(frame) {
    state('moving', `moving to ${frame.node}`);
    this.order = frame;
    this.tries = 0;
    setTimeout(() => this.openNext(), frame.after_ms);
  }

  // The old socket serves until the new one has caught up; if none can be opened, until the next move.
  async openNext() {
    if (this.stopped || this.next) return;
    this.tries += 1;
    try {
      this.next = this.open(this.order.url, await this.token());
    } catch {
      if (this.tries < 3) this.tryMove();
    }
  }

  tryMove() {
    const { min_ms: min, max_ms: max } = this.hint;
    setTimeout(() => this.openNext(), min + Math.random() * (max - min));
  }
}

function code() {
  return { 'x-ringpush-code': localStorage.getItem('code') ?? '' };
}

async function post(path, body) {
  const answer = await fetch(path, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...code() },
    body: JSON.stringify(body),
  });
  return [answer, await answer.json()];
}

async function fetchToken(user) {
  const [answer, body] = await post('/dev/token', { user, ttl_s: 3600 });
  if (!answer.ok) throw Object.assign(new Error(body.detail), { refused: answer.status < 500 });
  return body.token;
}

$('connect').addEventListener('submit', (event) => {
  event.preventDefault();
  if (client) {
    client.stop();
    client = null;
    $('toggle').textContent = 'Connect';
    return;
  }
  kept.device = $('device').value || 'web';
  const user = $('user').value;
  const token = development ? () => fetchToken(user) : async () => $('token').value.trim();
  client = new Client(token, kept.device);
  $('toggle').textContent = 'Disconnect';
  client.start();
});

$('publish').addEventListener('submit', async (event) => {
  event.preventDefault();
  const note = $('published');
  delete note.dataset.bad;
  try {
    const payload = JSON.parse($('payload').value);
    const [answer, body] = await post('/dev/publish', { to: { user: $('to').value }, payload });
    if (!answer.ok) throw new Error(`${answer.status} ${body.detail}`);
    note.textContent = `stored as ${body.accepted[0].seq} for ${body.accepted[0].user}`;
  } catch (error) {
    note.dataset.bad = '';
    note.textContent = error instanceof SyntaxError ? `the payload is not JSON: ${error.message}` : error.message;
  }
});

$('device').value = kept.device;
const mode = await (await fetch('/dev', { headers: code() })).json();
development = mode.development;
if (development && !mode.code) log('code', 'open this page by the URL that ringpush printed at start: it has a code');
for (const element of document.querySelectorAll('.development')) element.hidden = !development;
for (const element of document.querySelectorAll('.production')) element.hidden = development;
document.documentElement.dataset.ready = '';
