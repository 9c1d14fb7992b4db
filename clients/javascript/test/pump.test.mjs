// Rules of the queue that no transcript can see. Run by `node --test`.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Pump } from '../src/pump.js';
import { Positions } from '../src/positions.js';

function pump(more = {}) {
  const told = { acked: [], faults: [] };
  const made = new Pump({
    ack: 'handled', window: 256, validate: {},
    error: (fault, code = fault.code) => { told.faults.push(code); },
    acked: () => { const { acked } = made.logs.get(''); if (acked !== null) told.acked.push(acked); }, ...more,
  });
  made.open('', 0);
  return { made, told };
}
const frame = (seq, more = {}) => ({ seq, id: `m-${seq}`, payload: seq, accepted_at: 0, expires_at: 0, ...more });
const soon = () => new Promise((resolve) => { setTimeout(resolve, 80); });

test('nothing is handled by nobody', async () => {
  const { made, told } = pump();
  made.put(frame(1), true);
  await soon();
  assert.deepEqual(told.acked, []);
  const seen = [];
  made.on('*', ({ seq }) => seen.push(seq));
  await soon();
  assert.deepEqual([seen, told.acked], [[1], [1]]);
});

test('leaving a loop handles nothing, and the next loop has the message again; a handler has it once', async () => {
  const { made, told } = pump();
  const seen = [];
  made.on('*', ({ seq }) => { seen.push(seq); });
  const first = made.messages()[Symbol.asyncIterator]();
  const asked = first.next();
  made.put(frame(1), true);
  assert.equal((await asked).value.seq, 1);
  await first.return();
  await soon();
  assert.deepEqual([seen, told.acked], [[1], [1]], 'with no loop left, those who are there decide');
  const loop = (async () => { for await (const { seq } of made.messages()) if (seq === 3) return seq; return 0; })();
  made.put(frame(2), true);
  made.put(frame(3), true);
  assert.equal(await loop, 3);
  await soon();
  assert.deepEqual(seen, [1, 2, 3]);
});

test('a message that a loop left comes again in the next one', async () => {
  const { made, told } = pump();
  made.put(frame(1), true);
  for await (const { seq } of made.messages()) { assert.equal(seq, 1); break; }
  await soon();
  assert.deepEqual(told.acked, []);
  for await (const { seq } of made.messages()) { assert.equal(seq, 1); break; }
});

test('only the handler that failed is called again, and skip goes on', async () => {
  const { made, told } = pump({ error: (fault, code) => { told.faults.push(code); return told.faults.length > 1 ? 'skip' : undefined; } });
  let [good, bad] = [0, 0];
  made.on('*', () => { good += 1; });
  made.on('*', () => { bad += 1; throw new Error('no'); });
  made.put(frame(1), true);
  await new Promise((resolve) => { setTimeout(resolve, 500); });
  assert.deepEqual([good, bad, told.faults, told.acked], [1, 2, ['handler', 'handler'], [1]]);
});

test('a gap is waited for, and a reset lets lower numbers pass', async () => {
  const { made } = pump();
  const seen = [];
  made.onGap(async (gap) => { await soon(); seen.push(`gap ${gap.reason}`); });
  made.on('*', ({ seq }) => { seen.push(seq); });
  made.put(frame(900), true);
  made.gap({ after: 900, before: 44, reason: 'reset' });
  assert.equal(made.put(frame(44), true), true);
  assert.equal(made.put(frame(44), true), false);
  await soon();
  await soon();
  assert.deepEqual(seen, [900, 'gap reset', 44]);
});

test('what an earlier page has handled is dropped and acked', async () => {
  const { made, told } = pump();
  made.logs.clear();
  made.open('', 5, { seq: 7, at: 1e15 });
  const seen = [];
  made.on('*', ({ seq }) => { seen.push(seq); });
  for (const seq of [6, 7, 8]) made.put(frame(seq), false);
  await soon();
  assert.deepEqual([seen, told.acked], [[8], [8]]);
});

test('a payload that fails its check is told and passed over', async () => {
  const { made, told } = pump({ validate: { bad: () => { throw new Error('no number'); } } });
  const seen = [];
  made.on('*', ({ seq }) => { seen.push(seq); });
  made.put(frame(1, { event: 'bad' }), true);
  made.put(frame(2), true);
  await soon();
  assert.deepEqual([seen, told.faults, told.acked.at(-1)], [[2], ['invalid_payload'], 2]);
});

