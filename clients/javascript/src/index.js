// The client of ringpush: see index.d.ts for what each thing is and does, README.md for the first ten lines.
//
// One line (a socket) at a time, two during a move. What the lines bring goes, each number once and in order, into one
// queue; the pump hands it to the application one message at a time, and acks what was handled.

import { Line, placeOf } from './line.js';
import { Positions, memoryStore } from './positions.js';
import { Pump } from './pump.js';
import { Refused, RingpushError } from './errors.js';

export { Refused, RingpushError };

const CLIENT = 'ringpush-js/0.1.0';
/** How long a token callback, or opening a line, may take. */
const PATIENCE_MS = 30_000;
const OPEN_MS = 10_000;
/** Longest wait between two tries, unless the server names a longer one. */
const RETRY_MAX_MS = 10_000;
const FIRST_HINT = { min_ms: 0, max_ms: 2_000 };
/** How long a line may be silent beyond the server's interval, and how long it has to answer when the page wakes. */
const GRACE_MS = 5_000;
const WAKE_MS = 3_000;
const MOVE_TRIES = 3;
/** A timer that comes so much too late slept with the machine. */
const TICK_MS = 5_000;
const JUMP_MS = 10_000;
/** The longest time that a timer takes. */
const TIMER_MAX_MS = 2 ** 31 - 1;

export function connect(options) {
  return new Client(options);
}

class Client {
  #options; #url; #store; #device; #positions; #pump; #WebSocket;
  #state = { name: 'connecting' };
  #stateHandlers = new Set();
  #stopped = null;             // the cause, once stopped
  #line = null; #next = null;  // the line in use, and the one that a move or a wake-up opens
  #hint = FIRST_HINT; #failures = 0; #notBefore = 0;
  #token = null; #fetching = null; #why = 'first'; #fresh = false; #refusals = 0;
  #refreshTimer = null; #refreshing = null;
  #wakeUp = null;              // ends the wait of the loop
  #patient = false;            // only wake() ends that wait
  #move = null;
  #reset = null;               // the last reset, and the line that said it
  #ahead = 0;                  // how far the server's clock is ahead of this one, in ms
  #opening = new Set();        // lines without a welcome yet
  #caughtUp = null; #isCaughtUp = false;
  #ended; #end;
  #abort = new AbortController();
  #unlisten = () => {};

