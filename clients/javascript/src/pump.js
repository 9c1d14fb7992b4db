// The queue between the lines and the application: each number once and in order, one message at a time, acked when
// handled.

/** How long an ack waits for others: for one client, and more where many clients of a process ack at once. */
const ACK_MS = 50;
const ACK_MS_PER_CLIENT = 0.5;
const ACK_MAX_MS = 2_000;
/** Clients of this process whose ack waits. */
let waiting = 0;
const RETRY_FIRST_MS = 200;
const RETRY_MAX_MS = 10_000;
/** What a consumer answers that has left with the message at hand. */
const LEFT = Symbol('left');

/** The log that a frame is about: a topic, `everyone`, or '' for the inbox. */
export const logOf = ({ everyone, topic }) => (everyone ? 'everyone' : topic ?? '');

/** The numbers of one log, or of the inbox. */
class Log {
  /** Up to here it was handled, and acked. */
  acked = null;
  /** Resets so far: what was handled before the last one is not acked in the numbers after it. */
  resets = 0;

  /** A line has begun after `start`; `known`: what an earlier page has handled, `{ seq, at }`. */
  constructor(start, known) {
    // Nothing below `start` is to be acked.
    this.received = this.done = this.start = start;
    this.known = known;
  }

  /** What was handled in this page, in the numbers that hold; `base`: where those of a reset begin that is not handled yet. */
  get handled() { return this.base ?? this.done; }

  /** Where the next line of this page starts: after what was handled, or is at hand. */
  get position() { return this.base ?? this.atHand ?? this.done; }

  /** When the newest message that was handled was accepted. */
  get at() { return Date.parse(this.accepted) || 0; }
}

export class Pump {
  /** By name; empty before the first line. */
  logs = new Map();
  #hooks; #queue = []; #busy = false; #over = false;
  #consumers = new Set(); #gapHandlers = new Set();
  #timer = null; #retry = null;

