// One headless Chromium, with nothing that would look for the world outside.

import { createRequire } from 'node:module';

const { chromium } = createRequire(`${process.env.RINGPUSH_MODULES}/`)('playwright-core');

export const DEADLINE = 20_000;

export const launch = (more = {}) => chromium.launch({
  executablePath: process.env.RINGPUSH_CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage'],
  ...more,
});
