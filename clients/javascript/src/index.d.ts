/** What a client is made with. `E` maps the names of events to the types of their payloads. */
export interface Options<E extends object = Record<string, unknown>> {
  /** `https://push.example.com`: the node is found by `POST /v1/connect`, else at `/v1/ws`. */
  url: string | URL;
  /**
   * Asked before the first socket, before a token ends, and after a refusal; never twice at once. It has 30 s.
   * Throw {@link Refused} to stop the client; any other error is told and tried again.
   */
  token(why: { reason: TokenReason; signal: AbortSignal }): string | Promise<string>;
  /**
   * Who is meant to be logged in. Another `welcome.user` stops the client before anything is handed on or acked.
   * Without it no position is kept beyond the page.
   */
  user?: string;
  /** Default in a browser: one per profile and user, kept in `store`. Name one where nothing is kept (Node, workers). */
  device?: string;
  /** Default: localStorage, else memory. */
  store?: Store;
  /** Where a device without a cursor begins. Default: `oldest`. */
  begin?: 'oldest' | 'latest';
  /**
   * `shared`: one socket for all tabs of a profile and user, in the tab that Web Locks elect; it needs `user`. A message is
   * acked when that tab and every visible tab have handled it. Default: `separate`, one socket per tab. Not for service workers.
   */
  tabs?: 'separate' | 'shared';
  /** Default `handled`: when the promise of every handler has resolved. */
  ack?: 'handled' | 'received' | 'manual';
  /** How many messages may be ahead of the acks, 1 to 10,000. Default: 256. */
  window?: number;
  /** Checks the payload of an event. One that throws is told, and the message is passed over. */
  validate?: { [K in keyof E & string]?: (payload: unknown) => E[K] };
  /** Where the platform has none (Node 20): that of `ws`. */
  WebSocket?: unknown;
  /** Closes the client when aborted. */
  signal?: AbortSignal;
  /** What went wrong. A fault of a handler may be answered `'skip'`. Default: `console.error`. */
  onError?(fault: RingpushError): 'skip' | void;
}

/** Why a token is asked for. */
export type TokenReason = 'first' | 'expiring' | 'expired' | 'revoked';

/** A message. `K` is the name of its event. */
export interface Message<E extends object = Record<string, unknown>, K extends string = string> {
  /** What it tells, if its sender named that. */
  readonly event: K | undefined;
  readonly payload: K extends keyof E ? E[K] : unknown;
  /** Its number in the user's inbox, or with `inLog` in the log of its topic. */
  readonly seq: number;
  readonly id: string;
  /** The topic by which it came, if it was not sent to the user; `everyone` if it was sent to all users. */
  readonly topic: string | undefined;
  /** It stands in the log of its topic. There is no order between two logs, nor between a log and the inbox. */
  readonly inLog: boolean;
  readonly traceparent: string | undefined;
  readonly acceptedAt: Date;
  readonly expiresAt: Date;
  /** False: it comes from the backlog. */
  readonly live: boolean;
  /** With `ack: 'manual'`: it, and all before it, are handled. */
  ack(): void;
}

/** Numbers that will never come. Reload your state; then the stream goes on. */
export interface Gap {
  after: number;
  before: number;
  /** `joined`: what was before the user joined the topic. */
  reason: 'expired' | 'reset' | 'unreadable' | 'joined';
  /** The topic in whose log they are missing; none: in the inbox. */
  topic: string | undefined;
}

export type State =
  | { name: 'connecting' | 'offline' }
  /** `node`: the node that holds the socket. */
  | { name: 'catching-up' | 'live'; node: string }
  /** `to`: the node that the server named, and why: the user's owner changed, or the node here is leaving. */
  | { name: 'moving'; node: string; to: string; reason: 'owner' | 'drain' }
  /** `until`: ms since the epoch. */
  | { name: 'waiting'; until: number; cause: string }
  | { name: 'stopped'; cause: string };

export interface Store {
  get(key: string): string | null | Promise<string | null>;
  /** `null` removes it. */
  set(key: string, value: string | null): void | Promise<void>;
}

export interface Until {
  signal?: AbortSignal;
}

export interface Client<E extends object = Record<string, unknown>> extends AsyncIterable<Message<E>> {
  readonly state: State;
  /**
   * Handles the messages of an event, `'*'` all. One message at a time, in order. A handler that fails is called again
   * after a while, and nothing is acked over it. Returns what takes it off.
   */
  on<K extends keyof E & string>(event: K, handler: (message: Message<E, K>) => unknown, until?: Until): () => void;
  on(event: '*', handler: (message: Message<E>) => unknown, until?: Until): () => void;
  /** Is awaited before the stream goes on. */
  onGap(handler: (gap: Gap) => unknown): () => void;
  onState(handler: (state: State) => void): () => void;
  /** A message is handled when the loop asks for the next one. Leaving the loop does not handle the one at hand. */
  messages(filter?: { events?: (keyof E & string)[]; topic?: string } & Until): AsyncIterable<Message<E>>;
  /**
   * The messages of a topic with a log of which the user is no member: the token's claim `watch` must allow it. From `since` on,
   * from the newest message on (`last`), or what comes from now on (`latest`, the default). It goes on through reconnects and
   * moves. It ends when the topic does, and throws where it is refused (`forbidden_topic`, `unknown_topic`). Other handlers
   * have these messages, too. Not with `tabs: 'shared'`.
   */
  watch(topic: string, range?: { since?: number | 'latest' | 'last' } & Until): AsyncIterable<Message<E>>;
  /** What was before: in the inbox, or in the log of a topic. Newest first (`before`), or oldest first (`after`). */
  history(range?: { topic?: string; before?: number; after?: number; limit?: number } & Until): Promise<{
    messages: Message<E>[];
    /** The `before` (or `after`) of the following page. */
    next: number | null;
  }>;
  /** Resolves when the backlog was delivered and handled. */
  caughtUp(until?: Until): Promise<void>;
  /** Looks at once whether the line lives, and tries again at once where it waits. */
  wake(): void;
  /** Fetches another token, and shows it to the server. */
  refresh(): Promise<void>;
  /** Says the pending acks and closes. */
  close(): Promise<void>;
  /** Logs out: stops all tabs of this user, and removes the device's name and position. */
  forget(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

export function connect<E extends object = Record<string, unknown>>(options: Options<E>): Client<E>;

/** Thrown by `token`: there will be no token; the client stops. */
export class Refused extends Error {
  constructor(message?: string, options?: ErrorOptions);
}

export class RingpushError extends Error {
  /** `handler`, `gap`, `token_failed`, `token_timeout`, `token_rubbish`, `wrong_user`, `unauthorized`, `store`, … */
  readonly code: string;
  /** The client goes on by itself. */
  readonly retryable: boolean;
  readonly status?: number;
}
