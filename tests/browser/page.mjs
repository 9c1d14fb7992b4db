// The page and the dashboard as a person meets them, in headless Chromium, against a real server.

import assert from 'node:assert/strict';
import { join } from 'node:path';

import { DEADLINE, launch } from './launch.mjs';
import { Server } from './server.mjs';

let server;

const live = (page) => page.waitForSelector('#state[data-state="live"]', { timeout: DEADLINE });
const seen = (page, text) => page.waitForFunction(
  (text) => [...document.querySelectorAll('#log li[data-type="message"]')].some((line) => line.textContent.includes(text)),
  text, { timeout: DEADLINE });
const payloads = (page) => page.$$eval('#log li[data-type="message"]', (lines) =>
  lines.map((line) => JSON.parse(line.textContent.slice('message '.length)).payload.n).reverse());

async function publish(page, user, payload) {
  await page.fill('#to', user);
  await page.fill('#payload', JSON.stringify(payload));
  await page.click('#publish button');
  await page.waitForFunction(() => /^stored as \d+/.test(document.querySelector('#published').textContent));
}

async function connect(page, user, address) {
  await page.goto(`http://${address}/?code=${server.code}`);
  await page.waitForSelector('html[data-ready]', { timeout: DEADLINE });
  await page.fill('#user', user);
  await page.click('#toggle');
  await live(page);
}

const steps = {
  async 'a message published on the page appears in the tab of the other user'(browser, ports) {
    const [alice, bob] = [await browser.newPage(), await browser.newPage()];
    await connect(alice, 'alice', ports.push);
    await connect(bob, 'bob', ports.push);
    await publish(alice, 'bob', { n: 0, text: 'hello bob' });
    await seen(bob, 'hello bob');
    assert.deepEqual(await payloads(alice), []);
    const again = await browser.newPage();
    await connect(again, 'bob', ports.push);
    await seen(again, 'hello bob');
    await Promise.all([alice, bob, again].map((page) => page.close()));
  },

  async 'a restart of the server loses and repeats nothing'(browser, ports) {
    const [carol, other] = [await browser.newPage(), await browser.newPage()];
    await connect(carol, 'carol', ports.push);
    await connect(other, 'other', ports.push);
    for (let n = 0; n < 5; n += 1) await publish(other, 'carol', { n });
    await seen(carol, '"n":4');
    await server.down('SIGKILL');
    await carol.waitForSelector('#state[data-state="waiting"]', { timeout: DEADLINE });
    await server.up();
    for (let n = 5; n < 10; n += 1) await publish(other, 'carol', { n });
    await live(carol);
    await seen(carol, '"n":9');
    assert.deepEqual(await payloads(carol), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert.equal(await carol.textContent('#connections'), '2');
    assert.equal(await carol.textContent('#count'), '10');
    await Promise.all([carol.close(), other.close()]);
  },

  async 'wrong input is told, not swallowed'(browser, ports) {
    const page = await browser.newPage();
    await connect(page, 'dave', ports.push);
    await page.fill('#payload', '{nope');
    await page.click('#publish button');
    await page.waitForFunction(() => document.querySelector('#published').textContent.includes('not JSON'));
    await page.click('#toggle');
    await page.fill('#user', '');
    await page.click('#toggle');
    await page.waitForSelector('#state[data-state="refused"]', { timeout: DEADLINE });
    await page.close();
  },

  async 'it fits a phone, light and dark'(browser, ports) {
    for (const colorScheme of ['light', 'dark']) {
      const context = await browser.newContext({ viewport: { width: 360, height: 740 }, colorScheme });
      const page = await context.newPage();
      await connect(page, 'alice', ports.push);
      await publish(page, 'alice', { n: 1, text: 'a longer text that must wrap on a narrow screen, whatever its length' });
      await seen(page, 'a longer text');
      const wide = await page.evaluate(() => document.documentElement.scrollWidth);
      assert.ok(wide <= 360, `${wide} px on a screen of 360`);
      const [ink, ground] = await page.evaluate(() => {
        const style = getComputedStyle(document.body);
        return [style.color, style.backgroundColor].map((rgb) => rgb.match(/\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0));
      });
      assert.ok(Math.abs(ink - ground) > 300, `${colorScheme}: text on its ground cannot be read`);
      assert.equal(ink > ground, colorScheme === 'dark');
      await page.screenshot({ path: join(process.env.RINGPUSH_SHOTS, `page-${colorScheme}.png`) });
      await context.close();
    }
  },

  async 'the dashboard shows members and sessions, live'(browser, ports) {
    const [page, watcher] = [await browser.newPage(), await browser.newPage()];
    await watcher.goto(`http://${ports.ops}/`);
    await watcher.waitForSelector('#state[data-state="live"]', { timeout: DEADLINE });
    const sessions = (count) => watcher.waitForFunction(
      (count) => document.querySelector('#sessions').textContent === count, count, { timeout: DEADLINE });
    await sessions('0');
    await connect(page, 'erin', ports.push);
    await sessions('1');
    await page.close();
    await sessions('0');
    await watcher.screenshot({ path: join(process.env.RINGPUSH_SHOTS, 'dashboard.png') });
    await watcher.close();
  },

  // The last one: what goes to everyone is read by new devices, too.
  async 'a message of a topic, and one to everyone, name how they came'(browser, ports) {
    const page = await browser.newPage();
    await server.call('PUT', '/v1/topics/news', { delivery: 'log' });
    await server.call('POST', '/v1/topics/news/members', { add: ['erin'] });
    await connect(page, 'erin', ports.push);
    await server.call('POST', '/v1/messages', { to: { topic: 'news' }, payload: 'of a topic' });
    await seen(page, '"topic":"news","payload":"of a topic"');
    await server.call('POST', '/v1/messages', { to: { everyone: true }, payload: 'to all' });
    await seen(page, '"topic":"everyone","payload":"to all"');
    await page.close();
  },
};

let browser;
try {
  browser = await launch();
  server = await Server.start();
  for (const [name, step] of Object.entries(steps)) {
    await step(browser, server.ports);
    console.log(`ok ${name}`);
  }
} finally {
  await browser?.close();
  await server?.stop();
}
