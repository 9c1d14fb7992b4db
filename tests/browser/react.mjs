// The hooks of the client library in a real React, in StrictMode, against a real server.

import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdtemp, readFile, rm, symlink, writeFile, mkdir } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';

import { DEADLINE, launch } from './launch.mjs';
import { Server } from './server.mjs';

const APP = `
import { StrictMode, createElement, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { RingpushProvider, useEvent, usePushState } from '@ringpush/client/react';

function Bell() {
  const [seen, setSeen] = useState([]);
  useEvent('order.paid', (message) => setSeen((seen) => [...seen, message.payload]));
  return createElement('p', { id: 'bell', 'data-state': usePushState().name }, seen.join(' '));
}
function Other() {
  useEvent('*', (message) => { window.others.push(message.payload); });
  return createElement('i', null, usePushState().name);
}
function App() {
  const [user, setUser] = useState(window.users[0]);
  const [shown, setShown] = useState(true);
  Object.assign(window, { setUser, setShown });
  const options = { url: location.origin, user, device: 'react', token: () => window.tokens[user] };
  return createElement(RingpushProvider, { options }, shown && createElement(Bell, { key: user }), shown && createElement(Other));
}
window.others = [];
createRoot(document.body.appendChild(document.createElement('div'))).render(createElement(StrictMode, null, createElement(App)));
`;

const modules = process.env.RINGPUSH_MODULES;
const folder = await mkdtemp(join(tmpdir(), 'ringpush-react-'));
let browser;
let server;
try {
  // As 'npm install react react-dom @ringpush/client' leaves it.
  await mkdir(join(folder, 'node_modules/@ringpush'), { recursive: true });
  for (const name of ['react', 'react-dom', 'scheduler']) await symlink(join(modules, name), join(folder, 'node_modules', name));
  await symlink(resolve(import.meta.dirname, '../../clients/javascript'), join(folder, 'node_modules/@ringpush/client'));
  await writeFile(join(folder, 'app.js'), APP);
  const bundle = spawnSync(join(modules, '.bin/esbuild'), ['app.js', '--bundle', '--preserve-symlinks', '--define:process.env.NODE_ENV="development"',
    '--outfile=bundle.js'], { cwd: folder, encoding: 'utf8' });
  assert.equal(bundle.status, 0, bundle.stderr);
  browser = await launch();
  server = await Server.start();
  const sockets = async (count) => {
    for (const end = Date.now() + DEADLINE; ;) {
      const { nodes } = await server.call('GET', '/v1/cluster');
      if (nodes[0].sessions === count) return;
      assert.ok(Date.now() < end, `${nodes[0].sessions} sockets, not ${count}`);
    }
  };
  const page = await browser.newPage({ bypassCSP: true });
  const wrong = [];
  page.on('pageerror', (error) => wrong.push(error.message));
  page.on('console', (line) => { if (line.type() === 'error' && !line.location().url.includes('favicon')) wrong.push(line.text()); });
  await page.goto(`http://${server.ports.push}/client/errors.js`);
  wrong.length = 0;
  const tokens = { alice: await server.token('alice'), bob: await server.token('bob') };
  await page.evaluate((tokens) => { Object.assign(window, { tokens, users: Object.keys(tokens) }); }, tokens);
  await page.addScriptTag({ content: await readFile(join(folder, 'bundle.js'), 'utf8') });
  const live = () => page.waitForSelector('#bell[data-state="live"]', { state: 'attached', timeout: DEADLINE });
  const shows = (text) => page.waitForFunction((text) => document.querySelector('#bell')?.textContent === text, text, { timeout: DEADLINE });
  const publish = (user, payload, event) => server.call('POST', '/v1/messages', { to: { user }, payload, event });
  await live();
  await sockets(1);
  for (const n of [1, 2, 3]) await publish('alice', n, 'order.paid');
  await publish('alice', 'other', 'order.shipped');
  await shows('1 2 3');
  await page.waitForFunction(() => window.others.join() === '1,2,3,other');
  console.log('ok two components in StrictMode share one socket, and each message is handled once by each');
  await page.evaluate(() => window.setUser('bob'));
  await publish('bob', 'b', 'order.paid');
  await shows('b');
  await sockets(1);
  console.log('ok another user is another client');
  await page.evaluate(() => window.setShown(false));
  await sockets(0);
  await publish('bob', 'later', 'order.paid');
  await page.evaluate(() => window.setShown(true));
  await shows('later');
  await sockets(1);
  console.log('ok the client closes with the last component, and resumes with the next');
  assert.deepEqual(wrong, []);
} finally {
  await browser?.close();
  await server?.stop();
  await rm(folder, { recursive: true, force: true });
}
