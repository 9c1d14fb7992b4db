// The console: the cluster live, and what became of one user's messages. Everything that it shows is a call of the
// documented API, with the key that the visitor has; the key is kept for the tab.

const KEY = 'ringpush-console-key';
const LOOK_EVERY_MS = 2000;
const KEPT_MS = 600_000;
// Counts travel with heartbeats, one in two seconds: a rate needs several of them.
const RATE_MS = 6000;
const MESSAGES = 20;
const COLOURS = 8;
const SVG = 'http://www.w3.org/2000/svg';

const $ = (id) => document.getElementById(id);
let key = sessionStorage.getItem(KEY);
/** What the cluster said in the last ten minutes, the oldest first. */
let seen = [];
/** Which colour a node has; one that comes again has the same. */
const colours = new Map();

class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** A call of the API. Throws [Refused] with what the server says. */
async function call(method, path, body) {
  const headers = { authorization: `Bearer ${key}` };
  if (body !== undefined) headers['content-type'] = 'application/json';
  let answer;
  try {
    answer = await fetch(path, { method, headers, body });
  } catch {
    throw new Refused(0, 'the server is not reached');
  }
  const text = await answer.text();
  if (answer.ok) return text === '' ? null : JSON.parse(text);
  let problem = {};
  try { problem = JSON.parse(text); } catch { /* not ours */ }
  const more = (problem.errors ?? []).map((error) => `${error.pointer}: ${error.detail}`).join('; ');
  throw new Refused(answer.status, [problem.detail ?? `the server answers ${answer.status}`, more].filter(Boolean).join(' '));
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}

function note(id, text, tone = '') {
  $(id).textContent = text;
  if (tone) $(id).dataset.tone = tone;
  else delete $(id).dataset.tone;
}

function state(kind, text) {
  $('state').dataset.state = kind;
  if ($('state').textContent !== text) $('state').textContent = text;
}

const number = (value) => (value >= 10 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(1));
const delay = (ms) => (ms === null || ms === undefined ? '–' : ms < 1000 ? `${ms} ms` : `${(ms / 1000).toFixed(1)} s`);
const colour = (node) => {
  if (!colours.has(node)) colours.set(node, colours.size % COLOURS);
  return `c${colours.get(node)}`;
};

// ---------------------------------------------------------------- the cluster

/** What a node did per second since about six seconds ago; 0 while there is nothing to compare with. */
function rate(node, what) {
  const now = seen.at(-1);
  const same = (look) => look.nodes.find((other) => other.node === node.node && other.incarnation === node.incarnation);
  const before = seen.find((look) => now.at - look.at <= RATE_MS && same(look));
  const seconds = (now.at - before.at) / 1000;
  return seconds > 0 ? Math.max(0, node[what] - same(before)[what]) / seconds : 0;
}

function drawRing(nodes) {
  const parts = [];
  // A circle of this radius has a circumference of 100.
  let from = 25;
  for (const node of nodes.filter((node) => node.share > 0)) {
    const share = node.share * 100;
    const gap = nodes.length > 1 ? Math.min(0.6, share / 4) : 0;
    const arc = drawn('circle', {
      cx: 21, cy: 21, r: 15.915, class: colour(node.node), 'stroke-dasharray': `${share - gap} ${100 - share + gap}`, 'stroke-dashoffset': from,
    });
    arc.append(drawn('title', {}));
    arc.firstChild.textContent = `${node.node}: ${share.toFixed(1)} %`;
    parts.push(arc);
    from -= share;
  }
  $('ring').replaceChildren(...parts);
  $('ring').setAttribute('aria-label', nodes.map((node) => `${node.node} ${(node.share * 100).toFixed(1)} %`).join(', '));
  $('ring-note').textContent = 'shares of the users';
}

function nodeRow(node) {
  const line = element('tr', undefined, { 'data-node': node.node, 'data-state': node.state });
  const name = element('td');
  name.append(element('span', '', { class: `swatch ${colour(node.node)}` }), node.node);
  const cells = [node.state, `${(node.share * 100).toFixed(1)} %`, node.sessions, number(node.rates.delivered), delay(node.delivery_p50_ms),
    delay(node.delivery_p99_ms), node.displaced, number(node.rates.moves)];
  line.append(name, ...cells.map((cell) => element('td', cell)));
  return line;
}

const CURVES = [
  { title: 'sockets', of: (node) => node.sessions, shown: number },
  { title: 'delivered /s', of: (node) => node.rates.delivered, shown: number },
  { title: 'delay p99', of: (node) => node.delivery_p99_ms ?? 0, shown: delay },
  { title: 'delay p50', of: (node) => node.delivery_p50_ms ?? 0, shown: delay },
  { title: 'moves /s', of: (node) => node.rates.moves, shown: number },
  { title: 'displaced', of: (node) => node.displaced, shown: number },
];

