// The console as somebody meets it who was told "a customer says that nothing came": five prepared cases, and the
// cluster live. In headless Chromium, against a real server.

import assert from 'node:assert/strict';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';

import { DEADLINE, launch } from './launch.mjs';
import { Server } from './server.mjs';

const WebSocket = createRequire(`${process.env.RINGPUSH_MODULES}/`)('ws');
const DESK = 'the-support-desk-looks-with-this-key-1';
const SHOP = 'the-shop-publishes-with-this-key-0001';
const BLIND = 'a-key-that-sees-the-cluster-alone-001';
const keys = [
  { name: 'desk', secret: DESK, scopes: ['read', 'users', 'cluster', 'publish'] },
  { name: 'shop', secret: SHOP, scopes: ['publish:topic/offers'] },
  { name: 'blind', secret: BLIND, scopes: ['cluster'] },
];

const server = await Server.start({ RINGPUSH_COLLECT__KEYS: JSON.stringify(keys) });
const sockets = [];

async function call(key, method, path, body) {
  return fetch(`http://${server.ports.collect}${path}`, {
    method, headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' }, body: JSON.stringify(body),
  });
}

async function publish(user, more = {}) {
  const answer = await call(DESK, 'POST', '/v1/messages', { to: { user }, payload: { for: user }, ...more });
  assert.equal(answer.status, 202);
  return (await answer.json()).accepted[0].seq;
}

/** A client on a device. `acks` says whether it acks what it gets; `window` how much it takes without. */
async function client(user, device, { acks = true, window = '' } = {}) {
  const query = `?device=${device}&client=shop-app/3.1${window ? `&window=${window}` : ''}`;
  const socket = new WebSocket(`ws://${server.ports.push}/v1/ws${query}`, { headers: { authorization: `Bearer ${await server.token(user)}` } });
  sockets.push(socket);
  const got = [];
  socket.on('message', (text) => {
    const frame = JSON.parse(text);
    got.push(frame);
    if (frame.type === 'message' && acks) socket.send(JSON.stringify({ type: 'ack', seq: frame.seq }));
  });
  for (const end = Date.now() + DEADLINE; !got.some((frame) => ['welcome'].includes(frame.type)); await pause(10)) assert.ok(Date.now() < end);
  return { socket, got };
}

/** A device that has had a message, and has gone. */
async function wasHere(user, device) {
  const { socket } = await client(user, device);
  const seq = await publish(user);
  for (const end = Date.now() + DEADLINE; ; await pause(50)) {
    const status = await (await call(DESK, 'GET', `/v1/users/${user}/messages/${seq}/status`)).json();
    if (status.devices.some((known) => known.device === device && known.acked)) break;
    assert.ok(Date.now() < end, JSON.stringify(status));
  }
  socket.close();
}

/** What the page shows for a user. */
async function find(page, user, message = '') {
  await page.fill('#user', user);
  await page.fill('#message', message);
  await page.click('#look button');
  await page.waitForFunction((user) => document.querySelector('#found').dataset.user === user && document.querySelector('#find-note').textContent !== 'looking',
    user, { timeout: DEADLINE });
  return page.evaluate(() => ({
    verdict: document.querySelector('#verdict').textContent,
    devices: [...document.querySelectorAll('#devices tr')].map((row) => row.textContent),
    messages: [...document.querySelectorAll('#messages li:not(.per li)')].map((item) => item.textContent),
  }));
}

/** Looks until it shows what is expected: acks travel, too. */
async function until(page, user, message, holds) {
  for (const end = Date.now() + DEADLINE; ;) {
    const shown = await find(page, user, message);
    if (holds(shown)) return shown;
    assert.ok(Date.now() < end, JSON.stringify(shown));
    await pause(100);
  }
}

async function enter(page, key) {
  await page.goto(`http://${server.ports.collect}/console`);
  await page.waitForSelector('html[data-ready]');
  // By keyboard: the field has the focus.
  await page.keyboard.type(key);
  await page.keyboard.press('Enter');
}

