// The server of the page: who is logged in stands in a cookie, and for that user it asks ringpush for a token. A real one
// would check a password, and sign the cookie.
import { createServer } from 'node:http';
import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';

const AUTH = process.env.RINGPUSH_AUTH ?? 'http://127.0.0.1:8082';
const PUSH = process.env.RINGPUSH_URL ?? 'http://127.0.0.1:8080';
const KEY = process.env.RINGPUSH_ADMIN_KEY;
const PORT = Number(process.env.PORT ?? 3000);
const TOKEN_S = 900;

if (!KEY) {
  console.error('RINGPUSH_ADMIN_KEY is needed: see README.md');
  process.exit(64);
}
const library = new URL('.', import.meta.resolve('@ringpush/client'));
const TYPES = { html: 'text/html; charset=utf-8', js: 'text/javascript; charset=utf-8' };

/** Sends a file of a folder: a script or a page, by a name without a path. */
async function file(folder, name, response) {
  const kind = name.match(/^[\w-]+\.(html|js)$/)?.[1];
  const text = kind && await readFile(fileURLToPath(new URL(name, folder))).catch(() => null);
  if (!text) return response.writeHead(404).end();
  return response.writeHead(200, { 'content-type': TYPES[kind] }).end(text);
}

/** The user of the cookie; null where nobody is logged in. */
function userOf(request) {
  const user = request.headers.cookie?.match(/(?:^|; )user=([A-Za-z0-9._-]{1,64})(?:;|$)/)?.[1];
  return user ?? null;
}

async function token(request, response) {
  const user = userOf(request);
  // 403 tells the page that there will be no token.
  if (!user) return response.writeHead(403).end();
  const answer = await fetch(`${AUTH}/v1/tokens`, {
    method: 'POST',
    headers: { authorization: `Bearer ${KEY}`, 'content-type': 'application/json' },
    body: JSON.stringify({ user, ttl_s: TOKEN_S }),
  }).catch(() => null);
  if (!answer?.ok) return response.writeHead(503).end();
  return response.writeHead(200, { 'content-type': 'text/plain', 'cache-control': 'no-store' }).end((await answer.json()).token);
}

async function answer(request, response) {
  const path = request.url.split('?')[0];
  const name = path.slice(path.lastIndexOf('/') + 1);
  if (path === '/token') return token(request, response);
  if (path === '/settings') return response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify({ push: PUSH }));
  if (path.startsWith('/client/')) return file(library, name, response);
  return file(import.meta.url, name || 'index.html', response);
}

const server = createServer((request, response) => {
  answer(request, response).catch((error) => {
    console.error(error);
    if (response.headersSent) response.destroy();
    else response.writeHead(500).end();
  });
});
server.listen(PORT, '127.0.0.1', () => console.log(`http://127.0.0.1:${server.address().port}`));
