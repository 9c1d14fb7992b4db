// The client library in the tabs of headless Chromium, against a real server: one socket for all tabs, and what browsers
// do to pages: closing, killing, freezing, hiding, the back/forward cache, a network that goes away.

import assert from 'node:assert/strict';
import { setTimeout as pause } from 'node:timers/promises';

import { DEADLINE, launch } from './launch.mjs';
import { Server } from './server.mjs';

// Playwright switches the back/forward cache off.
const browser = await launch({ ignoreDefaultArgs: ['--disable-back-forward-cache'] });
const HEARTBEAT_MS = 4_000;
const server = await Server.start({ RINGPUSH_LIMITS__PING_MS: String(HEARTBEAT_MS) });
const origin = `http://${server.ports.push}`;

/** Waits for an event, with a deadline. */
async function until(what, look, within = DEADLINE) {
  for (const end = Date.now() + within; ;) {
    const seen = await look();
    if (seen) return seen;
    assert.ok(Date.now() < end, `never: ${what}`);
    await pause(20);
  }
}

/** A profile of its own. */
const profile = () => browser.newContext();

/** Pages of the server's origin on which nothing runs. */
const BLANK = `${origin}/client/errors.js`;
const OTHER = `${origin}/client/line.js`;

/** Opens a tab whose `got` has the payloads, once each time that the handler was called. */
async function tab(context, user, options = {}) {
  const page = await context.newPage();
  await page.goto(BLANK);
  await begin(page, user, options);
  return page;
}

async function begin(page, user, options = {}) {
  const token = await server.token(user);
  await page.evaluate(async ({ token, user, options }) => {
    const { connect } = await import('/client/index.js');
    Object.assign(window, { got: [], gaps: [], faults: [], states: [], hold: null });
    window.client = connect({
      url: location.origin, user, token: () => token, tabs: 'shared', ...options,
      onError: (fault) => { window.faults.push(`${fault.code}: ${fault.message}`); },
    });
    window.client.onGap((gap) => { window.gaps.push(gap); });
    window.client.onState((state) => { window.states.push(state.name); });
    window.client.on('*', async (message) => {
      window.got.push(message.payload);
      await window.hold;
    });
  }, { token, user, options });
}

const state = (page) => page.evaluate(() => window.client.state.name);
const got = (page) => page.evaluate(() => window.got);
const told = (page) => page.evaluate(() => JSON.stringify([window.client.state, window.states, window.faults, window.got.length]));
const live = (page) => until('live', async () => (await state(page)) === 'live')
  .catch(async (error) => { throw new Error(`${error.message}: ${await told(page)}`); });
const has = (page, count) => until(`${count} messages`, async () => (await got(page)).length >= count)
  .catch(async (error) => { throw new Error(`${error.message}: ${await told(page)}`); });
const device = async (user) => (await server.call('GET', `/v1/users/${user}`)).devices;
/** All sockets of the server: those of other steps are closed by then, or about to be. */
const sockets = (count) => until(`${count} sockets`, async () =>
  (await server.call('GET', '/v1/cluster')).nodes.reduce((sum, node) => sum + node.sessions, 0) === count);
const acked = (user, seq) => until(`the ack of ${seq}`, async () => (await device(user))[0]?.acked === seq);
const range = (from, to) => Array.from({ length: to - from }, (_, n) => from + n);
const cdp = (page) => page.context().newCDPSession(page);

/** Stops everything that runs in a tab; returns what lets it go on. */
async function freeze(page) {
  const session = await cdp(page);
  await session.send('Debugger.enable');
  const paused = new Promise((go) => { session.once('Debugger.paused', go); });
  await session.send('Debugger.pause');
  await paused;
  return async () => {
    await session.send('Debugger.resume');
    await session.send('Debugger.disable');
  };
}

/** Shows or hides a tab, as its page sees it. */
const show = (page, shown) => page.evaluate((shown) => {
  Object.defineProperty(document, 'visibilityState', { configurable: true, get: () => (shown ? 'visible' : 'hidden') });
  document.dispatchEvent(new Event('visibilitychange'));
}, shown);

/** Two tabs; the first one leads. */
async function pair(context, user) {
  const first = await tab(context, user);
  await live(first);
  const second = await tab(context, user);
  await live(second);
  return [first, second];
}