/** One line for each node, over the last ten minutes. */
function curve({ title, of, shown }) {
  const now = seen.at(-1).at;
  const lines = new Map();
  let most = 0;
  for (const look of seen) {
    for (const node of look.nodes) {
      const value = of(node);
      most = Math.max(most, value);
      if (!lines.has(node.node)) lines.set(node.node, []);
      lines.get(node.node).push([look.at, value]);
    }
  }
  const svg = drawn('svg', { viewBox: '0 0 300 100', preserveAspectRatio: 'none', role: 'img' });
  // What has been seen fills the width, until it is ten minutes.
  const span = Math.max(now - seen[0].at, 30_000);
  const place = ([at, value]) => `${(300 - ((now - at) / span) * 300).toFixed(1)},${(97 - (most > 0 ? value / most : 0) * 92).toFixed(1)}`;
  const latest = [];
  for (const [name, points] of lines) {
    svg.append(drawn('polyline', { class: colour(name), points: points.map(place).join(' ') }));
    latest.push(`${name} ${shown(points.at(-1)[1])}`);
  }
  svg.setAttribute('aria-label', `${title}: ${latest.join(', ')}`);
  const figure = element('figure', undefined, { 'data-curve': title });
  const caption = element('figcaption');
  caption.append(element('span', title), element('span', `most ${shown(most)}`));
  const axis = element('p', undefined, { class: 'axis' });
  const ago = span < 60_000 ? `${Math.round(span / 1000)} s ago` : `${Math.round(span / 60_000)} min ago`;
  axis.append(element('span', ago), element('span', 'now'));
  figure.append(caption, svg, axis);
  return figure;
}

function showCluster(cluster) {
  const at = performance.now();
  seen = seen.filter((look) => at - look.at <= KEPT_MS);
  seen.push({ at, nodes: cluster.nodes });
  for (const node of cluster.nodes) node.rates = { delivered: rate(node, 'delivered'), moves: rate(node, 'moves') };
  const sum = (of) => cluster.nodes.reduce((sum, node) => sum + of(node), 0);
  const worst = (of) => cluster.nodes.map(of).filter((ms) => ms !== null && ms !== undefined).reduce((a, b) => Math.max(a, b), -1);
  $('nodes-count').textContent = cluster.nodes.length;
  $('sessions').textContent = sum((node) => node.sessions);
  $('delivered').textContent = number(sum((node) => node.rates.delivered));
  $('moves').textContent = number(sum((node) => node.rates.moves));
  $('displaced').textContent = sum((node) => node.displaced);
  for (const name of ['p50', 'p99']) {
    const ms = worst((node) => node[`delivery_${name}_ms`]);
    $(name).textContent = delay(ms < 0 ? null : ms);
  }
  $('epoch').textContent = cluster.epoch;
  drawRing(cluster.nodes);
  $('nodes').replaceChildren(...cluster.nodes.map(nodeRow));
  $('curves').replaceChildren(...CURVES.map(curve));
  note('cluster-note', cluster.held ? 'The view is held: the registry is lost, or shows something else.' : '', 'warn');
  state(cluster.held ? 'waiting' : 'live', cluster.held ? 'view held' : 'live');
}

let again;

/** Looks at the cluster, and again, as long as there is this key. */
async function watch(mine) {
  if (key !== mine) return;
  try {
    const cluster = await call('GET', '/v1/cluster');
    if (key === mine) showCluster(cluster);
  } catch (refused) {
    if (key !== mine) return;
    if (refused.status === 401) return leave('This key is not known any more.');
    note('cluster-note', refused.message, 'bad');
    state('refused', refused.status === 0 ? 'not reached' : 'refused');
  }
  clearTimeout(again);
  again = setTimeout(() => watch(mine), LOOK_EVERY_MS);
}

// ---------------------------------------------------------------- one user

/** What became of a message on a device: words, and whether they are good. */
function onDevice(device, entry) {
  const name = device.device;
  if (device.acked) return [`${name}: acked`, 'good'];
  if (device.online && device.sent === false) return [`${name}: online, not sent yet: it reads slowly (${entry?.lag ?? '?'} not acked)`, 'warn'];
  if (device.online && device.sent === true) return [`${name}: sent, not acked yet`, 'warn'];
  if (device.online) return [`${name}: online, not acked yet`, 'warn'];
  return [`${name}: offline, gets it when it connects`, 'warn'];
}

