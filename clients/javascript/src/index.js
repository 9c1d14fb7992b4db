// The client of ringpush: see index.d.ts for what each thing is and does, README.md for the first ten lines.
//
// One line (a socket) at a time, two during a move. What the lines bring goes, each number once and in order, into one
// queue; the pump hands it to the application one message at a time, and acks what was handled.

import { Line, isVisible, pause, placeOf } from './line.js';
import { Tabs } from './tabs.js';
import { Positions, memoryStore } from './positions.js';
import { Pump, logOf } from './pump.js';
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
/** Logs in one ack, which has at most 4 KiB. */
const ACKED = 40;
/** A timer that comes so much too late slept with the machine. */
const TICK_MS = 1_000;
const JUMP_MS = 10_000;
/** The longest time that a timer takes. */
const TIMER_MAX_MS = 2e9;

const between = ({ min_ms: min, max_ms: max }) => min + Math.random() * (max - min);

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
  #ahead = 0;                  // how far the server's clock is ahead of this one, in ms
  #opening = new Set();        // lines without a welcome yet
  #caughtUp = null; #isCaughtUp = false;
  #ended; #end;
  #abort = new AbortController();
  #watches = new Map();        // by topic: where it began, what went wrong, and who ends its loops
  #tabs = null;                // with `tabs: 'shared'`
  #news = null;                // with separate tabs: where the others say `forget`

  constructor(options) {
    const { window: size = 256 } = options;
    const check = (holds, rule) => { if (!holds) throw new TypeError(`ringpush: ${rule}`); };
    check(options.url && typeof options.token === 'function', '"url" and "token" are required');
    check(Number.isInteger(size) && size >= 1 && size <= 10_000, '"window" is 1 to 10000');
    for (const [name, ...values] of [['begin', 'oldest', 'latest'], ['ack', 'handled', 'received', 'manual'], ['tabs', 'separate', 'shared']]) {
      check([undefined, ...values].includes(options[name]), `"${name}" is one of ${values}`);
    }
    check(options.tabs !== 'shared' || options.user, '"tabs": "shared" needs "user"');
    this.#WebSocket = options.WebSocket ?? globalThis.WebSocket;
    check(this.#WebSocket, '"WebSocket" is required');
    this.#options = { ...options, window: size };
    this.#url = new URL(options.url);
    this.#url.pathname = this.#url.pathname.replace(/\/*$/, '/');
    this.#url.protocol = this.#url.protocol.replace('ws', 'http');
    this.#store = options.store ?? browserStore();
    this.#ended = new Promise((resolve) => { this.#end = resolve; });
    this.#pump = new Pump({
      ack: options.ack ?? 'handled',
      window: size,
      validate: options.validate ?? {},
      error: (error, code) => this.#fault(error, code),
      acked: () => (this.#tabs ? this.#tabs.handled() : this.#acked()),
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

  async *watch(topic, { since, signal } = {}) {
    if (this.#options.tabs === 'shared') throw new RingpushError('tabs_shared', '"watch" needs "tabs": "separate"', false);
    const isSince = since === undefined || ['latest', 'last'].includes(since) || (Number.isSafeInteger(since) && since >= 0);
    if (!/^(?!everyone$)[A-Za-z0-9][\w.:-]{0,63}$/.test(topic) || !isSince) throw new TypeError('ringpush: "topic" or "since" is none');
    const over = new AbortController();
    const end = () => over.abort();
    signal?.addEventListener('abort', end);
    const stream = this.#pump.messages({ topic, signal: over.signal });
    // From now on it has what comes.
    let next = stream.next();
    const known = this.#watches.get(topic);
    const watch = known ?? { since, loops: new Set() };
    watch.loops.add(end);
    this.#watches.set(topic, watch);
    if (!known) for (const line of this.#lines) this.#sendWatch(line, topic);
    try {
      for (let given = await next; !given.done; given = await stream.next()) yield given.value;
      if (watch.error) throw watch.error;
    } finally {
      stream.return();
      watch.loops.delete(end);
      if (!watch.loops.size && this.#watches.get(topic) === watch) {
        this.#watches.delete(topic);
        const log = this.#pump.logs.get(topic);
        if (!log || log.watched) {
          for (const line of this.#lines) {
            line.lefts[topic] = (line.lefts[topic] ?? 0) + 1;
            line.sayPaced({ type: 'unwatch', topic });
          }
          this.#pump.drop(topic);
        }
      }
    }
  }

  #sendWatch(line, topic) {
    if (line?.welcome?.topics) {
      line.sayPaced({ type: 'watch', topic, since: this.#pump.logs.get(topic)?.position ?? this.#watches.get(topic).since });
    }
  }

  /** The lines that know of logs. */
  get #lines() { return [this.#line, this.#next].filter((line) => line?.welcome?.topics); }

  /** A topic is watched no more: its loops end. */
  #unwatched(topic, error) {
    const watch = this.#watches.get(topic);
    if (!watch) return;
    this.#watches.delete(topic);
    watch.error = error;
    for (const end of watch.loops) end();
  }

  async history({ topic, before, after, limit, signal } = {}) {
    const page = await this.#page({ before, after, limit }, signal, topic);
    return { messages: page.messages.map((frame) => this.#pump.message(frame, false)), next: page.next };
  }

  async #page(range, signal, topic) {
    const log = topic === 'everyone' ? topic : topic ? `topics/${topic}` : 'inbox';
    const url = new URL(`v1/${log}/messages`, this.#url);
    for (const [name, value] of Object.entries(range)) {
      if (value !== undefined && value !== null) url.searchParams.set(name, value);
    }
    for (let again = true; ; again = false) {
      const token = await this.#anyToken();
      const answer = await fetch(url, { headers: { authorization: `Bearer ${token}` }, signal });
      if (answer.ok) return answer.json();
      const error = await RingpushError.of(answer);
      if (answer.status !== 401 || !again) throw error;
      if (this.#token === token) this.#token = null;
      this.#why = error.reason === 'token_revoked' ? 'revoked' : 'expired';
    }
  }

  async caughtUp({ signal } = {}) {
    while (!this.#isCaughtUp || !this.#pump.idle) {
      signal?.throwIfAborted();
      if (this.#stopped) throw new RingpushError('closed', 'closed', false);
      await pause(20);
    }
  }

  /** Looks whether the line lives: now. */
  wake() {
    if (this.#stopped) return;
    if (this.#tabs && !this.#tabs.leads) return this.#tabs.ask('wake');
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
    if (this.#tabs && !this.#tabs.leads) return this.#tabs.ask('refresh');
    await this.#refreshNow('expiring');
  }

  async close() {
    if (!this.#stopped) this.#stop('closed');
    await this.#ended;
  }

  async forget() {
    this.#tabs?.ask('forget');
    this.#news?.postMessage({ forget: true });
    await this.#forgotten();
    const clear = async () => {
      for (const key of ['seq', 'term', 'era']) await this.#store.set(`${this.#name()}:${key}`, null);
      if (!this.#options.device) await this.#store.set(this.#deviceKey(), null);
    };
    // The leading tab has let go of its socket when it lets go of its lock.
    if (this.#tabs) await navigator.locks.request(this.#name(), clear);
    else await clear();
  }

  /** This tab or another one forgets the user: nothing is written any more, or it would stand in the store for good. */
  #forgotten() {
    if (this.#positions) this.#positions.gone = true;
    return this.close();
  }

  [Symbol.asyncDispose]() { return this.close(); }

  // --- the loop ---------------------------------------------------------------------------------

  async #run() {
    await this.#prepare();
    if (!this.#stopped && this.#options.tabs === 'shared') this.#share();
    else await this.#lead();
  }

  /** Whether this tab is to have no line (any more). */
  get #over() { return this.#stopped || (this.#tabs && !this.#tabs.leads); }

  async #lead() {
    // What another tab has handed over and is not handled yet comes by the line of this one.
    if (this.#tabs) this.#pump.rewind();
    while (!this.#over) {
      if (globalThis.navigator?.onLine === false) {
        const online = this.#rest(TIMER_MAX_MS);
        this.#set({ name: 'offline' });
        await online;
        continue;
      }
      this.#set({ name: 'connecting' });
      const cause = await this.#connectOnce();
      if (this.#over) break;
      this.#failures += 1;
      const until = this.#delay(cause);
      const rested = this.#rest(until);
      this.#set({ name: 'waiting', until: Date.now() + until, cause });
      await rested;
      this.#patient = false;
    }
    this.#line = this.#next = this.#move = null;
    if (this.#stopped) this.#finish();
  }

  #name() { return `${this.#where}:2:${this.#options.user}:${this.#device}`; }

  get #where() { return `ringpush:${this.#url.host}${this.#url.pathname}`; }

  #share() {
    if (!globalThis.navigator?.locks || !globalThis.BroadcastChannel) {
      this.#fault('no Web Locks', 'tabs_not_shared', false);
      return this.#lead();
    }
    this.#tabs = new Tabs(this.#name(), this.#store, this.#pump, {
      lead: () => this.#lead(),
      drop: () => {
        this.#move = null;
        this.#isCaughtUp = false;
        this.#closeLines();
      },
      follow: (state) => {
        this.#isCaughtUp = state.name === 'live';
        this.#set(state);
      },
      ack: () => this.#acked(),
      page: (after, topic) => this.#page({ after, limit: 100 }, this.#within(OPEN_MS), topic),
      asked: (what) => (what.forget ? this.#forgotten() : what.wake ? this.wake() : this.refresh()),
      standing: () => ({ state: this.#state, beat: this.#line?.welcome?.heartbeat_ms }),
      error: (error, code) => (error instanceof Refused ? this.#stop('refused', error) : this.#fault(error, code)),
    });
    return this.#tabs.join();
  }

  #acked() {
    const log = this.#pump.logs.get('');
    const seq = log ? this.#ackable('', log) : null;
    if (seq !== null) this.#positions?.note(Math.min(seq, log.handled), log.at);
    this.#sendAck();
  }

  /** What may be acked of a log. */
  #ackable(name, log) { return this.#tabs ? this.#tabs.floor(name, log) : log.acked; }

  async #prepare() {
    const { device, user } = this.#options;
    this.#device = device ?? await this.#keptDevice();
    if (user) {
      this.#positions = new Positions(this.#store, `${this.#name()}:seq`);
      if (this.#options.tabs !== 'shared' && globalThis.window && globalThis.BroadcastChannel) {
        this.#news = new BroadcastChannel(this.#name());
        this.#news.onmessage = ({ data }) => { if (data?.forget) this.#forgotten(); };
      }
      await this.#positions.load().catch((error) => this.#fault(error, 'store'));
    }
  }

  #deviceKey() { return `${this.#where}:${this.#options.user ?? ''}:device`; }

  async #keptDevice() {
    let device = `js-${crypto.getRandomValues(new Uint32Array(2)).join('-')}`;
    try {
      const kept = await this.#store.get(this.#deviceKey());
      if (kept) device = kept;
      else await this.#store.set(this.#deviceKey(), device);
      if (this.#store.volatile) {
        this.#fault('name a "device"', 'device_not_kept', false);
      }
    } catch (error) {
      this.#fault(error, 'store');
    }
    return device;
  }

  /** One line, from the token to its end. Returns why it ended. */
  async #connectOnce() {
    let line;
    try {
      line = await this.#open();
    } catch (error) {
      return this.#refusedToOpen(error);
    }
    if (this.#over) { line.close(); return 'closed'; }
    this.#line = line;
    line.begin((frame) => this.#frame(line, frame));
    return this.#serve();
  }

  /** Opens a line where the server says. */
  async #open() {
    const token = await this.#anyToken();
    const place = await placeOf(this.#url, token, this.#device, this.#within(OPEN_MS));
    const url = place?.socket ?? place?.url ?? this.#socketUrl();
    const credential = place?.ticket ? { ticket: place.ticket } : place ? null : { token };
    return this.#openAt(url, credential, 'position');
  }

  async #openAt(url, credential, which, move = {}) {
    const ask = { device: this.#device, heartbeat: true, window: this.#options.window, client: CLIENT };
    const { '': since, everyone, ...topics } = this.#pump.all(which);
    if (since >= 0) ask.since = since;
    else if (this.#options.begin) ask.begin = this.#options.begin;
    if (credential) Object.assign(ask, { topics, everyone });
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
      if (this.#over) return 'closed';
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

  /** What a close code asks for. Returns why the line ended. */
  #closed(code, reason, error) {
    if (code === 4501) return this.#refused(reason);
    const why = reason || `closed with ${code}`;
    if (code === 4509) {
      this.#patient = true;
      return 'replaced';
    }
    if (code >= 4500 && code < 5000) this.#stop(why, error);
    return why;
  }

  #refusedToOpen(error) {
    if (error instanceof Refused) { this.#stop('refused', error); return 'refused'; }
    const { code, reason, status } = error;
    if (error.hint) this.#hint = error.hint;
    if (error.retryAfterMs) this.#notBefore = Date.now() + error.retryAfterMs;
    if (status === 401 || status === 403) return this.#closed(4100 + status, reason, error);
    if (code >= 4500) return this.#closed(code, reason, error);
    if (!status && /^token_/.test(code)) this.#fault(error);
    return reason || error.message;
  }

  /** A token or ticket was refused. Two fresh tokens in a row: it is no use. */
  #refused(reason) {
    if (reason === 'ticket_invalid') return reason;
    if (this.#fresh) this.#refusals += 1;
    if (this.#refusals >= 2) { this.#stop('unauthorized', reason || 'refused'); return reason; }
    this.#token = null;
    this.#why = reason === 'token_revoked' ? 'revoked' : 'expired';
    this.#notBefore = 0;
    return reason ?? 'token_invalid';
  }

  #delay(cause) {
    if (this.#patient) return TIMER_MAX_MS;
    const { min_ms: min, max_ms: max } = this.#hint;
    const longest = Math.max(max, Math.min(RETRY_MAX_MS, 200 * 2 ** Math.min(this.#failures, 10)), min);
    const fresh = !this.#token && this.#refusals < 2 && /^token_/.test(cause) && this.#failures < 3;
    return (fresh ? 0 : between({ min_ms: min, max_ms: longest })) + Math.max(0, this.#notBefore - Date.now());
  }

  #rest(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, Math.min(ms, TIMER_MAX_MS));
      this.#wakeUp = () => { clearTimeout(timer); resolve(); };
    }).finally(() => { this.#wakeUp = null; });
  }

  // --- frames -----------------------------------------------------------------------------------

  #frame(line, frame) {
    if (this.#over || (line !== this.#line && line !== this.#next)) return; // it is being left
    switch (frame.type) {
      case 'welcome': return this.#welcome(line, frame);
      case 'message':
      case 'gap': {
        const name = logOf(frame);
        const log = this.#pump.logs.get(name);
        if (!log) return undefined; // it crossed with the end of a membership
        const { received: after } = log;
        if (frame.type === 'message') {
          const live = this.#isCaughtUp;
          if (this.#pump.put(frame, live)) this.#tabs?.relay({ message: frame, after, live });
          else this.#sendAck(name);
        } else {
          const { before, reason } = frame;
          if (reason === 'reset') {
            // During a move both lines may say it.
            if ((line === this.#line ? this.#next : this.#line)?.reset[name] === before) return undefined;
            line.reset[name] = before;
          }
          if (this.#pump.gap(frame)) this.#tabs?.relay({ gap: frame, after });
        }
        return this.#reached();
      }
      case 'topic': {
        const { topic, state, after } = frame;
        if (state === 'left') {
          // What this side has ended itself may be watched anew meanwhile.
          if (line.lefts[topic] > 0) { line.lefts[topic] -= 1; return undefined; }
          if (this.#pump.logs.get(topic)?.watched) this.#pump.drop(topic);
          this.#pump.logs.delete(topic);
          return this.#unwatched(topic);
        }
        const watched = state === 'watching';
        if (!watched || !this.#pump.logs.has(topic)) this.#pump.open(topic, after).watched = watched;
        return undefined;
      }
      case 'caught_up':
        if (line.welcome.topics ? !frame.all : logOf(frame)) return undefined;
        line.caughtUp = true;
        if (line === this.#next) return this.#take(line);
        this.#isCaughtUp = true;
        return this.#set(this.#served);
      case 'move': return line === this.#line && this.#beginMove(frame);
      case 'refreshed': return this.#refreshed(frame.expires_at);
      case 'error':
        this.#hint = frame.reconnect ?? this.#hint;
        if (frame.topic) this.#unwatched(frame.topic, new RingpushError(frame.code, frame.message, false));
        return undefined;
      case 'heartbeat': return this.#tabs?.beat();
      default: // pong, and what a newer server says
    }
  }

  #welcome(line, frame) {
    const { user } = this.#options;
    if (user && frame.user !== user) {
      this.#stop('wrong_user', `the token is of ${frame.user}, not of ${user}`);
      return;
    }
    this.#failures = this.#refusals = 0;
    this.#why = 'expiring';
    this.#fresh = false;
    this.#hint = frame.reconnect ?? this.#hint;
    line.welcome = frame;
    line.watch(frame.heartbeat_ms ?? frame.ping_every_ms, GRACE_MS, !frame.features?.includes('heartbeat'));
    const { logs } = this.#pump;
    this.#pump.open('', frame.since, this.#positions?.known);
    const { topics, everyone } = frame;
    const told = { ...topics, ...everyone && { everyone } };
    for (const name in told) this.#pump.open(name, told[name].after);
    for (const name of logs.keys()) if (name && !told[name] && !this.#watches.has(name)) logs.delete(name);
    for (const topic of this.#watches.keys()) this.#sendWatch(line, topic);
    this.#tabs?.announce();
    if (frame.server_time) this.#ahead = (Date.parse(frame.server_time) || Date.now()) - Date.now();
    if (frame.token_expires_at) this.#scheduleRefresh(frame.token_expires_at);
    if (line === this.#line) this.#set(this.#served);
    this.#sendAck(true);
  }

  /** A move also ends when the new line has brought all that the old one had. */
  #reached() {
    const next = this.#next;
    if (!next?.welcome || !Object.keys(next.seq)[0]) return;
    const old = this.#line?.seq ?? {};
    if (Object.keys(old).every((name) => next.seq[name] >= old[name])) this.#take(next);
  }

  #take(line) {
    const old = this.#line;
    this.#line = line;
    this.#next = this.#move = null;
    this.#isCaughtUp = line.caughtUp || this.#isCaughtUp;
    this.#set(this.#served);
    if (old && old !== line) { this.#sendAck(true, old); old.close(); }
  }

  async #beginMove({ url, node, reason, after_ms: after = 0 }) {
    this.#move?.opening?.close();
    this.#next = null;
    const move = this.#move = {};
    const isOver = () => this.#move !== move || this.#over;
    this.#set({ ...this.#served, name: 'moving', to: node, reason });
    for (let tries = 0; tries < MOVE_TRIES; tries += 1) {
      await pause(tries ? between(this.#hint) : after);
      if (isOver()) return;
      try {
        const line = await this.#openAt(url, { token: await this.#anyToken() }, 'received', move);
        if (isOver()) { line.close(); return; }
        this.#next = line;
        line.begin((frame) => this.#frame(line, frame));
        await line.ended;
      } catch { /* the old line goes on */ }
      if (isOver()) return;
      this.#next = null;
    }
    this.#move = null;
    this.#set(this.#served);
  }

  /** The state while a line is served. */
  get #served() { return { name: this.#isCaughtUp ? 'live' : 'catching-up', node: this.#line?.welcome?.node }; }

  /** The line does not answer: another one first, then it goes. */
  async #replace(line) {
    try {
      const next = await this.#open();
      if (this.#line !== line || this.#over) return next.close();
      this.#next?.close();
      this.#move = null;
      this.#next = next;
      next.begin((frame) => this.#frame(next, frame));
      if (this.#next === next) this.#take(next);
    } catch {
      line.fail('silent');
    }
  }

  /** Says what may be acked; `again` is true or the name of a log: also what was said already. */
  #sendAck(again, only) {
    for (const line of only ? [only] : [this.#line, this.#next]) {
      if (!line?.welcome) continue;
      let ack = { type: 'ack' };
      let count = 0;
      for (const [name, log] of this.#pump.logs) {
        const seq = this.#ackable(name, log);
        if (seq === null || (again !== true && again !== name && line.acked[name] === seq)) continue;
        line.acked[name] = seq;
        if (!name) ack.seq = seq;
        else if (name === 'everyone') ack.everyone = seq;
        else (ack.topics ??= {})[name] = seq;
        count += 1;
        if (count % ACKED) continue;
        line.send(ack);
        ack = { type: 'ack' };
      }
      if (count % ACKED) line.send(ack);
    }
  }

  // --- tokens -----------------------------------------------------------------------------------

  async #anyToken() {
    if (this.#token) return this.#token;
    this.#fetching ??= this.#fetchToken(this.#why).finally(() => { this.#fetching = null; });
    return this.#fetching;
  }

  async #fetchToken(reason) {
    const signal = this.#within(PATIENCE_MS);
    const timeout = new Promise((_, reject) => {
      signal.addEventListener('abort', () => reject(
        new RingpushError('token_timeout', '"token" did not answer')), { once: true });
    });
    timeout.catch(() => {}); // it is also raced for
    try {
      const asked = (async () => this.#options.token({ reason, signal }))();
      const token = await Promise.race([asked, timeout]);
      if (typeof token !== 'string' || !/^[\x21-\x7e]+$/.test(token)) {
        throw new RingpushError('token_rubbish', '"token" must return a string');
      }
      this.#token = token;
      this.#fresh = true;
      return token;
    } catch (error) {
      throw error instanceof Refused ? error : RingpushError.from('token_failed', error);
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
          await pause(between({ min_ms: 0, max_ms: Math.min(RETRY_MAX_MS, 500 * 2 ** tries) }));
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

  /** Aborts after so long, and when the client stops. */
  #within(ms) { return AbortSignal.any([this.#abort.signal, AbortSignal.timeout(ms)]); }

  #socketUrl() { return new URL('v1/ws', this.#url).href.replace('http', 'ws'); }

  #set(state) {
    if (this.#stopped && state.name !== 'stopped') return;
    if (state.name === this.#state.name && state.name !== 'waiting') return;
    this.#state = state;
    this.#tabs?.relay({ state });
    for (const handler of this.#stateHandlers) {
      try { handler(state); } catch (error) { this.#fault(error, 'handler'); }
    }
  }

  #fault(error, code, retryable) {
    const fault = RingpushError.from(code, error, retryable);
    const { onError } = this.#options;
    try {
      if (onError) return onError(fault);
      console.error('ringpush:', fault);
    } catch (error) {
      console.error('ringpush:', error);
    }
    return undefined;
  }

  #stop(cause, error) {
    if (this.#stopped) return;
    this.#stopped = cause;
    if (error) this.#fault(error, cause, false);
    this.#abort.abort();
    this.#pump.flush();
    this.#pump.end();
    this.#closeLines();
    this.#tabs?.stop();
    if (!this.#line) this.#finish();
  }

  #closeLines() {
    clearTimeout(this.#refreshTimer);
    for (const line of [this.#line, this.#next, ...this.#opening]) line?.close();
    this.#wakeUp?.();
  }

  #finish() {
    this.#news?.close();
    this.#positions?.flush();
    this.#set({ name: 'stopped', cause: this.#stopped });
    this.#end();
  }

  #listenToThePage() {
    const wake = () => {
      // A tab that was frozen has not heard `forget`.
      try { this.#positions?.ifForgotten((forgotten) => forgotten && this.close())?.catch?.(() => {}); } catch { /* it was told */ }
      this.#tabs?.join();
      this.wake();
    };
    const hide = () => {
      this.#pump.flush();
      this.#positions?.flush();
      this.#tabs?.leave();
    };
    let last = Date.now();
    const tick = setInterval(() => {
      const passed = Date.now() - last;
      last += passed;
      const slept = passed > JUMP_MS || passed < -JUMP_MS;
      this.#tabs?.look(slept);
      // In a hidden tab a browser is late with every timer.
      if (slept && (isVisible() || !this.#wakeUp)) wake();
    }, TICK_MS);
    tick.unref?.();
    const { signal } = this.#abort;
    signal.addEventListener('abort', () => clearInterval(tick));
    if (!globalThis.window) return;
    const on = (target, name, handler) => target.addEventListener(name, handler, { signal });
    on(window, 'online', () => { if (isVisible() || !this.#patient) wake(); });
    on(window, 'pageshow', wake);
    on(window, 'pagehide', hide);
    on(document, 'visibilitychange', () => {
      this.#tabs?.handled();
      if (isVisible()) wake();
    });
    on(document, 'freeze', hide);
    on(document, 'resume', wake);
  }
}

/** The browser's own store, or memory where there is none. */
function browserStore() {
  try {
    const { localStorage } = window;
    return {
      get: (key) => localStorage.getItem(key),
      set: (key, value) => (value === null ? localStorage.removeItem(key) : localStorage.setItem(key, value)),
    };
  } catch {
    return memoryStore(); // no browser, or one that forbids it
  }
}
