// Compiled by `tsc --strict`, never run: what an application may write.
import { connect, Refused, RingpushError, type Message, type State } from '@ringpush/client';

interface Events {
  'order.paid': { order: number };
  'order.shipped': { order: number; carrier: string };
}

const client = connect<Events>({
  url: new URL('https://push.example.com'),
  token: async ({ reason, signal }) => {
    const answer = await fetch(`/token?${reason}`, { signal });
    if (answer.status === 403) throw new Refused('logged out');
    return answer.text();
  },
  user: 'alice',
  validate: { 'order.paid': (payload) => payload as Events['order.paid'] },
  onError: (fault: RingpushError) => (fault.code === 'handler' ? 'skip' : undefined),
});
const off: () => void = client.on('order.shipped', (message) => {
  const carrier: string = message.payload.carrier;
  // @ts-expect-error there is no such field
  message.payload.novelty;
  return carrier;
});
off();
client.onState((state: State) => { if (state.name === 'waiting') console.log(new Date(state.until)); });
export async function read(): Promise<number> {
  for await (const message of client.messages({ events: ['order.paid'] })) return message.seq;
  const page = await client.history({ before: 1, limit: 10 });
  const first: Message<Events> | undefined = page.messages[0];
  await client.close();
  return first?.seq ?? 0;
}
// @ts-expect-error the token is required
connect({ url: 'https://push.example.com' });

// A consumer with React, without JSX.
import { createElement } from 'react';
import { RingpushProvider, useEvent, useGap, usePushState } from '@ringpush/client/react';

function Bell(): null {
  useEvent<Events, 'order.paid'>('order.paid', (message) => message.payload.order.toFixed());
  useEvent('*', (message) => message.seq);
  useGap((gap) => gap.reason);
  const state: State = usePushState();
  console.log(state.name);
  return null;
}
export const app = createElement(RingpushProvider, { options: { url: '/', token: () => 't', tabs: 'shared', user: 'alice' } }, createElement(Bell));
