import type { ReactNode } from 'react';

import type { Client, Gap, Message, Options, State } from './index.js';

/**
 * One client for all components below. It connects when the first of them uses it, and closes when the last one is gone.
 * Another `url`, `user` or `device` is another client; the newest `token` and `onError` are the ones that are called.
 */
export function RingpushProvider<E extends object = Record<string, unknown>>(props: {
  options: Options<E>;
  children?: ReactNode;
}): ReactNode;

/** Handles the messages of an event, `'*'` all, while the component is mounted. One that returns a promise is waited for. */
export function useEvent<E extends object = Record<string, unknown>, K extends (keyof E & string) | '*' = '*'>(
  event: K,
  handler: (message: Message<E, K>) => unknown,
): void;

/** Is called with each gap while the component is mounted: reload your state in it. */
export function useGap(handler: (gap: Gap) => unknown): void;

/** The state of the client; the component is rendered anew when it changes. */
export function usePushState(): State;

/** The client, for `history`, `wake`, `refresh` and `forget`; null in the first rendering. */
export function useClient<E extends object = Record<string, unknown>>(): Client<E> | null;