const steps = {
  async 'two tabs have one socket, and each has every message once'() {
    const context = await profile();
    const [first, second] = await pair(context, 'one');
    const seqs = await server.publish('one', range(0, 40));
    await Promise.all([has(first, 40), has(second, 40)]);
    await sockets(1);
    assert.equal((await device('one')).length, 1);
    assert.deepEqual(await got(first), range(0, 40));
    assert.deepEqual(await got(second), range(0, 40));
    await acked('one', seqs[39]);
    await context.close();
  },

  async 'the leading tab is closed: the other is live within 2 s, nothing lost or shown twice'() {
    const context = await profile();
    const [first, second] = await pair(context, 'close');
    await server.publish('close', range(0, 5));
    await has(second, 5);
    await second.evaluate(() => { window.states.length = 0; });
    const began = Date.now();
    await Promise.all([first.close({ runBeforeUnload: true }), server.publish('close', range(5, 15))]);
    await until('live again', () => second.evaluate(() => window.states.at(-1) === 'live'));
    assert.ok(Date.now() - began < 2_000, `${Date.now() - began} ms`);
    const seqs = await server.publish('close', range(15, 20));
    await has(second, 20);
    assert.deepEqual(await got(second), range(0, 20));
    await acked('close', seqs[4]);
    await context.close();
  },

  async 'the leading tab is killed: the other takes over'() {
    const context = await profile();
    const [first, second] = await pair(context, 'kill');
    await server.publish('kill', range(0, 5));
    await has(second, 5);
    await second.evaluate(() => { window.states.length = 0; });
    const crash = (await cdp(first)).send('Page.crash').catch(() => {});
    await until('live again', () => second.evaluate(() => window.states.at(-1) === 'live'));
    const seqs = await server.publish('kill', range(5, 10));
    await has(second, 10);
    assert.deepEqual(await got(second), range(0, 10));
    await acked('kill', seqs[4]);
    await Promise.race([crash, pause(100)]);
    await context.close();
  },

  async 'nothing is acked that a visible tab has not handled; a hidden one is not waited for'() {
    const context = await profile();
    const [first, second] = await pair(context, 'wait');
    const [before] = await server.publish('wait', [0]);
    await acked('wait', before);
    await second.evaluate(() => { window.hold = new Promise((go) => { window.go = go; }); });
    const seqs = await server.publish('wait', range(1, 6));
    await has(first, 6);
    await has(second, 2);
    await pause(500);
    assert.equal((await device('wait'))[0].acked, before, 'a visible tab is at its first message still');
    await show(second, false);
    await acked('wait', seqs[4]);
    await show(second, true);
    const [next] = await server.publish('wait', [6]);
    await has(first, 7);
    await pause(300);
    assert.notEqual((await device('wait'))[0].acked, next);
    await second.evaluate(() => { window.hold = null; window.go(); });
    await acked('wait', next);
    assert.deepEqual(await got(second), range(0, 7));
    await context.close();
  },

  async 'a visible tab that died is not waited for'() {
    const context = await profile();
    const [first, second] = await pair(context, 'dead');
    await second.evaluate(() => { window.hold = new Promise(() => {}); });
    const seqs = await server.publish('dead', range(0, 3));
    await has(second, 1);
    (await cdp(second)).send('Page.crash').catch(() => {});
    await acked('dead', seqs[2]);
    assert.equal(await state(first), 'live');
    await context.close();
  },

  async 'a tab that was frozen, and one that is opened late, read what they missed'() {
    const context = await profile();
    const [first, second] = await pair(context, 'frozen');
    await server.publish('frozen', range(0, 3));
    await has(second, 3);
    const thaw = await freeze(second);
    await server.publish('frozen', range(3, 150));
    await has(first, 150);
    await thaw();
    await has(second, 150);
    assert.deepEqual(await got(second), range(0, 150));
    await first.evaluate(() => { window.hold = new Promise((go) => { window.go = go; }); });
    await server.publish('frozen', range(150, 160));
    await has(first, 151);
    const late = await tab(context, 'frozen');
    await has(late, 10);
    assert.deepEqual(await got(late), range(150, 160));
    await sockets(1);
    await context.close();
  },

  async 'a leading tab that freezes gives way at once'() {
    const context = await profile();
    const [first, second] = await pair(context, 'yield');
    await second.evaluate(() => { window.states.length = 0; });
    const began = Date.now();
    // Chromium fires these two for hidden tabs only, and a tab without a window is never hidden.
    await first.evaluate(() => { document.dispatchEvent(new Event('freeze')); });
    const thaw = await freeze(first);
    await until('live again', () => second.evaluate(() => window.states.at(-1) === 'live'));
    assert.ok(Date.now() - began < 2_000, `${Date.now() - began} ms`);
    const seqs = await server.publish('yield', range(0, 5));
    await has(second, 5);
    await acked('yield', seqs[4]);
    await thaw();
    await first.evaluate(() => { document.dispatchEvent(new Event('resume')); });
    await has(first, 5);
    assert.deepEqual(await got(first), range(0, 5));
    await sockets(1);
    await context.close();
  },

  async 'a leading tab that is frozen without a word loses its place after a heartbeat and 5 s, and acks nothing'() {
    const context = await profile();
    const [first, second] = await pair(context, 'stolen');
    await first.evaluate(() => { window.hold = new Promise((go) => { window.go = go; }); });
    const [held] = await server.publish('stolen', [0]);
    await Promise.all([has(first, 1), has(second, 1)]);
    const thaw = await freeze(first);
    await second.evaluate(() => { window.states.length = 0; });
    const began = Date.now();
    await until('live again', () => second.evaluate(() => window.states.at(-1) === 'live'));
    assert.ok(Date.now() - began < HEARTBEAT_MS + 9_000, `${Date.now() - began} ms`);
    const seqs = await server.publish('stolen', range(1, 4));
    await has(second, 4);
    await thaw();
    await first.evaluate(() => { window.hold = null; window.go(); });
    await has(first, 4);
    assert.deepEqual(await got(first), range(0, 4));
    assert.deepEqual(await got(second), range(0, 4));
    await acked('stolen', seqs[2]);
    assert.ok(held < seqs[2]);
    await sockets(1);
    await context.close();
  },

  async 'a tab from the back/forward cache goes on where it was'() {
    const context = await profile();
    const page = await tab(context, 'back');
    await live(page);
    await server.publish('back', range(0, 3));
    await has(page, 3);
    await page.goto(OTHER);
    await server.publish('back', range(3, 6));
    await page.goBack({ waitUntil: 'commit' });
    assert.ok(await page.evaluate(() => Boolean(window.client)), 'the page comes from the cache');
    await has(page, 6);
    assert.deepEqual(await got(page), range(0, 6));
    await context.close();
  },

  async 'a network that goes away and comes back loses and repeats nothing'() {
    for (const tabs of ['separate', 'shared']) {
      const context = await profile();
      const user = `offline-${tabs}`;
      const page = await tab(context, user, { tabs });
      await live(page);
      await server.publish(user, range(0, 3));
      await has(page, 3);
      await context.setOffline(true);
      await page.evaluate(() => window.client.refresh());
      await server.down('SIGKILL');
      await until('offline', async () => ['offline', 'waiting'].includes(await state(page)));
      await server.up();
      await server.publish(user, range(3, 6));
      await context.setOffline(false);
      await live(page);
      await has(page, 6);
      assert.deepEqual(await got(page), range(0, 6));
      await context.close();
    }
  },

  async 'separate tabs of one device skip nothing of each other'() {
    const context = await profile();
    const [first, second] = [await tab(context, 'apart', { tabs: 'separate' }), await tab(context, 'apart', { tabs: 'separate' })];
    await Promise.all([live(first), live(second)]);
    await second.evaluate(() => { window.hold = new Promise((go) => { window.go = go; }); });
    const seqs = await server.publish('apart', range(0, 5));
    await has(first, 5);
    await acked('apart', seqs[4]);
    await server.down('SIGKILL');
    await server.up();
    await second.evaluate(() => { window.hold = null; window.go(); });
    await has(second, 5);
    assert.deepEqual(await got(second), range(0, 5));
    await context.close();
  },

  async 'two users in one profile see nothing of each other, at once and one after the other'() {
    const context = await profile();
    const [ann, ben] = [await tab(context, 'ann'), await tab(context, 'ben')];
    await Promise.all([live(ann), live(ben)]);
    await Promise.all([server.publish('ann', ['a1', 'a2']), server.publish('ben', ['b1'])]);
    await Promise.all([has(ann, 2), has(ben, 1)]);
    assert.deepEqual([await got(ann), await got(ben)], [['a1', 'a2'], ['b1']]);
    const other = await tab(context, 'ann');
    await live(other);
    await ann.evaluate(() => window.client.forget());
    await until('the other tab has stopped', async () => (await state(other)) === 'stopped');
    assert.equal(await state(ben), 'live');
    const kept = await ann.evaluate(() => Object.entries(localStorage));
    assert.deepEqual(kept.filter(([key, value]) => `${key}${value}`.includes('ann')), []);
    await begin(ann, 'cid');
    await live(ann);
    await server.publish('cid', ['c1']);
    await server.publish('ann', ['a3']);
    await has(ann, 1);
    await pause(300);
    assert.deepEqual(await got(ann), ['c1']);
    assert.equal((await device('cid'))[0].device === (await device('ann'))[0].device, false);
    await context.close();
  },

  async 'a tab of another version, and rubbish on the channel, are ignored'() {
    const context = await profile();
    const [first, second] = await pair(context, 'mixed');
    await second.evaluate(() => {
      const name = Object.keys(localStorage).find((key) => key.endsWith(':term')).slice(0, -':term'.length);
      const channel = new BroadcastChannel(name);
      for (const said of [null, 7, 'text', [], {}, { lead: null }, { tab: 7 }, { lead: { term: 'x' } }, { term: -1, message: {} },
        { newer: { thing: true } }, { tab: 'other', visible: false, handled: 'x' }]) channel.postMessage(said);
      channel.close();
    });
    const seqs = await server.publish('mixed', range(0, 5));
    await Promise.all([has(first, 5), has(second, 5)]);
    await acked('mixed', seqs[4]);
    assert.deepEqual(await second.evaluate(() => window.faults), []);
    await context.close();
  },

  async 'a tab that cannot read what it missed hinders neither acks nor forget'() {
    const context = await profile();
    const [first, second] = await pair(context, 'stuck');
    await second.route('**/v1/inbox/messages*', (route) => route.abort());
    const thaw = await freeze(second);
    await server.publish('stuck', range(0, 3));
    await has(first, 3);
    await thaw();
    await until('it tries', () => second.evaluate(() => window.faults.some((fault) => fault.startsWith('history'))));
    assert.equal((await device('stuck'))[0].acked, 0, 'a visible tab has not handled them');
    await show(second, false);
    await until('acks', async () => (await device('stuck'))[0].acked > 0);
    await first.evaluate(() => window.client.forget());
    await until('the other tab has stopped', async () => (await state(second)) === 'stopped');
    await context.close();
  },

  async 'a page without HTTPS has its own socket, and says so'() {
    const context = await profile();
    const page = await context.newPage();
    // What such a page lacks.
    await page.addInitScript(() => {
      Object.defineProperty(navigator, 'locks', { value: undefined });
      Object.defineProperty(crypto, 'randomUUID', { value: undefined });
    });
    await page.goto(BLANK);
    await begin(page, 'plain');
    await live(page);
    await server.publish('plain', range(0, 2));
    await has(page, 2);
    assert.deepEqual(await page.evaluate(() => window.faults), ['tabs_not_shared: no Web Locks']);
    await context.close();
  },

  async 'a store that throws is told, and the stream goes on'() {
    const context = await profile();
    const page = await context.newPage();
    await page.goto(BLANK);
    await page.evaluate(() => {
      Storage.prototype.setItem = () => { throw new DOMException('no room', 'QuotaExceededError'); };
    });
    await begin(page, 'private', { tabs: 'separate' });
    await live(page);
    await server.publish('private', range(0, 3));
    await has(page, 3);
    assert.match((await page.evaluate(() => window.faults))[0], /store/);
    await context.close();
  },

  async 'a backlog of 10,000 and a handler of 1 ms take less than 30 MB of heap'() {
    const payload = { text: 'x'.repeat(100) };
    for (let n = 0; n < 10; n += 1) {
      const messages = range(0, 1_000).map(() => ({ to: { user: 'heap' }, payload }));
      await server.call('POST', '/v1/messages/batch', { messages });
    }
    const context = await profile();
    const page = await context.newPage();
    await page.goto(BLANK);
    const session = await cdp(page);
    const heap = async () => {
      await session.send('HeapProfiler.collectGarbage');
      return (await session.send('Runtime.getHeapUsage')).usedSize;
    };
    const idle = await heap();
    const token = await server.token('heap');
    await page.evaluate(async (token) => {
      const { connect } = await import('/client/index.js');
      window.count = 0;
      window.client = connect({ url: location.origin, user: 'heap', token: () => token });
      window.client.on('*', () => {
        for (const end = performance.now() + 1; performance.now() < end;);
        window.count += 1;
      });
    }, token);
    let most = 0;
    for (let count = 0; count < 10_000;) {
      most = Math.max(most, await heap());
      count = await page.evaluate(() => window.count);
    }
    const more = (most - idle) / 1e6;
    console.log(`   ${more.toFixed(1)} MB more heap than with none`);
    assert.ok(more < 30, `${more} MB`);
    await context.close();
  },

  // The last one: what goes to everyone is read by new devices, too.
  async 'tabs that share a socket share the logs of topics, too: also a late one, and when the leading one goes'() {
    const context = await profile();
    await server.call('PUT', '/v1/topics/shared', { delivery: 'log' });
    await server.call('POST', '/v1/topics/shared/members', { add: ['logs'] });
    const send = (to, payload) => server.call('POST', '/v1/messages', { to, payload });
    const [first, second] = await pair(context, 'logs');
    for (const n of range(0, 5)) {
      await send({ topic: 'shared' }, `topic ${n}`);
      await send({ everyone: true }, `all ${n}`);
      await server.publish('logs', [`own ${n}`]);
    }
    const each = (from, to) => range(from, to).flatMap((n) => [`topic ${n}`, `all ${n}`, `own ${n}`]).sort();
    await Promise.all([has(first, 15), has(second, 15)]);
    // A tab that misses some of it reads what it missed, log by log.
    const thaw = await freeze(second);
    const late = await tab(context, 'logs');
    await live(late);
    for (const n of range(5, 8)) {
      await send({ topic: 'shared' }, `topic ${n}`);
      await send({ everyone: true }, `all ${n}`);
      await server.publish('logs', [`own ${n}`]);
    }
    const hasAll = (page, wanted) => until('all of them', async () => {
      const seen = await got(page);
      assert.equal(new Set(seen).size, seen.length, 'each once');
      return wanted.every((payload) => seen.includes(payload));
    });
    // It begins where all tabs are, which may be a message or two before what is published now.
    await Promise.all([has(first, 24), hasAll(late, each(5, 8))]);
    await thaw();
    await has(second, 24);
    await sockets(1);
    await first.close({ runBeforeUnload: true });
    await until('another leads', async () => (await state(second)) === 'live' && (await state(late)) === 'live');
    await send({ topic: 'shared' }, 'topic 8');
    await send({ everyone: true }, 'all 8');
    const last = await server.publish('logs', ['own 8']);
    await Promise.all([has(second, 27), hasAll(late, each(5, 9))]);
    assert.deepEqual((await got(second)).sort(), each(0, 9));
    for (const page of [second, late]) assert.deepEqual(await page.evaluate(() => [window.gaps, window.faults]), [[], []]);
    // The next page of this device has nothing of it again.
    await acked('logs', last[0]);
    await Promise.all([second, late].map((page) => page.close({ runBeforeUnload: true })));
    const again = await tab(context, 'logs');
    await live(again);
    await send({ topic: 'shared' }, 'topic 9');
    await has(again, 1);
    assert.deepEqual(await got(again), ['topic 9']);
    await context.close();
  },
};

try {
  const words = process.argv.slice(2);
  for (const [name, step] of Object.entries(steps)) {
    if (words.length > 0 && !words.some((word) => name.includes(word))) continue;
    await step();
    console.log(`ok ${name}`);
  }
} finally {
  await browser.close();
  await server.stop();
}
