// The demo page: what it receives comes by the client library, as this server serves it under /client.

import { connect, Refused } from '/client/index.js';

const LOG_LINES = 200;
const WORDS = { live: 'live', 'catching-up': 'catching up', connecting: 'connecting', moving: 'moving', offline: 'offline' };
const $ = (id) => document.getElementById(id);

// The server prints the page's URL with a code that lets it make tokens and publish. It is kept in this browser, out of the
// address bar, and sent with each such request.
const given = new URL(location.href).searchParams.get('code');
if (given) {
  localStorage.setItem('code', given);
  history.replaceState(null, '', '/');
}

let development = false;
let client = null;

function show(name, words) {
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

/** One device per browser profile, unless the page names another. */
function device() {
  const name = $('device').value || localStorage.getItem('device') || `web-${Math.random().toString(36).slice(2, 8)}`;
  localStorage.setItem('device', name);
  $('device').value = name;
  return name;
}

function begin(token, user) {
  let received = 0;
  let connections = 0;
  const made = connect({
    url: location.origin,
    token,
    device: device(),
    ...(user && { user }),
    onError: (fault) => log('fault', `${fault.code}: ${fault.message}`),
  });
  made.on('*', ({ seq, id, topic, event, payload }) => {
    received += 1;
    $('last').textContent = seq;
    $('count').textContent = received;
    log('message', JSON.stringify({ seq, id, topic, event, payload }));
  });
  made.onGap((gap) => log('gap', JSON.stringify(gap)));
  made.onState((state) => {
    const { name, node, cause } = state;
    if (name === 'catching-up') $('connections').textContent = connections += 1;
    if (node) $('node').textContent = node;
    log(name, cause ?? node ?? '');
    if (name === 'waiting') show(name, 'waiting');
    else if (name !== 'stopped') show(name, WORDS[name]);
    else ended(made, cause);
  });
  return made;
}

function ended(made, cause) {
  show(cause === 'closed' ? 'off' : 'refused', cause === 'closed' ? 'not connected' : 'refused');
  if (client !== made) return;
  client = null;
  $('toggle').textContent = 'Connect';
  $('toggle').disabled = false;
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
  if (!answer.ok) throw answer.status < 500 ? new Refused(body.detail) : new Error(body.detail);
  return body.token;
}

$('connect').addEventListener('submit', (event) => {
  event.preventDefault();
  if (client) {
    // Until it is closed there is nothing else to do.
    $('toggle').disabled = true;
    client.close();
    return;
  }
  const user = development ? $('user').value : undefined;
  client = begin(development ? () => fetchToken(user) : () => $('token').value.trim(), user);
  $('toggle').textContent = 'Disconnect';
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

device();
const mode = await (await fetch('/dev', { headers: code() })).json();
development = mode.development;
if (development && !mode.code) log('code', 'open this page by the URL that ringpush printed at start: it has a code');
for (const element of document.querySelectorAll('.development')) element.hidden = !development;
for (const element of document.querySelectorAll('.production')) element.hidden = development;
document.documentElement.dataset.ready = '';