test('what is at hand when a reset comes is not acked in the new numbers, and these are', async () => {
  const { made, told } = pump();
  let release;
  made.on('*', ({ seq }) => (seq === 990 ? new Promise((resolve) => { release = resolve; }) : undefined));
  made.put(frame(990), true);
  await soon();
  made.gap({ after: 990, before: 501, reason: 'reset' });
  made.put(frame(501), true);
  release();
  await soon();
  await soon();
  assert.deepEqual(told.acked.filter((seq) => seq > 501), []);
  assert.equal(told.acked.at(-1), 501);
});

test('a handler that fails and is taken off holds up nothing', async () => {
  const { made, told } = pump();
  const off = made.on('*', () => { throw new Error('no'); });
  const seen = [];
  made.on('*', ({ seq }) => { seen.push(seq); });
  made.put(frame(1), true);
  await soon();
  off();
  made.put(frame(2), true);
  await new Promise((resolve) => { setTimeout(resolve, 700); });
  assert.deepEqual([seen, told.acked.at(-1)], [[1, 2], 2]);
});

test('what was accepted after an earlier page had handled its number is another message', async () => {
  const { made } = pump();
  made.logs.clear();
  made.open('', 5, { seq: 7, at: 1_000 });
  const seen = [];
  made.on('*', ({ seq }) => { seen.push(seq); });
  made.put(frame(6, { accepted_at: '1970-01-01T00:00:00.900Z' }), false);
  made.put(frame(7, { accepted_at: '1970-01-01T00:00:05.000Z' }), false);
  await soon();
  assert.deepEqual(seen, [7]);
});

test('a reset that is not handled yet outlives its line, and the next line starts in its numbers', async () => {
  const { made, told } = pump();
  made.put(frame(990), true);
  made.gap({ after: 990, before: 501, reason: 'reset' });
  made.put(frame(501), true);
  made.rewind();
  assert.equal(made.logs.get('').position, 500);
  assert.equal(made.put(frame(501), false), true);
  const seen = [];
  made.onGap(({ before }) => { seen.push(`gap ${before}`); });
  made.on('*', ({ seq }) => { seen.push(seq); });
  await soon();
  assert.deepEqual([seen, told.acked.at(-1)], [['gap 501', 501], 501]);
});

test('what was acked as received, and comes again, is acked again', async () => {
  const { made, told } = pump({ ack: 'received' });
  made.on('*', () => new Promise(() => {}));
  for (let seq = 1; seq <= 5; seq += 1) made.put(frame(seq), true);
  await soon();
  made.rewind();
  for (let seq = 2; seq <= 4; seq += 1) made.put(frame(seq), false);
  await soon();
  assert.deepEqual(told.acked, [5, 4]);
});

test('a payload is checked once, however often it is given', async () => {
  const { made, told } = pump({ validate: { at: (text) => { if (typeof text !== 'string') throw new Error('no text'); return new Date(text); } } });
  made.put(frame(1, { event: 'at', payload: '2026-01-01' }), true);
  for await (const message of made.messages()) { assert.ok(message.payload instanceof Date); break; }
  for await (const message of made.messages()) { assert.ok(message.payload instanceof Date); break; }
  assert.deepEqual([told.faults, told.acked], [[], []]);
});

test('what was at hand when a loop was left waits for somebody who wants it', async () => {
  const { made, told } = pump();
  made.on('chat', () => {});
  const loop = made.messages({ events: ['order.paid'] });
  const next = loop.next();
  made.put(frame(7, { event: 'order.paid' }), true);
  assert.equal((await next).value.seq, 7);
  await loop.return();
  made.put(frame(8, { event: 'chat' }), true);
  await soon();
  assert.deepEqual(told.acked, []);
  made.on('order.paid', () => {});
  await soon();
  assert.deepEqual(told.acked, [8]);
});

test('two handlers that come in one turn both have what is queued', async () => {
  const { made, told } = pump();
  for (const seq of [1, 2, 3, 4]) made.put(frame(seq, { event: seq % 2 ? 'a' : 'b' }), false);
  const seen = [];
  const off = made.on('a', ({ seq }) => { seen.push(seq); if (seq === 3) off(); });
  made.on('b', ({ seq }) => { seen.push(seq); });
  await soon();
  assert.deepEqual([seen, told.acked.at(-1), told.faults], [[1, 2, 3, 4], 4, []]);
});

