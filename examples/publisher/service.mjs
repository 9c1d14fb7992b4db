// A shop: takes an order by HTTP, and tells the customer and the warehouse.
import { createServer } from 'node:http';
import { PublishError, Ringpush } from '@ringpush/server';

const url = process.env.RINGPUSH_COLLECT ?? 'http://127.0.0.1:8081';
const key = process.env.RINGPUSH_API_KEY;
const BODY_MAX = 64 * 1024;
const DEADLINE_MS = 20_000;

if (!key) {
  console.error('RINGPUSH_API_KEY is needed: see README.md');
  process.exit(64);
}
const ringpush = new Ringpush({ url, key });

async function bodyOf(request) {
  let text = '';
  for await (const part of request) {
    text += part;
    if (text.length > BODY_MAX) throw new SyntaxError('the order is too large');
  }
  return JSON.parse(text);
}

async function order(request) {
  const { order: number, customer, items } = await bodyOf(request);
  if (!Number.isInteger(number) || typeof customer !== 'string' || !Number.isInteger(items)) {
    throw new SyntaxError('an order has "order", "customer" and "items"');
  }
  const options = { event: 'order.placed', signal: AbortSignal.timeout(DEADLINE_MS) };
  await ringpush.publish(customer, { title: `Your order ${number} was placed` }, { ...options, id: `order-${number}-customer` });
  await ringpush.publish('warehouse', { order: number, items }, { ...options, id: `order-${number}-warehouse` });
  return number;
}

const server = createServer(async (request, response) => {
  const answer = (status, body) => response.writeHead(status, { 'content-type': 'application/json' }).end(`${JSON.stringify(body)}\n`);
  if (request.method !== 'POST' || request.url !== '/orders') return answer(404, { error: 'POST /orders' });
  try {
    return answer(202, { order: await order(request) });
  } catch (error) {
    if (error instanceof SyntaxError) return answer(400, { error: error.message });
    if (error instanceof PublishError && error.status === 422) return answer(400, { error: error.message });
    if (error instanceof PublishError && error.status === 409) return answer(409, { error: 'there is another order of that number' });
    console.error(error);
    return answer(503, { error: 'try again' });
  }
});
server.listen(Number(process.env.PORT ?? 3001), '127.0.0.1', () => console.log(`http://127.0.0.1:${server.address().port}`));
