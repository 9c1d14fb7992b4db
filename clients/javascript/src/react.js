// React: one client for all components below a provider. It connects when the first component asks for it, and closes when
// the last one is gone; what React does twice in StrictMode happens once.

import { createContext, createElement, useContext, useEffect, useMemo, useRef, useSyncExternalStore } from 'react';

import { connect } from './index.js';

const CONNECTING = { name: 'connecting' };
/** The last component may be gone for a moment only: StrictMode takes each off and mounts it again. */
const LINGER_MS = 50;

/** Counts who uses the client. */
class Shared {
  client = null;
  #make; #users = 0; #closing = null; #last = CONNECTING;

  constructor(make) { this.#make = make; }

  /** Calls `use` with the client; returns what takes that off again. */
  use(use) {
    clearTimeout(this.#closing);
    this.#users += 1;
    this.client ??= this.#make();
    const off = use(this.client);
    return () => {
      off();
      this.#users -= 1;
      if (this.#users > 0) return;
      clearTimeout(this.#closing);
      this.#closing = setTimeout(() => {
        const { client } = this;
        this.client = null;
        client.close();
      }, LINGER_MS);
    };
  }

  /** The same object until the state changes. */
  get state() {
    if (this.client) this.#last = this.client.state;
    return this.#last;
  }
}

const Context = createContext(null);

/** Another `url`, `user` or `device` in `options` is another client; of the other options those of the first time count, and the newest `token` and `onError`. */
export function RingpushProvider({ options, children }) {
  const newest = useRef(options);
  useEffect(() => { newest.current = options; });
  const shared = useMemo(
    () => new Shared(() => connect({
      ...newest.current,
      ...options,
      token: (why) => newest.current.token(why),
      onError: (fault) => {
        const { onError } = newest.current;
        return onError ? onError(fault) : console.error(`ringpush: ${fault.code}: ${fault.message}`);
      },
    })),
    // eslint-disable-next-line react-hooks/exhaustive-deps
    [String(options.url), options.user, options.device],
  );
  return createElement(Context.Provider, { value: shared }, children);
}

function useShared() {
  const shared = useContext(Context);
  if (!shared) throw new Error('ringpush: there is no <RingpushProvider> above this component');
  return shared;
}

/** Handles the messages of an event (`'*'`: all) while the component is mounted. The newest `handler` is the one that is called. */
export function useEvent(event, handler) {
  const shared = useShared();
  const newest = useRef(handler);
  useEffect(() => { newest.current = handler; });
  useEffect(() => shared.use((client) => client.on(event, (message) => newest.current(message))), [shared, event]);
}

/** Is called with each gap while the component is mounted. */
export function useGap(handler) {
  const shared = useShared();
  const newest = useRef(handler);
  useEffect(() => { newest.current = handler; });
  useEffect(() => shared.use((client) => client.onGap((gap) => newest.current(gap))), [shared]);
}

/** What `look` gives of the shared client; the component is rendered anew when the state changes. */
function useLook(look, atFirst) {
  const shared = useShared();
  const subscribe = useMemo(() => (changed) => shared.use((client) => client.onState(changed)), [shared]);
  return useSyncExternalStore(subscribe, () => look(shared), () => atFirst);
}

/** The state of the client; the component is rendered anew when it changes. */
export const usePushState = () => useLook((shared) => shared.state, CONNECTING);

/** The client, for `history`, `wake`, `refresh` and `forget`; null in the first rendering. */
export const useClient = () => useLook((shared) => shared.client, null);
