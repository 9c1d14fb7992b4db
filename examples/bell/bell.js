import { connect, Refused } from './client/index.js';

const $ = (id) => document.getElementById(id);
const list = document.querySelector('ol');
const { push } = await (await fetch('settings')).json();
let client;
let oldest = Number.MAX_SAFE_INTEGER;
let fresh = 0;
let isLeaving = false;

async function token() {
  const answer = await fetch('token');
  if (answer.status === 403) throw new Refused('nobody is logged in');
  if (!answer.ok) throw new Error(`no token: ${answer.status}`);
  return answer.text();
}

/** One line of the list. What a message says is never taken for HTML. */
function line({ seq, payload, acceptedAt }, isNew) {
  const item = document.createElement('li');
  const when = document.createElement('time');
  when.textContent = acceptedAt.toLocaleString();
  item.append(payload?.title ?? JSON.stringify(payload), document.createElement('br'), when);
  item.classList.toggle('new', isNew);
  oldest = Math.min(oldest, seq);
  return item;
}

function count(number) {
  fresh = number;
  $('badge').textContent = number || '';
}

function open(user) {
  $('login').hidden = true;
  document.querySelector('main').hidden = false;
  $('who').textContent = user;
  client = connect({ url: push, user, token, tabs: 'shared' });
  client.on('*', (message) => {
    list.prepend(line(message, true));
    if ($('list').hidden) count(fresh + 1);
  });
  // What the list showed may be gone: read it anew.
  client.onGap(() => { list.replaceChildren(); oldest = Number.MAX_SAFE_INTEGER; return earlier(); });
  client.onState(({ name, cause }) => {
    $('state').textContent = name === 'stopped' ? `stopped: ${cause}` : name;
    // Another tab has logged out.
    if (cause === 'closed' && !isLeaving) location.reload();
  });
}

async function earlier() {
  const { messages, next } = await client.history({ before: oldest, limit: 20 });
  list.append(...messages.map((message) => line(message, false)));
  $('earlier').hidden = next === null;
}

$('bell').onclick = async () => {
  const opens = $('list').hidden;
  $('list').hidden = !opens;
  $('bell').setAttribute('aria-expanded', opens);
  if (!opens) return;
  count(0);
  if (list.children.length === 0) await earlier();
};
$('earlier').onclick = earlier;
$('logout').onclick = async () => {
  isLeaving = true;
  document.cookie = 'user=; max-age=0; path=/';
  await client.forget();
  location.reload();
};
$('login').onsubmit = (event) => {
  event.preventDefault();
  document.cookie = `user=${$('name').value}; path=/; samesite=strict`;
  open($('name').value);
};
const user = document.cookie.match(/(?:^|; )user=([^;]+)/)?.[1];
if (user) open(user);
