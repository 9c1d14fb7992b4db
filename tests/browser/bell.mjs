// The example of a notification bell, in headless Chromium, as its README has it run.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { cp, mkdir, mkdtemp, rm, symlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';

import { DEADLINE, launch } from './launch.mjs';
import { Server } from './server.mjs';

const root = resolve(import.meta.dirname, '../..');
const folder = await mkdtemp(join(tmpdir(), 'ringpush-bell-'));
let browser;
let server;
let bell;
try {
  // As `npm install` leaves it.
  await cp(join(root, 'examples/bell'), join(folder, 'bell'), { recursive: true });
  await mkdir(join(folder, 'node_modules/@ringpush'), { recursive: true });
  await symlink(join(root, 'clients/javascript'), join(folder, 'node_modules/@ringpush/client'));
  server = await Server.start();
  const env = { ...process.env, PORT: '0', RINGPUSH_URL: `http://${server.ports.push}`, RINGPUSH_AUTH: `http://${server.ports.auth}`,
    RINGPUSH_ADMIN_KEY: server.adminKey };
  bell = spawn('node', ['server.mjs'], { cwd: join(folder, 'bell'), env, stdio: ['ignore', 'pipe', 'inherit'] });
  const url = await new Promise((go) => { bell.stdout.once('data', (text) => go(String(text).trim())); });
  browser = await launch();
  const context = await browser.newContext({ viewport: { width: 390, height: 780 }, colorScheme: 'dark' });
  const wrong = [];
  const open = async () => {
    const page = await context.newPage();
    page.on('pageerror', (error) => wrong.push(error.message));
    page.setDefaultTimeout(DEADLINE);
    await page.goto(url);
    return page;
  };
  const is = (page, state) => page.waitForFunction((state) => document.getElementById('state').textContent === state, state);
  const badge = (page, text) => page.waitForFunction((text) => document.getElementById('badge').textContent === text, text);
  const titles = (page) => page.$$eval('li', (items) => items.map((item) => item.childNodes[0].textContent));

  const first = await open();
  const [before] = await server.publish('alice', [{ title: 'before' }]);
  await first.fill('#name', 'alice');
  await first.click('#login button');
  await is(first, 'live');
  await badge(first, '1');
  // A new tab begins after what is acked.
  for (const end = Date.now() + DEADLINE; (await server.call('GET', '/v1/users/alice')).devices[0]?.acked !== before;) assert.ok(Date.now() < end);
  const second = await open();
  await is(second, 'live');
  await server.publish('alice', [{ title: 'one' }, { title: '<b>two</b>' }]);
  await badge(first, '3');
  await badge(second, '2');
  // A node tells its number of sockets with its heartbeat.
  let sockets = 0;
  for (const end = Date.now() + DEADLINE; sockets === 0; sockets = (await server.call('GET', '/v1/cluster')).nodes[0].sessions) assert.ok(Date.now() < end);
  assert.equal(sockets, 1, 'both tabs share one socket');
  await first.click('#bell');
  await badge(first, '');
  assert.deepEqual(await titles(first), ['<b>two</b>', 'one', 'before']);
  assert.ok(await first.evaluate(() => document.documentElement.scrollWidth <= 390));
  // A tab behind another one is not drawn.
  await first.bringToFront();
  await first.screenshot({ path: join(process.env.RINGPUSH_SHOTS, 'bell.png') });
  console.log('ok two tabs share a socket, the badge counts, the list shows');

  const later = await server.publish('alice', Array.from({ length: 30 }, (_, n) => ({ title: `later ${n}` })));
  for (const end = Date.now() + DEADLINE; (await server.call('GET', '/v1/users/alice')).devices[0]?.acked !== later[29];) assert.ok(Date.now() < end);
  const third = await open();
  await is(third, 'live');
  await third.click('#bell');
  await third.waitForFunction(() => document.querySelectorAll('li').length >= 20);
  await third.click('#earlier');
  await third.waitForFunction(() => document.querySelectorAll('li').length === 33);
  assert.equal((await titles(third)).at(-1), 'before');
  console.log('ok the history is read page by page');

  await third.click('#logout');
  await Promise.all([first, second, third].map((page) => page.waitForSelector('#login:not([hidden])')));
  assert.deepEqual(await first.evaluate(() => Object.keys(localStorage)), []);
  console.log('ok logging out in one tab logs out in all');
  assert.deepEqual(wrong, []);
} finally {
  await browser?.close();
  bell?.kill();
  await server?.stop();
  await rm(folder, { recursive: true, force: true });
}
