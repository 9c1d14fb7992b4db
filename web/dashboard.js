// The members of the view in use, and the rates of this process, once a second.

const $ = (id) => document.getElementById(id);
const RATES = { stored: 'ringpush_stored_total', delivered: 'ringpush_delivered_total', moves: 'ringpush_moves_total' };
let before = null;

function counters(text) {
  const found = { at: performance.now() };
  for (const line of text.split('\n')) {
    const [name, value] = line.split(' ');
    for (const [key, metric] of Object.entries(RATES)) if (name === metric) found[key] = Number(value);
  }
  return found;
}

function row(node) {
  const line = document.createElement('tr');
  line.dataset.node = node.node;
  const share = `${(node.share * 100).toFixed(1)} %`;
  for (const text of [node.node, node.state, node.weight, share, node.sessions, node.displaced]) {
    const cell = document.createElement('td');
    cell.textContent = text;
    line.append(cell);
  }
  return line;
}

async function look() {
  try {
    const [cluster, metrics] = await Promise.all([
      fetch('/cluster').then((answer) => answer.json()),
      fetch('/metrics').then((answer) => answer.text()),
    ]);
    $('epoch').textContent = cluster.epoch;
    $('generation').textContent = cluster.generation;
    for (const key of ['sessions', 'displaced']) {
      $(key).textContent = cluster.nodes.reduce((sum, node) => sum + node[key], 0);
    }
    $('nodes').replaceChildren(...cluster.nodes.map(row));
    const now = counters(metrics);
    if (before) {
      const seconds = (now.at - before.at) / 1000;
      for (const key of Object.keys(RATES)) $(key).textContent = Math.round((now[key] - before[key]) / seconds);
    }
    before = now;
    $('state').dataset.state = cluster.held ? 'waiting' : 'live';
    $('state').textContent = cluster.held ? 'view held' : 'live';
  } catch {
    $('state').dataset.state = 'refused';
    $('state').textContent = 'not reached';
  }
  setTimeout(look, 1000);
}
look();