const steps = {
  async 'a key that is not known, and one without a scope, are told so'(page) {
    await enter(page, 'rubbish');
    await page.waitForFunction(() => document.querySelector('#door-note').textContent.includes('not known'));
    await page.fill('#key', BLIND);
    await page.keyboard.press('Enter');
    await page.waitForSelector('#state[data-state="live"]', { timeout: DEADLINE });
    await page.fill('#user', 'alice');
    await page.keyboard.press('Enter');
    await page.waitForFunction(() => document.querySelector('#find-note').textContent.includes('users'), undefined, { timeout: DEADLINE });
    await page.click('#forget');
    assert.equal(await page.evaluate(() => sessionStorage.length + localStorage.length), 0);
  },

  async 'the cluster is shown live'(page) {
    await enter(page, DESK);
    await client('live', 'web');
    for (const end = Date.now() + DEADLINE; ; await pause(100)) {
      await publish('live');
      const shown = await page.evaluate(() => ({
        delivered: Number(document.querySelector('#delivered').textContent), sessions: Number(document.querySelector('#sessions').textContent),
        p99: document.querySelector('#p99').textContent, arcs: document.querySelectorAll('#ring circle').length,
        curves: [...document.querySelectorAll('#curves polyline')].map((line) => line.getAttribute('points').split(' ').length),
      }));
      if (shown.delivered > 0 && shown.sessions === 1 && shown.p99 !== '–' && shown.arcs === 1 && shown.curves.length === 6 && shown.curves[0] > 2) break;
      assert.ok(Date.now() < end, JSON.stringify(shown));
    }
  },

  async 'offline: nobody was there'(page) {
    await wasHere('olga', 'phone');
    await publish('olga');
    const { verdict, messages, devices } = await until(page, 'olga', '', ({ devices }) => devices[0]?.includes('phoneno'));
    assert.match(verdict, /No device of olga is online/);
    assert.match(messages[0], /waits: no device is online.*phone: offline, gets it when it connects/);
    assert.equal(devices.length, 1);
  },

  async 'a slow client: online, and does not take more'(page) {
    await client('sam', 'phone', { acks: false, window: 1 });
    const [first, second] = [await publish('sam'), await publish('sam')];
    assert.ok(second > first);
    const { verdict, messages, devices } = await until(page, 'sam', '', ({ messages }) => messages[1]?.includes('sent, not acked yet'));
    assert.match(verdict, /sam is online; phone has never acked a message: 2 wait/);
    assert.match(messages[0], /phone: online, not sent yet: it reads slowly \(2 not acked\)/);
    assert.match(devices[0], /shop-app\/3.1/);
  },

  async 'another device has it'(page) {
    await client('dora', 'desktop');
    await wasHere('dora', 'phone');
    const seq = await publish('dora');
    // What the phone has acked is written a moment after its socket ends.
    const { messages, verdict } = await until(page, 'dora', String(seq),
      ({ messages, verdict }) => messages[0]?.includes('not on phone') && verdict.includes('phone'));
    assert.match(verdict, /dora is online; phone, which is offline, has not acked 1 message\./);
    assert.match(messages[0], /acked on desktop, not on phone.*phone: offline/);
  },

  async 'it expired'(page) {
    await publish('eve', { ttl_s: 1, id: 'offer-17' });
    const { messages } = await until(page, 'eve', 'offer-17', ({ messages }) => messages[0]?.includes('expired before a device acked it'));
    assert.match(messages[0], /id offer-17/);
  },

  async 'the key of the sender lacks the scope: nothing was ever accepted'(page) {
    const refused = await call(SHOP, 'POST', '/v1/messages', { to: { user: 'kim' }, payload: 1, id: 'order-9' });
    assert.equal(refused.status, 403);
    const { verdict, messages } = await find(page, 'kim', 'order-9');
    assert.match(verdict, /kim never had a message.*403 names the scope/);
    assert.match(messages[0], /No message order-9 is stored for kim.*403 names the scope/);
  },

  async 'a test message arrives, and the sessions are closed'(page) {
    const { got, socket } = await client('tess', 'web');
    await find(page, 'tess');
    await page.click('#send button:not([type])');
    await page.waitForFunction(() => /stored as/.test(document.querySelector('#send-note').textContent), undefined, { timeout: DEADLINE });
    for (const end = Date.now() + DEADLINE; !got.some((frame) => frame.payload?.text === 'a test from the console'); await pause(10)) assert.ok(Date.now() < end);
    const closed = new Promise((resolve) => { socket.once('close', resolve); });
    await page.click('#close');
    await page.click('#sure button[value="no"]');
    await page.click('#close');
    await page.click('#sure button[value="yes"]');
    assert.equal(await closed, 4501);
    await page.fill('#payload', '{');
    await page.click('#send button:not([type])');
    assert.match(await page.textContent('#send-note'), /no JSON/);
  },

  async 'the key stays with the tab'(page) {
    await page.reload();
    await page.waitForSelector('#state[data-state="live"]', { timeout: DEADLINE });
    assert.equal(await page.evaluate(() => localStorage.length), 0);
    const other = await page.context().newPage();
    await other.goto(`http://${server.ports.collect}/console/`);
    await other.waitForSelector('#door:not([hidden])');
    await other.close();
  },

  async 'phone and desktop, light and dark'(page) {
    const shown = await until(page, 'dora', '', ({ messages }) => messages.length > 0);
    assert.ok(shown.messages.length > 0);
    for (const [width, height] of [[390, 844], [1280, 900]]) {
      for (const colorScheme of ['light', 'dark']) {
        await page.setViewportSize({ width, height });
        await page.emulateMedia({ colorScheme });
        const wide = await page.evaluate(() => document.documentElement.scrollWidth);
        assert.ok(wide <= width, `${wide} px on a screen of ${width}`);
        await page.screenshot({ path: join(process.env.RINGPUSH_SHOTS, `console-${width}-${colorScheme}.png`), fullPage: true });
      }
    }
  },
};

const browser = await launch();
try {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 } });
  const page = await context.newPage();
  const wrong = [];
  page.on('pageerror', (error) => wrong.push(String(error)));
  for (const [name, step] of Object.entries(steps)) {
    await step(page);
    console.log(`ok ${name}`);
  }
  assert.deepEqual(wrong, []);
} finally {
  for (const socket of sockets) socket.terminate();
  await browser.close();
  await server.stop();
}