test('who was taken off by the handler before is not called, and nothing hangs', async () => {
  const { made } = pump();
  const seen = [];
  const abort = new AbortController();
  made.on('*', ({ seq }) => { seen.push(seq); abort.abort(); off(); });
  const next = made.messages({ signal: abort.signal }).next();
  const off = made.on('*', () => { seen.push('off'); });
  made.put(frame(1), true);
  made.put(frame(2), true);
  await soon();
  assert.deepEqual([seen, (await next).done], [[1, 2], true]);
});

test('a message whose loop was left waits also when it comes again by another line', async () => {
  const { made, told } = pump();
  made.on('chat', () => {});
  const loop = made.messages({ events: ['order.paid'] });
  const next = loop.next();
  made.put(frame(7, { event: 'order.paid' }), true);
  await next;
  await loop.return();
  made.rewind();
  made.put(frame(7, { event: 'order.paid' }), false);
  await soon();
  assert.deepEqual(told.acked, []);
});

test('once the user is forgotten no position is written, whatever the store still shows of another tab', async () => {
  const written = [];
  const positions = new Positions({ get: () => '7:1', set: (key, value) => { written.push(value); } }, 'key');
  await positions.load();
  positions.note(8, 2);
  await positions.flush();
  positions.note(9, 3);
  positions.gone = true;
  await positions.flush();
  assert.deepEqual(written, ['7:1', '8:2']);
});

test('each log has its own numbers, and what is not for this user is passed over', async () => {
  const { made } = pump();
  made.open('news', 900);
  made.open('everyone', 7);
  const [seen, gaps] = [[], []];
  made.onGap((gap) => { gaps.push(gap); });
  made.on('*', ({ seq, topic, inLog }) => { seen.push([topic, seq, inLog]); });
  made.put(frame(1), true);
  assert.equal(made.put(frame(901, { topic: 'news' }), true), true);
  assert.equal(made.put(frame(901, { topic: 'news' }), true), false);
  made.put(frame(8, { everyone: true }), true);
  made.gap({ after: 901, before: 903, reason: 'excepted', topic: 'news' });
  made.gap({ after: 8, before: 10, reason: 'expired', everyone: true });
  made.put(frame(2, { via: 'friends' }), true);
  await soon();
  assert.deepEqual(seen, [[undefined, 1, false], ['news', 901, true], ['everyone', 8, true], ['friends', 2, false]]);
  assert.deepEqual(gaps, [{ after: 8, before: 10, reason: 'expired', topic: 'everyone' }]);
  assert.deepEqual(['', 'news', 'everyone'].map((name) => made.logs.get(name).acked), [2, 902, 9]);
  assert.deepEqual(made.all('position'), { '': 2, news: 902, everyone: 9 });
});

test('a reset of one log leaves the others alone', async () => {
  const { made } = pump();
  made.open('news', 900);
  const seen = [];
  made.onGap(({ reason, topic }) => { seen.push([reason, topic]); });
  made.on('*', ({ seq }) => { seen.push(seq); });
  made.put(frame(1), true);
  made.put(frame(950, { topic: 'news' }), true);
  made.gap({ after: 950, before: 41, reason: 'reset', topic: 'news' });
  made.put(frame(41, { topic: 'news' }), true);
  assert.equal(made.put(frame(1), true), false);
  await soon();
  assert.deepEqual(seen, [1, 950, ['reset', 'news'], 41]);
  assert.deepEqual([made.logs.get('').acked, made.logs.get('news').acked], [1, 41]);
});

test('what is queued of a log that is dropped holds up nobody', async () => {
  const { made } = pump();
  made.open('match', 0);
  const loop = made.messages({ topic: 'match' });
  const next = loop.next();
  const seen = [];
  made.put(frame(1, { topic: 'match' }), true);
  made.put(frame(2, { topic: 'match' }), true);
  made.put(frame(5), true);
  assert.equal((await next).value.seq, 1);
  // As `watch` does: the loop has not said yet that it has left.
  loop.return();
  made.drop('match');
  made.on('news', ({ seq }) => { seen.push(seq); });
  await soon();
  assert.equal(made.logs.get('').acked, 5);
  made.put(frame(6, { event: 'news' }), true);
  await soon();
  assert.deepEqual([seen, made.logs.get('').acked], [[6], 6]);
});