  constructor(hooks) { this.#hooks = hooks; }

  get idle() { return !this.#busy && this.#queue.length === 0; }

  /** The log of this name, which begins there if it is new. */
  open(name, start, known) {
    if (!this.logs.has(name)) this.logs.set(name, new Log(start, known));
    return this.logs.get(name);
  }

  /** Forgets a log, and what is queued of it. */
  drop(name) {
    const log = this.logs.get(name);
    if (log) log.over = true;
    this.logs.delete(name);
    this.#pump();
  }

  /** Where a line begins, by log: `position`, or during a move `received`. */
  all(which) {
    return Object.fromEntries([...this.logs].filter(([, log]) => !log.watched).map(([name, log]) => [name, log[which]]));
  }

  /** The lines are gone: what was not begun comes again, save a reset, which is told once. */
  rewind() {
    this.#queue = this.#queue.filter(({ reset, resets, log }) => reset && resets === log.resets);
    for (const log of this.logs.values()) {
      log.received = log.position;
      // What was acked as received and comes again is acked again, or its credit would be gone.
      if (log.acked > log.received) log.acked = log.said = log.received;
    }
  }

  /** Queues a message. Returns false for a repeat. */
  put(frame, live) {
    const { seq, accepted_at: accepted } = frame;
    const log = this.logs.get(logOf(frame));
    if (seq <= log.received) return false;
    log.received = seq;
    // One that was accepted later has the number of another: the server's store is not the one of then.
    const isKnown = seq <= log.known?.seq && Date.parse(accepted) <= log.known.at;
    this.#queue.push({ log, message: isKnown ? null : this.message(frame, live), seq, accepted, resets: log.resets });
    if (this.#hooks.ack === 'received') this.#ack(log, seq);
    this.#pump();
    return true;
  }

  /** Queues a gap. Returns false where it is known. */
  gap(frame) {
    const { after, before, reason, everyone, topic = everyone && 'everyone' } = frame;
    const log = this.logs.get(logOf(frame));
    const seq = before - 1;
    const reset = reason === 'reset';
    if (!reset && seq <= log.received) return false;
    log.received = seq;
    if (reset) {
      log.base = seq;
      log.acked = log.start = null;
      log.known = log.left = log.said = undefined;
      log.resets += 1;
    }
    // Nobody is told that there is something that is not for this user.
    const gap = reason === 'excepted' ? null : { after, before, reason, topic };
    this.#queue.push({ log, gap, seq, reset, resets: log.resets });
    this.#pump();
    return true;
  }

  message(frame, live) {
    const { seq, id, event, payload, via, traceparent, accepted_at: acceptedAt, expires_at: expiresAt } = frame;
    const name = logOf(frame);
    const log = this.logs.get(name);
    const resets = log?.resets;
    return {
      event, payload, seq, id, topic: via ?? (name || undefined), inLog: !!name, traceparent, live,
      acceptedAt: new Date(acceptedAt),
      expiresAt: new Date(expiresAt),
      ack: () => { if (this.#hooks.ack === 'manual' && resets === log?.resets) this.#ack(log, seq); },
    };
  }

  on(event, handler, signal) {
    const consumer = {
      wants: (message) => event === '*' || message.event === event,
      give: handler,
    };
    return this.#add(consumer, signal);
  }

  onGap(handler) {
    this.#gapHandlers.add(handler);
    return () => this.#gapHandlers.delete(handler);
  }

  /** An iterable of messages. One is handled when the next is asked for; leaving the loop handles nothing. */
  async *messages({ events, topic, signal } = {}) {
    let given = null;   // what waits to be taken: the message, and what says whether it was handled
    let wake = null;
    let over = this.#over || signal?.aborted;
    const consumer = {
      wants: (message) => (!events || events.includes(message.event)) && (!topic || message.topic === topic),
      give: (message) => new Promise((tell) => { given = { message, tell }; wake?.(); }),
      end: () => {
        over = true;
        remove();
        given?.tell(LEFT);
        wake?.();
      },
    };
    const remove = this.#add(consumer, signal);
    try {
      while (!over) {
        if (given) {
          yield given.message;
          const { tell } = given;
          given = null;
          tell();
        }
        if (!given && !over) await new Promise((resolve) => { wake = resolve; });
      }
    } finally {
      consumer.end();
    }
  }

  #add(consumer, signal) {
    if (signal?.aborted) return () => {};
    this.#consumers.add(consumer);
    const remove = () => { this.#consumers.delete(consumer); };
    signal?.addEventListener('abort', consumer.end ?? remove);
    // Whoever comes in the same turn has what is queued, too.
    queueMicrotask(() => this.#pump());
    return remove;
  }

  async #pump() {
    if (this.#busy) return;
    this.#busy = true;
    try {
      while (!this.#over && this.#queue.length > 0 && this.#consumers.size > 0) {
        const item = this.#queue[0];
        if (item.log.over) { this.#queue.shift(); continue; }
        // Whoever had it has left: it waits for somebody else who wants it.
        if (item.log.left === item.seq && ![...this.#consumers].some((consumer) => consumer.wants(item.message))) return;
        this.#queue.shift();
        if (item.gap) {
          await this.#giveGap(item);
          if (this.#over) return;
        } else if (item.message) {
          item.log.atHand = item.seq;
          let handled = this.#give(item);
          // Most handlers are done when they return: a promise for each would cost more than all the rest.
          if (handled.then) handled = await handled;
          item.log.atHand = null;
          if (this.#over) return;
          if (!handled) {
            item.log.left = item.done ? null : item.seq;
            this.#queue.unshift(item);
            continue;
          }
        }
        this.#done(item);
      }
    } finally {
      this.#busy = false;
    }
  }

  async #giveGap({ gap }) {
    if (this.#gapHandlers.size === 0) {
      this.#hooks.error(new Error(`${gap.after + 1} to ${gap.before - 1} are gone: ${gap.reason}`), 'gap');
      return;
    }
    for (const handler of [...this.#gapHandlers]) {
      const isThere = () => !this.#over && this.#gapHandlers.has(handler);
      if (isThere()) await this.#try(() => handler(gap), isThere);
    }
  }

  /** Gives a message to each consumer that wants it. Returns, or promises, false if it is to be given again. */
  #give(item) {
    const { message } = item;
    const validate = !item.valid && this.#hooks.validate[message.event];
    if (validate) {
      item.valid = true;
      try { message.payload = validate(message.payload); } catch (error) {
        this.#hooks.error(error, 'invalid_payload');
        return true;
      }
    }
    let handled = true;
    const waits = [];
    for (const consumer of [...this.#consumers]) {
      if (this.#over) return false;
      // Who has handled it is not given it again, and another one may have taken this one off.
      if (item.done?.includes(consumer) || !this.#consumers.has(consumer) || !consumer.wants(message)) continue;
      const tell = (left) => {
        if (left === LEFT) handled = false;
        else (item.done ??= []).push(consumer);
      };
      const given = this.#try(() => consumer.give(message), () => this.#consumers.has(consumer));
      if (given?.then) waits.push(given.then(tell));
      else tell();
    }
    return waits[0] ? Promise.all(waits).then(() => handled) : handled;
  }

  /** Tries until it succeeds, the application says to skip it, or whoever failed is there no more. */
  #try(act, isThere, wait = RETRY_FIRST_MS) {
    const again = async (error) => {
      if (this.#hooks.error(error, 'handler') === 'skip') return undefined;
      await new Promise((resolve) => { this.#retry = setTimeout(resolve, wait); });
      if (this.#over) return LEFT;
      return isThere() ? this.#try(act, isThere, Math.min(wait * 2, RETRY_MAX_MS)) : undefined;
    };
    try {
      const given = act();
      return given?.then?.(null, again);
    } catch (error) {
      return again(error);
    }
  }

  #done({ log, seq, resets, reset, accepted }) {
    if (resets !== log.resets) return;
    if (reset) log.base = null;
    log.done = reset ? seq : Math.max(seq, log.done);
    if (accepted && !(accepted <= log.accepted)) log.accepted = accepted;
    log.left = null;
    if (this.#hooks.ack === 'handled') this.#ack(log, log.done);
  }

  #ack(log, seq) {
    if (log.acked !== null && seq <= log.acked) return;
    const ahead = seq - (log.said ?? log.start ?? seq);
    log.acked = seq;
    if (ahead >= this.#hooks.window / 2) return this.flush();
    if (this.#timer) return;
    waiting += 1;
    this.#timer = setTimeout(() => this.flush(), Math.min(ACK_MAX_MS, Math.max(ACK_MS, waiting * ACK_MS_PER_CLIENT)));
  }

  flush() {
    if (this.#timer) waiting -= 1;
    clearTimeout(this.#timer);
    this.#timer = null;
    for (const log of this.logs.values()) log.said = log.acked ?? undefined;
    this.#hooks.acked();
  }

  end() {
    this.#over = true;
    clearTimeout(this.#retry);
    for (const consumer of this.#consumers) consumer.end?.();
    this.#consumers.clear();
  }
}