  constructor(options) {
    if (!options?.url || typeof options.token !== 'function') {
      throw new TypeError('connect: "url" and "token" are required');
    }
    const { window: size = 256 } = options;
    if (!Number.isInteger(size) || size < 1 || size > 10_000) {
      throw new TypeError('connect: "window" is an integer from 1 to 10000');
    }
    if (options.begin !== undefined && !['oldest', 'latest'].includes(options.begin)) {
      throw new TypeError('connect: "begin" is "oldest" or "latest"');
    }
    if (options.ack !== undefined && !['handled', 'received', 'manual'].includes(options.ack)) {
      throw new TypeError('connect: "ack" is "handled", "received" or "manual"');
    }
    if (options.tabs === 'shared') {
      throw new TypeError('connect: "tabs": "shared" is not supported by this version');
    }
    this.#WebSocket = options.WebSocket ?? globalThis.WebSocket;
    if (!this.#WebSocket) throw new TypeError('connect: this platform has no WebSocket; hand one in as "WebSocket"');
    this.#options = { ...options, window: size };
    this.#url = new URL(options.url);
    this.#url.pathname = this.#url.pathname.replace(/\/*$/, '/');
    this.#store = options.store ?? browserStore();
    this.#ended = new Promise((resolve) => { this.#end = resolve; });
    this.#pump = new Pump({
      ack: options.ack ?? 'handled',
      window: size,
      validate: options.validate ?? {},
      error: (fault) => this.#fault(fault),
      acked: (seq) => this.#sendAck(seq),
      handled: (seq) => this.#positions?.note(seq),
    });
    this.#listenToThePage();
    if (options.signal) {
      if (options.signal.aborted) queueMicrotask(() => this.close());
      else options.signal.addEventListener('abort', () => this.close(), { once: true });
    }
    this.#run().catch((error) => this.#stop('internal', error));
  }

  get state() { return this.#state; }

  on(event, handler, { signal } = {}) { return this.#pump.on(event, handler, signal); }
  onGap(handler) { return this.#pump.onGap(handler); }
  onState(handler) {
    this.#stateHandlers.add(handler);
    return () => this.#stateHandlers.delete(handler);
  }
  messages(filter = {}) { return this.#pump.messages(filter); }
  [Symbol.asyncIterator]() { return this.messages()[Symbol.asyncIterator](); }

  async history({ before, after, limit, signal } = {}) {
    const url = new URL('v1/inbox/messages', this.#httpUrl());
    for (const [name, value] of Object.entries({ before, after, limit })) {
      if (value !== undefined && value !== null) url.searchParams.set(name, value);
    }
    const token = await this.#anyToken();
    const answer = await fetch(url, { headers: { authorization: `Bearer ${token}` }, signal });
    if (!answer.ok) throw await RingpushError.of(answer);
    const page = await answer.json();
    return { messages: page.messages.map((frame) => this.#pump.message(frame, false)), next: page.next };
  }

  caughtUp({ signal } = {}) {
    return new Promise((resolve, reject) => {
      const look = () => this.#isCaughtUp && this.#pump.idle;
      if (look()) return resolve();
      if (signal?.aborted) return reject(signal.reason);
      const timer = setInterval(() => { if (look()) done(resolve); }, 20);
      const done = (how, with_) => { clearInterval(timer); how(with_); };
      this.#ended.then(() => done(reject, new RingpushError('closed', 'the client has ended', false)));
      signal?.addEventListener('abort', () => done(reject, signal.reason), { once: true });
    });
  }

  /** Looks whether the line lives: now. */
  wake() {
    if (this.#stopped) return;
    if (this.#wakeUp) return this.#wakeUp();
    const line = this.#line;
    if (!line || this.#next) return;
    const before = line.heard;
    line.send({ type: 'ping' });
    setTimeout(() => {
      if (this.#line === line && line.heard === before && !this.#next) this.#replace(line);
    }, WAKE_MS);
  }

  async refresh() {
    this.#token = null;
    await this.#refreshNow('expiring');
  }

  async close() {
    if (!this.#stopped) this.#stop('closed');
    await this.#ended;
  }

  async forget() {
    await this.close();
    await this.#positions?.forget();
    if (!this.#options.device) await this.#store.set(this.#deviceKey(), null);
  }

  [Symbol.asyncDispose]() { return this.close(); }

  // --- the loop ---------------------------------------------------------------------------------

  async #run() {
    await this.#prepare();
    while (!this.#stopped) {
      if (globalThis.navigator?.onLine === false) {
        this.#set({ name: 'offline' });
        await this.#rest(TIMER_MAX_MS);
        continue;
      }
      this.#set({ name: 'connecting' });
      const cause = await this.#connectOnce();
      if (this.#stopped) break;
      this.#failures += 1;
      const until = this.#delay(cause);
      this.#set({ name: 'waiting', until: Date.now() + until, cause });
      await this.#rest(until);
    }
    this.#finish();
  }

  async #prepare() {
    const { device, user } = this.#options;
    this.#device = device ?? await this.#keptDevice();
    if (user) {
      this.#positions = new Positions(this.#store, `ringpush:${this.#url.host}:${user}:${this.#device}`);
      await this.#positions.load().catch((error) => this.#fault(RingpushError.from('store', error)));
    }
  }

  #deviceKey() { return `ringpush:${this.#url.host}:${this.#options.user ?? ''}:device`; }

  async #keptDevice() {
    try {
      const kept = await this.#store.get(this.#deviceKey());
      if (kept) return kept;
      const made = `js-${crypto.randomUUID().slice(0, 13)}`;
      await this.#store.set(this.#deviceKey(), made);
      if (this.#store.volatile) {
        this.#fault(new RingpushError('device_not_kept',
          'no "device" is named and nothing here is kept: the next start is another device', false));
      }
      return made;
    } catch (error) {
      this.#fault(RingpushError.from('store', error));
      return `js-${crypto.randomUUID().slice(0, 13)}`;
    }
  }

  /** One line, from the token to its end. Returns why it ended. */
  async #connectOnce() {
    let line;
    try {
      line = await this.#open();
    } catch (error) {
      return this.#refusedToOpen(error);
    }
    if (this.#stopped) { line.close(); return 'closed'; }
    this.#line = line;
    line.begin((frame) => this.#frame(line, frame));
    return this.#serve();
  }

  /** Opens a line where the server says. */
  async #open() {
    const token = await this.#anyToken();
    const place = await placeOf(this.#httpUrl(), token, this.#device, this.#abort.signal, OPEN_MS);
    const url = place?.socket ?? place?.url ?? this.#socketUrl();
    const credential = place?.ticket ? { ticket: place.ticket } : place ? null : { token };
    return this.#openAt(url, credential, this.#pump.position);
  }

  async #openAt(url, credential, since, move = {}) {
    const ask = { device: this.#device, heartbeat: true, window: this.#options.window, client: CLIENT };
    if (since !== null) ask.since = since;
    else if (this.#options.begin) ask.begin = this.#options.begin;
    const line = new Line(this.#WebSocket, url, credential, ask, OPEN_MS);
    move.opening = line;
    this.#opening.add(line);
    await line.opened.finally(() => this.#opening.delete(line));
    return line;
  }

  /** Until no line is left. */
  async #serve() {
    for (;;) {
      const line = this.#line;
      const { code, reason } = await line.ended;
      if (this.#stopped) return 'closed';
      if (this.#line !== line) continue;
      if (this.#next?.welcome) { this.#take(this.#next); continue; }
      this.#next?.close();
      this.#next = this.#move = this.#line = null;
      clearTimeout(this.#refreshTimer);
      this.#isCaughtUp = false;
      this.#pump.rewind();
      return this.#closed(code, reason);
    }
  }

  #closed(code, reason) {
    if (code === 4501) return this.#refused(reason);
    if (code === 4509) { this.#patient = true; return 'replaced'; }
    if (code >= 4500 && code < 5000) { this.#stop(reason || `closed with ${code}`); return 'stopped'; }
    return reason || `closed with ${code}`;
  }

  #refusedToOpen(error) {
    if (error instanceof Refused) { this.#stop('refused', error); return 'refused'; }
    if (error?.retryAfterMs) this.#notBefore = Date.now() + error.retryAfterMs;
    if (error?.status === 401 || error?.code === 4501) return this.#refused(error.reason);
    if (error?.code === 4509) { this.#patient = true; return 'replaced'; }
    if (error?.status === 403 || (error?.code >= 4500 && error?.code < 5000)) {
      this.#stop(error.reason ?? 'forbidden', error);
      return 'stopped';
    }
    if (error?.own) this.#fault(error);
    return error?.reason ?? error?.message ?? 'unreachable';
  }

  /** A token or ticket was refused. Two fresh tokens in a row: it is no use. */
  #refused(reason) {
    if (reason === 'ticket_invalid') return reason;
    if (this.#fresh) this.#refusals += 1;
    if (this.#refusals >= 2) { this.#stop('unauthorized', new RingpushError('unauthorized', reason, false)); return reason; }
    this.#token = null;
    this.#why = reason === 'token_revoked' ? 'revoked' : 'expired';
    this.#notBefore = 0;
    return reason ?? 'token_invalid';
  }

  #delay(cause) {
    if (this.#patient) { this.#patient = false; return TIMER_MAX_MS; }
    const { min_ms: min, max_ms: max } = this.#hint;
    const longest = Math.max(max, Math.min(RETRY_MAX_MS, 200 * 2 ** Math.min(this.#failures, 10)), min);
    const fresh = !this.#token && this.#refusals < 2 && /^token_/.test(cause) && this.#failures < 3;
    const drawn = fresh ? 0 : min + Math.random() * (longest - min);
    return Math.max(drawn, this.#notBefore - Date.now());
  }

  #rest(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, Math.min(ms, TIMER_MAX_MS));
      this.#wakeUp = () => { clearTimeout(timer); resolve(); };
    }).finally(() => { this.#wakeUp = null; });
  }

  // --- frames -----------------------------------------------------------------------------------

  #frame(line, frame) {
    if (line !== this.#line && line !== this.#next) return; // it is being left
    switch (frame.type) {
      case 'welcome': return this.#welcome(line, frame);
      case 'message':
        if (!this.#pump.put(frame, this.#isCaughtUp)) this.#sendAck(this.#pump.acked, true);
        return this.#reached();
      case 'gap':
        if (frame.reason === 'reset') {
          // During a move both lines may say it.
          const told = this.#reset;
          if (told && told.line !== line && told.before === frame.before) return;
          this.#reset = { line, before: frame.before };
        }
        this.#pump.gap(frame);
        return this.#reached();
      case 'caught_up':
        line.caughtUp = true;
        if (line === this.#next) return this.#take(line);
        this.#isCaughtUp = true;
        return this.#set({ name: 'live' });
      case 'move': return line === this.#line && this.#beginMove(frame);
      case 'refreshed': return this.#refreshed(frame.expires_at);
      case 'error':
        if (frame.reconnect) this.#hint = frame.reconnect;
        return;
      default: // pong, heartbeat, and what a newer server says
    }
  }

  #welcome(line, frame) {
    const { user } = this.#options;
    if (user && frame.user !== user) {
      this.#stop('wrong_user', new RingpushError('wrong_user', `the token is of ${frame.user}, not of ${user}`, false));
      return;
    }
    this.#failures = this.#refusals = 0;
    this.#why = 'expiring';
    this.#fresh = false;
    this.#hint = frame.reconnect ?? this.#hint;
    line.welcome = frame;
    const features = frame.features ?? [];
    line.watch(frame.heartbeat_ms ?? frame.ping_every_ms, GRACE_MS, !features.includes('heartbeat'));
    this.#pump.begin(frame.since, this.#positions?.known);
    if (frame.server_time) this.#ahead = (Date.parse(frame.server_time) || Date.now()) - Date.now();
    if (frame.token_expires_at) this.#scheduleRefresh(frame.token_expires_at);
    if (line === this.#line) this.#set({ name: 'catching-up' });
    this.#sendAck(this.#pump.acked, true);
  }

  /** A move also ends when the new line has brought all that the old one had. */
  #reached() {
    const next = this.#next;
    if (next?.welcome && next.seq >= (this.#line?.seq ?? 0) && next.seq > 0) this.#take(next);
  }

  #take(line) {
    const old = this.#line;
    this.#line = line;
    this.#next = this.#move = null;
    this.#isCaughtUp = line.caughtUp || this.#isCaughtUp;
    this.#set({ name: this.#isCaughtUp ? 'live' : 'catching-up' });
    if (old && old !== line) { this.#sendAck(this.#pump.acked, true, old); old.close(); }
  }

  #beginMove(order) {
    this.#move?.opening?.close();
    this.#next = null;
    const move = this.#move = { order, tries: 0 };
    this.#set({ name: 'moving' });
    setTimeout(() => this.#tryMove(move), order.after_ms ?? 0);
  }

  async #tryMove(move) {
    if (this.#move !== move || this.#stopped || !this.#line) return;
    move.tries += 1;
    try {
      const line = await this.#openAt(move.order.url, { token: await this.#anyToken() }, this.#pump.received, move);
      if (this.#move !== move || this.#stopped) return line.close();
      this.#next = line;
      line.begin((frame) => this.#frame(line, frame));
      const { code } = await line.ended;
      if (this.#line === line || this.#next !== line) return;
      throw new RingpushError('closed', `closed with ${code}`, true);
    } catch {
      if (this.#move !== move || this.#stopped) return;
      this.#next = null;
      if (move.tries < MOVE_TRIES) {
        const { min_ms: min, max_ms: max } = this.#hint;
        setTimeout(() => this.#tryMove(move), min + Math.random() * (max - min));
      } else {
        this.#move = null;
        this.#set({ name: this.#isCaughtUp ? 'live' : 'catching-up' });
      }
    }
  }

  /** The line does not answer: another one first, then it goes. */
  async #replace(line) {
    try {
      const next = await this.#open();
      if (this.#line !== line || this.#stopped) return next.close();
      this.#next?.close();
      this.#move = null;
      this.#next = next;
      next.begin((frame) => this.#frame(next, frame));
      if (this.#next === next) this.#take(next);
    } catch {
      line.fail('silent');
    }
  }

  #sendAck(seq, again = false, only = null) {
    if (seq === null || (only ?? this.#line) === null) return;
    for (const line of only ? [only] : [this.#line, this.#next]) {
      if (line?.welcome && (again || line.acked !== seq)) {
        line.acked = seq;
        line.send({ type: 'ack', seq });
      }
    }
  }

  // --- tokens -----------------------------------------------------------------------------------

  async #anyToken() {
    if (this.#token) return this.#token;
    this.#fetching ??= this.#fetchToken(this.#why).finally(() => { this.#fetching = null; });
    return this.#fetching;
  }

  async #fetchToken(reason) {
    const abort = new AbortController();
    const late = setTimeout(() => abort.abort(), PATIENCE_MS);
    const timeout = new Promise((_, reject) => {
      abort.signal.addEventListener('abort', () => reject(
        new RingpushError('token_timeout', '"token" did not answer in 30 s', true, true)), { once: true });
    });
    timeout.catch(() => {}); // it is also raced for
    const ended = () => abort.abort();
    this.#abort.signal.addEventListener('abort', ended, { once: true });
    try {
      const asked = (async () => this.#options.token({ reason, signal: abort.signal }))();
      const token = await Promise.race([asked, timeout]);
      if (typeof token !== 'string' || !token || !/^[\x21-\x7e]+$/.test(token)) {
        throw new RingpushError('token_rubbish', '"token" must return a token: a string', true, true);
      }
      this.#token = token;
      this.#fresh = true;
      return token;
    } catch (error) {
      if (error instanceof Refused || error instanceof RingpushError) throw error;
      throw new RingpushError('token_failed', `"token" threw: ${error?.message ?? error}`, true, true);
    } finally {
      clearTimeout(late);
      this.#abort.signal.removeEventListener('abort', ended);
    }
  }

  /** At four fifths of what is left of its life. */
  #scheduleRefresh(expiresAt) {
    clearTimeout(this.#refreshTimer);
    const left = Date.parse(expiresAt) - (Date.now() + this.#ahead);
    if (!Number.isFinite(left)) return;
    const wait = Math.min(Math.max(left * 0.8, 0), TIMER_MAX_MS);
    this.#refreshTimer = setTimeout(() => this.#refreshNow('expiring').catch((error) => this.#fault(error)), wait);
    this.#refreshTimer?.unref?.();
  }

  async #refreshNow(reason) {
    if (this.#refreshing) return this.#refreshing;
    this.#refreshing = (async () => {
      for (let tries = 0; !this.#stopped; tries += 1) {
        try {
          this.#token = null;
          this.#why = reason;
          const token = await this.#anyToken();
          (this.#next?.welcome ? this.#next : this.#line)?.send({ type: 'refresh', token });
          return;
        } catch (error) {
          if (error instanceof Refused) { this.#stop('refused', error); return; }
          this.#fault(error);
          await new Promise((resolve) => setTimeout(resolve, Math.random() * Math.min(RETRY_MAX_MS, 500 * 2 ** tries)));
        }
      }
    })().finally(() => { this.#refreshing = null; });
    return this.#refreshing;
  }

  #refreshed(expiresAt) {
    this.#fresh = false;
    this.#scheduleRefresh(expiresAt);
  }

  // --- the rest ---------------------------------------------------------------------------------

  #httpUrl() {
    const url = new URL(this.#url);
    url.protocol = url.protocol.replace('ws', 'http');
    return url;
  }

  #socketUrl() {
    const url = new URL('v1/ws', this.#url);
    url.protocol = url.protocol.replace('http', 'ws');
    return url.href;
  }

  #set(state) {
    if (this.#stopped && state.name !== 'stopped') return;
    if (state.name === this.#state.name && state.name !== 'waiting') return;
    const node = this.#line?.welcome?.node;
    if (node && ['catching-up', 'live', 'moving'].includes(state.name)) state = { ...state, node };
    this.#state = state;
    for (const handler of this.#stateHandlers) {
      try { handler(state); } catch (error) { this.#fault(RingpushError.from('handler', error)); }
    }
  }

  #fault(fault) {
    const { onError } = this.#options;
    try {
      if (onError) return onError(fault);
      console.error(`ringpush: ${fault.code}: ${fault.message}`);
    } catch (error) {
      console.error('ringpush: onError threw', error);
    }
    return undefined;
  }

  #stop(cause, error) {
    if (this.#stopped) return;
    this.#stopped = cause;
    if (error) this.#fault(RingpushError.from(cause, error));
    clearTimeout(this.#refreshTimer);
    this.#abort.abort();
    this.#wakeUp?.();
    this.#pump.flush();
    const lines = [this.#line, this.#next, ...this.#opening].filter(Boolean);
    for (const line of lines) line.close();
    if (!this.#line) this.#finish();
  }

  #finish() {
    this.#unlisten();
    this.#pump.end();
    this.#positions?.flush();
    this.#set({ name: 'stopped', cause: this.#stopped });
    this.#end();
  }

  #listenToThePage() {
    const wake = () => this.wake();
    const visible = () => { if (document.visibilityState === 'visible') this.wake(); };
    const hide = () => { this.#pump.flush(); this.#positions?.flush(); };
    let last = Date.now();
    const tick = setInterval(() => {
      const now = Date.now();
      if (now - last > TICK_MS + JUMP_MS || now < last - JUMP_MS) this.wake();
      last = now;
    }, TICK_MS);
    tick.unref?.();
    const page = [['online', wake], ['pageshow', wake], ['resume', wake], ['pagehide', hide]];
    const target = typeof window === 'undefined' ? null : window;
    if (target) {
      for (const [name, handler] of page) target.addEventListener(name, handler);
      document.addEventListener('visibilitychange', visible);
    }
    this.#unlisten = () => {
      clearInterval(tick);
      if (!target) return;
      for (const [name, handler] of page) target.removeEventListener(name, handler);
      document.removeEventListener('visibilitychange', visible);
    };
  }
}

/** The browser's own store, or memory where there is none. */
function browserStore() {
  try {
    const { localStorage } = globalThis;
    if (typeof window === 'undefined' || !localStorage) return memoryStore();
    const probe = 'ringpush:probe';
    localStorage.setItem(probe, '1');
    localStorage.removeItem(probe);
    return {
      get: (key) => localStorage.getItem(key),
      set: (key, value) => (value === null ? localStorage.removeItem(key) : localStorage.setItem(key, value)),
    };
  } catch {
    return memoryStore(); // private mode, or a full quota
  }
}