/** In one sentence, why a message is or is not with the user. */
function why(status, user) {
  const acked = status.devices.filter((device) => device.acked).map((device) => device.device);
  const without = status.devices.filter((device) => !device.acked).map((device) => device.device);
  if (status.state === 'expired') return ['expired before a device acked it', 'bad'];
  if (status.devices.length === 0) return ['waits: no device of this user has ever connected', 'warn'];
  if (acked.length > 0 && without.length > 0) return [`acked on ${acked.join(', ')}, not on ${without.join(', ')}`, 'warn'];
  if (acked.length > 0) return ['acked', 'good'];
  if (!user.online) return ['waits: no device is online', 'warn'];
  const here = status.devices.filter((device) => device.online);
  if (here.every((device) => device.sent === false)) return ['waits: the device that is online has not acked what it was sent before, and is sent no more', 'warn'];
  return ['sent, and no device has acked it yet', 'warn'];
}

function messageItem(message, status, user, asked) {
  const item = element('li', undefined, { 'data-seq': message.seq });
  if (asked) item.dataset.asked = '';
  const head = element('div', undefined, { class: 'head' });
  head.append(element('b', message.seq));
  if (message.event) head.append(element('span', message.event));
  if (message.via) head.append(element('span', `by topic ${message.via}`));
  if (message.id !== undefined) head.append(element('span', `id ${message.id}`, { class: 'quiet' }));
  if (message.accepted_at) head.append(element('time', `accepted ${new Date(message.accepted_at).toLocaleString()}`));
  if (message.expires_at) head.append(element('time', `kept until ${new Date(message.expires_at).toLocaleString()}`));
  if (message.traceparent) head.append(element('span', `trace ${message.traceparent.slice(3, 35)}`, { class: 'quiet' }));
  item.append(head);
  if (status instanceof Error) {
    item.append(element('span', status.message, { 'data-tone': 'bad' }));
  } else {
    const [words, tone] = why(status, user);
    item.append(element('span', words, { 'data-tone': tone, class: 'outcome' }));
    const per = element('ul', undefined, { class: 'per' });
    for (const device of status.devices) {
      const entry = user.devices.find((known) => known.device === device.device);
      const [text, good] = onDevice(device, entry);
      per.append(element('li', text, { 'data-tone': good }));
    }
    item.append(per);
  }
  if (message.payload !== undefined) item.append(element('code', JSON.stringify(message.payload)));
  return item;
}

function deviceRow(device) {
  const line = element('tr', undefined, { 'data-device': device.device });
  const online = device.connected_at ? `since ${new Date(device.connected_at).toLocaleTimeString()}` : 'no';
  line.append(element('td', device.device), element('td', online, { 'data-tone': device.connected_at ? 'good' : 'warn' }),
    element('td', device.node ?? '–'), element('td', device.client ?? '–'), element('td', device.acked), element('td', device.lag));
  return line;
}

/** In one sentence, what is to be known about the user. */
function verdictOf(user) {
  if (user.head === null) return `${user.user} never had a message. Is the name right, and was the sender answered 202? 403 names the scope that its key lacks.`;
  if (user.devices.length === 0) return `No device has ever connected as ${user.user}. Its messages wait until they expire. Is the name in the token the same?`;
  if (!user.online) return `No device of ${user.user} is online. It gets what waits when it connects.`;
  const behind = user.devices.filter((device) => device.lag > 0)
    .map((device) => `${device.device}${device.connected_at ? '' : ', which is offline,'} has ${device.acked === 0 ? 'never acked a message' : 'not acked'}`
      + `${device.acked === 0 ? `: ${device.lag} wait` : ` ${device.lag} message${device.lag === 1 ? '' : 's'}`}`);
  if (behind.length > 0) return `${user.user} is online; ${behind.join('; ')}.`;
  return `${user.user} is online and has acked everything.`;
}

const statusOf = (name, which) =>
  call('GET', `/v1/users/${encodeURIComponent(name)}/messages/${encodeURIComponent(which)}/status`).catch((refused) => refused);

/** Goes up with each look and each key: an answer that comes late is not shown. */
let turn = 0;

