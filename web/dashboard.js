// The members of the view in use, what each holds, and what moves between them, once a second.

const $ = (id) => document.getElementById(id);
// Counts travel with the beats, one in two seconds: a rate needs several of them.
const WINDOW_MS = 6000;
const history = new Map();
let stored = null;

/** Per second over the window; 0 while there is nothing to compare with, or when another process has the name. */
function rates(node) {
  const now = { at: performance.now(), delivered: node.delivered, moves: node.moves };
  const key = `${node.node}/${node.incarnation}`;
  const seen = (history.get(key) ?? []).filter((earlier) => now.at - earlier.at < WINDOW_MS);
  seen.push(now);
  history.set(key, seen);
  const [first] = seen;
  const seconds = (now.at - first.at) / 1000;
  const rate = (what) => (seconds > 0 ? Math.max(0, now[what] - first[what]) / seconds : 0);
  return { delivered: rate('delivered'), moves: rate('moves') };
}

function number(value) {
  return value >= 10 || value === 0 ? Math.round(value) : value.toFixed(1);
}

function bar(part) {
  const cell = document.createElement('td');
  const meter = document.createElement('meter');
  meter.value = part;
  cell.append(meter, ` ${(part * 100).toFixed(1)} %`);
  return cell;
}

function row(node, sessions) {
  const line = document.createElement('tr');
  line.dataset.node = node.node;
  line.dataset.state = node.state;
  const text = (value) => {
    const cell = document.createElement('td');
    cell.textContent = value;
    return cell;
  };
  line.append(text(node.node), text(node.state), text(node.weight), bar(node.share),
    bar(sessions > 0 ? node.sessions / sessions : 0), text(node.sessions), text(node.displaced),
    text(number(node.rates.moves)), text(number(node.rates.delivered)));
  return line;
}

/** What this process stores per second; only one that runs collect has any. */
function storedPerSecond(metrics) {
  const line = metrics.split('\n').find((line) => line.startsWith('ringpush_stored_total '));
  if (!line) return '–';
  const now = { at: performance.now(), count: Number(line.split(' ')[1]) };
  const before = stored ?? now;
  stored = now;
  return now.at > before.at ? number((now.count - before.count) / ((now.at - before.at) / 1000)) : 0;
}

function show(cluster, metrics) {
  const nodes = cluster.nodes.map((node) => ({ ...node, rates: rates(node) }));
  const sum = (of) => nodes.reduce((sum, node) => sum + of(node), 0);
  const sessions = sum((node) => node.sessions);
  $('members').textContent = nodes.length;
  $('draining').textContent = nodes.filter((node) => node.state === 'draining').length;
  $('epoch').textContent = cluster.epoch;
  $('generation').textContent = cluster.generation;
  $('sessions').textContent = sessions;
  $('displaced').textContent = sum((node) => node.displaced);
  $('moves').textContent = number(sum((node) => node.rates.moves));
  $('delivered').textContent = number(sum((node) => node.rates.delivered));
  $('stored').textContent = storedPerSecond(metrics);
  $('nodes').replaceChildren(...nodes.map((node) => row(node, sessions)));
  $('state').dataset.state = cluster.held ? 'waiting' : 'live';
  $('state').textContent = cluster.held ? 'view held' : 'live';
}

async function look() {
  try {
    const [cluster, metrics] = await Promise.all([
      fetch('/cluster').then((answer) => answer.json()),
      fetch('/metrics').then((answer) => answer.text()),
    ]);
    show(cluster, metrics);
  } catch {
    $('state').dataset.state = 'refused';
    $('state').textContent = 'not reached';
  }
  setTimeout(look, 1000);
}
look();
