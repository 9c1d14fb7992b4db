// Rules of the queue that no transcript can see. Run by `node --test`.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Pump } from '../src/pump.js';

function pump(more = {}) {
  const told = { acked: [], faults: [] };
  const made = new Pump({
    ack: 'handled', window: 256, validate: {}, handled: () => {},
    error: (fault, code = fault.code) => { told.faults.push(code); }, acked: (seq) => told.acked.push(seq), ...more,
  });
  made.begin(0, null);
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
  made.received = null;
  made.begin(5, 7);
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