async function look(name, which) {
  turn += 1;
  const mine = turn;
  note('find-note', 'looking');
  let user;
  try {
    user = await call('GET', `/v1/users/${encodeURIComponent(name)}`);
  } catch (refused) {
    if (turn !== mine) return;
    $('found').hidden = true;
    return note('find-note', refused.message, 'bad');
  }
  const messages = [];
  let unreadable = '';
  if (user.head !== null) {
    const after = Math.max(0, user.head - MESSAGES);
    try {
      const page = await call('GET', `/v1/users/${encodeURIComponent(name)}/messages?after=${after}&limit=${MESSAGES}`);
      messages.push(...page.messages);
    } catch (refused) {
      unreadable = refused.message;
    }
  }
  const items = [];
  if (which !== '') {
    const status = await statusOf(name, which);
    const known = messages.find((message) => String(message.seq) === which || message.id === which);
    if (status instanceof Error && status.status === 404) {
      const why = user.head === null ? 'none was ever accepted' : 'either it has expired and was removed, or it was never accepted';
      items.push(element('li', `No message ${which} is stored for ${name}: ${why}. Look at what the `
        + 'sender was answered. 401 and 403 are about its key (403 names the scope), 422 about its request, 429 about its rate.', { 'data-asked': '', 'data-tone': 'bad' }));
    } else {
      items.push(messageItem({ ...(status instanceof Error ? { seq: which } : status), payload: known?.payload }, status, user, true));
    }
  }
  const statuses = await Promise.all(messages.map((message) => statusOf(name, message.seq)));
  for (let n = messages.length - 1; n >= 0; n -= 1) {
    // The one that was asked for stands above already.
    if (![String(messages[n].seq), messages[n].id].includes(which)) items.push(messageItem(messages[n], statuses[n], user, false));
  }
  if (items.length === 0) items.push(element('li', unreadable || 'None: all have expired, or there never was one. One that has expired is still found by its id for a while.'));
  if (turn !== mine) return;
  $('verdict').textContent = verdictOf(user);
  const none = element('tr');
  none.append(element('td', 'none has ever connected', { colspan: 6 }));
  $('devices').replaceChildren(...user.devices.length > 0 ? user.devices.map(deviceRow) : [none]);
  $('messages').replaceChildren(...items);
  $('found').hidden = false;
  $('found').dataset.user = name;
  note('find-note', unreadable, 'bad');
}

async function send() {
  const user = $('found').dataset.user;
  let payload;
  try {
    payload = JSON.parse($('payload').value);
  } catch {
    return note('send-note', 'the payload is no JSON', 'bad');
  }
  try {
    const answer = await call('POST', '/v1/messages', JSON.stringify({ to: { user }, payload }));
    note('send-note', `stored as ${answer.accepted[0].seq}`, 'good');
  } catch (refused) {
    return note('send-note', refused.message, 'bad');
  }
  await look(user, '');
}

async function closeAll() {
  const user = $('found').dataset.user;
  $('sure-text').textContent = `Close every socket of ${user}, and refuse every token that was issued to it until now?`;
  $('sure').showModal();
  const answer = await new Promise((resolve) => { $('sure').onclose = () => resolve($('sure').returnValue); });
  $('sure').returnValue = '';
  if (answer !== 'yes') return;
  try {
    await call('DELETE', `/v1/users/${encodeURIComponent(user)}/sessions`);
    note('send-note', 'its sessions are closed; tokens issued until now are refused', 'good');
  } catch (refused) {
    return note('send-note', refused.message, 'bad');
  }
  await look(user, '');
}

// ---------------------------------------------------------------- the door

function enter() {
  $('door').hidden = true;
  for (const id of ['cluster', 'find', 'forget']) $(id).hidden = false;
  state('waiting', 'asking');
  watch(key);
  $('user').focus();
}

function leave(why) {
  key = null;
  seen = [];
  turn += 1;
  clearTimeout(again);
  for (const id of ['nodes', 'curves', 'devices', 'messages', 'verdict']) $(id).replaceChildren();
  delete $('found').dataset.user;
  sessionStorage.removeItem(KEY);
  for (const id of ['cluster', 'find', 'forget']) $(id).hidden = true;
  $('found').hidden = true;
  $('door').hidden = false;
  $('key').value = '';
  state('off', 'no key');
  note('door-note', why);
  $('key').focus();
}

$('enter').addEventListener('submit', async (event) => {
  event.preventDefault();
  key = $('key').value.trim();
  try {
    await call('GET', '/v1/cluster');
  } catch (refused) {
    // A key without this scope may be good for the rest.
    if (refused.status !== 403) {
      key = null;
      return note('door-note', refused.message, 'bad');
    }
  }
  sessionStorage.setItem(KEY, key);
  enter();
});
$('forget').addEventListener('click', () => leave('The key is forgotten.'));
$('look').addEventListener('submit', (event) => {
  event.preventDefault();
  look($('user').value.trim(), $('message').value.trim());
});
$('send').addEventListener('submit', (event) => {
  event.preventDefault();
  send();
});
$('close').addEventListener('click', closeAll);

if (key) enter();
else $('key').focus();
document.documentElement.dataset.ready = '';
