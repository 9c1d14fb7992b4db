// The dashboard while a cluster under load grows by a node and shrinks again: what an operator would look at.

import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';

import { DEADLINE, launch } from './launch.mjs';

const scale = (nodes) => promisify(execFile)(process.env.RINGPUSH_SCALE, ['scale', String(nodes)]);
const users = Number(process.env.RINGPUSH_USERS);

/** What the page shows now. */
const shown = () => {
  const text = (id) => document.getElementById(id).textContent;
  const rows = [...document.querySelectorAll('#nodes tr')];
  return {
    state: document.getElementById('state').dataset.state,
    nodes: rows.map((row) => row.dataset.node),
    states: rows.map((row) => row.dataset.state),
    draining: Number(text('draining')),
    ...Object.fromEntries(['members', 'sessions', 'displaced', 'moves', 'delivered'].map((id) => [id, Number(text(id))])),
  };
};

const browser = await launch();
try {
  const page = await browser.newPage({ viewport: { width: 1100, height: 500 } });
  await page.goto(process.env.RINGPUSH_OPS);
  const until = async (what, holds) => {
    for (const end = Date.now() + DEADLINE; ;) {
      const now = await page.evaluate(shown);
      if (holds(now)) return now;
      assert.ok(Date.now() < end, `never shown: ${what}; now ${JSON.stringify(now)}`);
      await page.waitForTimeout(50);
    }
  };
  const calm = (nodes) => (now) => now.state === 'live' && now.members === nodes && now.nodes.length === nodes
    && now.sessions === users && now.displaced === 0 && now.moves === 0;
  await until('three members with all sessions', calm(3));
  await until('messages being delivered', (now) => now.delivered > 100);
  let scaling = scale(4);
  await until('moves under way', (now) => now.members === 4 && now.moves > 0);
  await page.screenshot({ path: join(process.env.RINGPUSH_SHOTS, 'dashboard-joining.png') });
  await scaling;
  await until('a calm cluster of four', calm(4));
  scaling = scale(3);
  await until('a node that drains', (now) => now.draining === 1 && now.states.includes('draining'));
  await page.screenshot({ path: join(process.env.RINGPUSH_SHOTS, 'dashboard-draining.png') });
  await scaling;
  await until('a calm cluster of three', calm(3));
  const wide = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  assert.ok(wide[0] <= wide[1], `${wide[0]} px on a screen of ${wide[1]}`);
  await page.setViewportSize({ width: 360, height: 740 });
  const narrow = await page.evaluate(() => document.documentElement.scrollWidth);
  assert.ok(narrow <= 360, `${narrow} px on a screen of 360`);
  console.log('ok the dashboard shows a cluster that is scaled');
} finally {
  await browser.close();
}
